"""What was served: reading the serving log, joining it with what people did later, and forgetting a user in it.

    <directory>/date=YYYY-MM-DD/<microseconds>-<unique>.parquet     answers, one row a ranked candidate
    <directory>/date=YYYY-MM-DD/<microseconds>-<unique>-<n>.npz     features of a small sample of them, as read

Rows have the engagement contract's columns: `event_timestamp` is the instant as of which a request was ranked,
`created_timestamp` when it was answered (days are of this one), `position` the rank from 0. Beside them stand a column
`score__<action>` each, `model_version`, `canary_bucket`, `purpose`, `degraded`, `status` and `latency_ms`. A request
that failed is one row without item, position and scores.

Files appear whole and never change, except that forgetting rewrites them under their name. One that cannot be read (the
last before a power cut, say) is passed over with a warning: a log may lose rows, and what reads it must not count on
all of them.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.contract import Manifest, engagement_schema
from engagement.errors import EvergreenError
from engagement.files import read_part
from engagement.index import from_us
from engagement.reading import frame
from engagement.table import RankingTable, TableSpec, concatenate

SCORE = "score__"
LIVE = "live"
ANSWER = ("request_id", "user_id", "created_timestamp", "model_version")  # tells one answer from another
_DAY, _ROWS, _FEATURES = "date=", ".parquet", ".npz"
_log = logging.getLogger("evergreen.served")


@dataclass(frozen=True)
class ServedFeatures:
    """Features as they were read when requests were ranked.

    Attributes:
        table: R requests, candidates in the order in which they were sent.
        as_of: (R,) instants whose knowledge the online store held.
    """

    table: RankingTable
    as_of: tuple[datetime, ...]


def day_directory(directory: Path, day: date) -> Path:
    """Where the answers of a day (UTC) lie."""
    return Path(directory) / f"{_DAY}{day.isoformat()}"


def days(directory: Path) -> list[tuple[date, Path]]:
    """The days that the log has, oldest first."""
    found = []
    for path in sorted(Path(directory).glob(f"{_DAY}*")):
        try:
            found.append((date.fromisoformat(path.name.removeprefix(_DAY)), path))
        except ValueError:
            continue
    return found


def files(directory: Path, since: date = date.min, suffix: str = _ROWS) -> list[Path]:
    """The log's files of days since one (inclusive), oldest first."""
    return [f for day, path in days(directory) if day >= since for f in sorted(path.glob(f"*{suffix}"))]


def read(directory: Path, start: datetime, end: datetime) -> pl.DataFrame:
    """Rows of requests that were ranked as of an instant in [start, end), whatever their purpose and status.

    Columns that only some versions know are null for the others. Empty, with the common columns, where there are none.
    """
    shown = pl.col("event_timestamp")
    wanted = shown.is_between(start, end, closed="left")
    # Nothing is answered before it is ranked, but for clocks that differ.
    return rows_of(files(directory, (start - timedelta(days=1)).date())).filter(wanted).sort("created_timestamp")


def rows_of(paths: Iterable[Path]) -> pl.DataFrame:
    """All rows of some files of the log; those that cannot be read are passed over."""
    tables = [frame(table) for path in paths if (table := _rows(path)) is not None]
    return pl.concat([frame(COMMON.empty_table()), *tables], how="diagonal")


def read_features(directory: Path, start: datetime, end: datetime) -> Iterator[ServedFeatures]:
    """The features that were kept of requests that were ranked as of an instant in [start, end), file by file."""
    for path in files(directory, (start - timedelta(days=1)).date(), _FEATURES):
        found = _features(path)
        if found is None:
            continue
        times = [from_us(int(t)) for t in found.table.time]
        kept = [i for i, t in enumerate(times) if start <= t < end]
        if kept:
            yield ServedFeatures(found.table.select(np.array(kept)), tuple(found.as_of[i] for i in kept))


def join_actions(
    served: pl.DataFrame, engagements: pa.Table, manifest: Manifest, as_of: datetime, matures: timedelta
) -> pl.DataFrame:
    """What was served to real users, as engagement rows of the contract.

    Args:
        served: Rows of the log, as `read` gives them; those of other purposes and failed ones are left out.
        engagements: What people did, as known before `as_of`: rows of the contract.
        manifest: Names the actions.
        as_of: The present.
        matures: How long after a request its outcome counts as known.

    Returns:
        The contract's columns, then `score__<action>`, `model_version`, `canary_bucket`, `degraded`. Actions are true
        or false for requests that had matured (`event_timestamp + matures <= as_of`), and null (not known) for the
        others, also where somebody has acted already: those who act fast are not like those who act late.
        A request that was answered several times is in there once, with its last answer.
    """
    key, actions = ["request_id", "item_id"], list(manifest.actions)
    shown = served.filter((pl.col("purpose") == LIVE) & pl.col("item_id").is_not_null())
    shown = shown.filter(pl.col("created_timestamp") == pl.col("created_timestamp").max().over("request_id"))
    shown = shown.unique(key, keep="first", maintain_order=True).drop("created_timestamp", *actions, strict=False)
    acted = frame(engagements).filter(~pl.col("sampled").fill_null(value=False))
    did = acted.group_by(key).agg(pl.col("created_timestamp").max(), *(pl.col(a).any() for a in actions))
    joined = shown.join(did, on=key, how="left", maintain_order="left")
    matured = pl.col("event_timestamp") + matures <= as_of
    labels = [pl.when(matured).then(pl.col(a).fill_null(value=False)).alias(a) for a in actions]
    contract = engagement_schema(manifest).names
    absent = [pl.lit(None, pl.String).alias(n) for n in contract if n not in joined.columns and n != "sampled"]
    known = pl.max_horizontal("created_timestamp", "event_timestamp")
    joined = joined.with_columns(*labels, *absent, known.alias("created_timestamp"), sampled=pl.lit(value=False))
    scores = [c for c in joined.columns if c.startswith(SCORE)]
    return joined.select(*contract, *scores, "model_version", "canary_bucket", "degraded")


def forget(directory: Path, user_id: str) -> int:
    """Remove a user's rows and features; returns how many answers they were of.

    A server that runs may still hold what it wrote down in the last seconds; forgetting again finds it.
    """
    answers = 0
    for path in files(directory):
        table = _rows(path)
        if table is None:
            path.unlink(missing_ok=True)  # it may hold the user
            continue
        rows = frame(table)
        mine = rows.filter(pl.col("user_id") == user_id)
        if mine.height:
            answers += mine.n_unique(ANSWER)
            _replace(path, rows.filter(pl.col("user_id") != user_id))
    for path in files(directory, suffix=_FEATURES):
        found = _features(path)
        others = None if found is None else np.flatnonzero(found.table.user_id != user_id.encode())
        if found is None or others is None or not len(others):
            path.unlink(missing_ok=True)
        elif len(others) < found.table.requests:
            kept = found.table.select(others)
            save_features(path, ServedFeatures(_without_strangers(kept), tuple(found.as_of[i] for i in others)))
    return answers


def save_features(path: Path, features: ServedFeatures) -> None:
    """Write features of requests, of one spec, in one step."""
    table = features.table
    columns = {f.name: getattr(table, f.name) for f in fields(table) if f.name != "spec"}
    spec = np.frombuffer(json.dumps(table.spec.to_json()).encode(), np.uint8)
    as_of = np.array([t.isoformat() for t in features.as_of], "S32")
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, spec=spec, as_of=as_of, **columns)
    temporary.replace(path)


def save_rows(path: Path, table: pa.Table) -> None:
    """Write rows in one step: a file is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    # Without arrow's own schema, text that was written by a dictionary is read back as text.
    pq.write_table(table, temporary, compression="zstd", write_page_checksum=True, store_schema=False)
    temporary.replace(path)


COMMON = pa.schema(
    [
        *((name, pa.string()) for name in ("request_id", "user_id", "item_id")),
        *((name, pa.timestamp("us", tz="UTC")) for name in ("event_timestamp", "created_timestamp")),
        ("position", pa.int16()),
        *((name, pa.string()) for name in ("model_version", "purpose", "degraded")),
        ("canary_bucket", pa.int16()),
        ("status", pa.int16()),
        ("latency_ms", pa.float32()),
    ]
)
"""The columns that every version's rows have."""


def _rows(path: Path) -> pa.Table | None:
    try:
        return read_part(path)
    except EvergreenError as error:
        _log.warning("%s", error)
        return None


def _features(path: Path) -> ServedFeatures | None:
    try:
        with np.load(path, allow_pickle=False) as held:
            spec = TableSpec.from_json(json.loads(held["spec"].tobytes()))
            as_of = tuple(datetime.fromisoformat(t.decode()) for t in held["as_of"].tolist())
            columns = {f.name: held[f.name] for f in fields(RankingTable) if f.name != "spec"}
        return ServedFeatures(RankingTable(spec=spec, **columns), as_of)
    except Exception as error:  # numpy and zipfile have many ways to say that a file is damaged
        _log.warning("%s cannot be read (%s)", path, error)
        return None


def _replace(path: Path, rows: pl.DataFrame) -> None:
    if rows.height:
        save_rows(path, rows.to_arrow())
    else:
        path.unlink()


def _without_strangers(table: RankingTable) -> RankingTable:
    """The same requests with no history but their own."""
    return concatenate([_alone(table, i) for i in range(table.requests)])


def _alone(table: RankingTable, request: int) -> RankingTable:
    one = table.select(np.array([request]))
    span = slice(int(one.history_start[0]), int(one.history_end[0]))
    history = {n: getattr(one, n)[span] for n in ("history_time", "history_item", "history_actions")}
    zero = np.zeros(1, np.int64)
    return replace(one, history_start=zero, history_end=zero + len(history["history_time"]), **history)
