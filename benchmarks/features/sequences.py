"""Three ways to give a training request the last 100 actions of its user: what they take in bytes and in time.

A generated log of 20,000 users (log-normal activity, Zipf items, a tenth of the actions known up to two days late) and
one million requests. Every way ends in the same batches, (1024, 100) times, actions, item hashes and a mask, and a
digest over 20,000 requests proves it. An action counts when it was known strictly before the request.
"""

import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from benchmarks.measure import Measured, cpu_seconds, measure, median
from feature_repo import pit
from feature_repo.features import HISTORY_LENGTH
from feature_repo.history import ActionLog
from feature_repo.partials import taken

USERS, ACTIONS_A_USER, REQUESTS_A_USER, ITEMS = 20_000, 250, 50, 100_000
ACTIONS = ("save", "click", "hide")
START, SPAN_US, DAY_US = 1_704_067_200_000_000, 60 * 86_400_000_000, 86_400_000_000
BATCH, CHUNK, CHECKED = 1024, 50_000, 20_000
TIMESTAMP = pa.timestamp("us", tz="UTC")
COLUMNS = ("time", "actions", "item")
LISTS = [(c, pa.list_(pa.int64())) for c in COLUMNS]


def generate(home: str, users: int) -> None:
    """Write `log.parquet` (rows with an action) and `requests.parquet`."""
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1, users)
    owner = rng.choice(users, users * ACTIONS_A_USER, p=weight / weight.sum())
    shown = START + rng.integers(0, SPAN_US // 1_000_000, len(owner)) * 1_000_000  # whole seconds: ties happen
    late = np.where(rng.random(len(owner)) < 0.1, rng.integers(0, 2 * DAY_US, len(owner)), 0)
    item = np.minimum(rng.zipf(1.2, len(owner)), ITEMS)
    kind = rng.integers(1, 8, len(owner))
    log = pl.DataFrame({"user": owner, "item": item, "event_timestamp": shown, "created_timestamp": shown + late})
    log = log.select(
        pl.format("u{}", "user").alias("user_id"),
        pl.format("i{}", "item").alias("item_id"),
        pl.col("event_timestamp", "created_timestamp").cast(pl.Datetime("us", "UTC")),
        *[pl.Series(a, kind >> i & 1, dtype=pl.Boolean) for i, a in enumerate(ACTIONS)],
        sampled=pl.lit(False),
    )
    # Nothing defines the order of two rows of one item at one instant.
    log.unique(["user_id", "item_id", "event_timestamp"]).write_parquet(Path(home) / "log.parquet")
    asks = rng.choice(users, users * REQUESTS_A_USER, p=weight / weight.sum())
    at = np.sort(START + rng.integers(0, SPAN_US, len(asks)))
    requests = pl.DataFrame({"user": asks, "time": at}).select(pl.format("u{}", "user").alias("user_id"), "time")
    requests.write_parquet(Path(home) / "requests.parquet")


def pointers(home: str, times: int = 1) -> dict[str, float]:
    """One log, and (start, end) a request; `times` asks every request so many times."""
    root, log = Path(home), _log(home)
    users, at = _requests(home, times)
    begun = cpu_seconds()
    start, end = log.pointers(users, at)
    pointing = cpu_seconds() - begun
    _save(root / "pointers-log.parquet", {"time": log.time, "actions": log.actions, "item": _hashed(log)})
    _save(root / "pointers.parquet", {"start": start, "end": end})
    return {"pointing_cpu": pointing}


def request_snapshots(home: str) -> None:
    """Every request's row carries its actions."""
    log = _log(home)
    start, end = log.pointers(*_requests(home))
    _write_lists(Path(home) / "requests-lists.parquet", _lists(log, _hashed(log), start, end))


def action_snapshots(home: str) -> None:
    """Every action is a row of a feature view that carries the user's actions up to it."""
    log = _log(home)
    end = np.arange(1, len(log.time) + 1)
    owner = np.repeat(np.arange(len(log.users)), np.diff(log.offsets))
    start = np.maximum(log.offsets[owner], end - HISTORY_LENGTH)
    known, names = (log.known + 1), log.users.take(pa.array(owner))  # as-of says "at or before"

    def chunks() -> Iterator[pa.Table]:
        for i, table in enumerate(_lists(log, _hashed(log), start, end)):
            here = slice(i * CHUNK, i * CHUNK + len(table))
            visible = pa.array(known[here]).cast(TIMESTAMP)
            table = table.append_column("event_timestamp", visible).append_column("created_timestamp", visible)
            yield table.append_column("user_id", names.slice(here.start, len(table)))

    stamps = [("event_timestamp", TIMESTAMP), ("created_timestamp", TIMESTAMP), ("user_id", pa.string())]
    _write_lists(Path(home) / "history" / "all.parquet", chunks(), stamps)


def join_action_snapshots(home: str) -> None:
    """The as-of join on row numbers, then the lists of the rows found."""
    source = pl.read_parquet(Path(home) / "history" / "all.parquet")
    users, at = _requests(home)
    asked = pl.DataFrame({"user_id": pl.from_arrow(users), "t": at}).with_columns(pl.col("t").cast(pl.Datetime("us")))
    index = source.select("user_id", "event_timestamp", "created_timestamp")
    row = pit.match(asked, "t", index, [("user_id", "user_id")], "event_timestamp", "created_timestamp", None)
    found = source.select(pl.col(COLUMNS).gather(row))
    _plain(found).write_parquet(Path(home) / "joined-lists.parquet")


def join_by_feast(home: str) -> dict[str, float]:
    """The same through Feast and our offline store."""
    begun = cpu_seconds()
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Array, Int64, String

    importing, root = cpu_seconds() - begun, Path(home)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    source = FileSource(
        name="history",
        path="history/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    fields = [Field(name="user_id", dtype=String), *(Field(name=c, dtype=Array(Int64)) for c in COLUMNS)]
    view = FeatureView(name="history", entities=[user], ttl=timedelta(0), schema=fields, source=source)
    store = FeatureStore(
        config=RepoConfig(
            project="sequences",
            provider="local",
            registry=str(root / "registry.pb"),
            offline_store={"type": "feature_repo.offline_store.AsofOfflineStore"},
            online_store={"type": "sqlite", "path": str(root / "online.db")},
            entity_key_serialization_version=3,
            repo_path=root,
        )
    )
    store.apply([user, view])
    users, at = _requests(home)
    asked = pd.DataFrame({"user_id": users.to_pylist(), "event_timestamp": pd.to_datetime(at, unit="us", utc=True)})
    found = store.get_historical_features(asked, [f"history:{c}" for c in COLUMNS]).to_arrow()
    _plain(pl.DataFrame(pl.from_arrow(found.select(COLUMNS)))).write_parquet(root / "feast-lists.parquet")
    return {"importing_cpu": importing}


def epoch(home: str, way: str, batches: int = 0) -> dict[str, Any]:
    """Gather shuffled batches from a way's files in memory: one epoch, or so many batches.

    Returns:
        Bytes on disk and in memory, ms a batch (median), seconds of the whole and the digest of the checked requests.
    """
    root = Path(home)
    if way == "pointers":
        start, end = _columns(root / "pointers.parquet", ("start", "end"))
        columns = _columns(root / "pointers-log.parquet", COLUMNS)
        disk = sum((root / n).stat().st_size for n in ("pointers.parquet", "pointers-log.parquet"))
        memory = start.nbytes + end.nbytes + sum(c.nbytes for c in columns)
    else:
        table = pq.read_table(root / f"{way}-lists.parquet").combine_chunks()
        lists = [table.column(c).chunk(0) for c in COLUMNS]
        start, end = (lists[0].offsets.to_numpy()[s].astype(np.int64) for s in (slice(None, -1), slice(1, None)))
        columns = [c.values.to_numpy() for c in lists]
        disk, memory = (root / f"{way}-lists.parquet").stat().st_size, table.nbytes
    checked = np.random.default_rng(2).choice(len(start), min(CHECKED, len(start)), replace=False)
    digest = xxhash.xxh3_64()
    for block in np.array_split(checked, max(1, len(checked) // BATCH)):
        for array in _batch(start[block], end[block], columns):
            digest.update(np.ascontiguousarray(array).data)
    order = np.random.default_rng(1).permutation(len(start))
    blocks = [order[i : i + BATCH] for i in range(0, len(order), BATCH)][: batches or None]
    took, cpu = [], cpu_seconds()
    for block in blocks:
        begun = time.perf_counter()
        _batch(start[block], end[block], columns)
        took.append(time.perf_counter() - begun)
    return {
        "disk": disk,
        "memory": memory,
        "batch_ms": float(np.median(took)) * 1e3,
        "epoch": sum(took),
        "epoch_cpu": cpu_seconds() - cpu,
        "digest": digest.hexdigest(),
        "actions": float(np.mean(end - start)),
    }


def run(scale: int = 1, runs: int = 3) -> str:
    """Measure all ways; returns a markdown section."""
    lines = []
    with tempfile.TemporaryDirectory() as tenth, tempfile.TemporaryDirectory() as full:
        for home, users in ((tenth, USERS * scale // 10), (full, USERS * scale)):
            measure("benchmarks.features.sequences:generate", home=home, users=users)

        def of(home: str, name: str, **options: Any) -> Measured:
            return median([measure(f"benchmarks.features.sequences:{name}", home=home, **options) for _ in range(runs)])

        def line(name: str, home: str, made: list[Measured], way: str, source: int = 0) -> str:
            read = of(home, "epoch", way=way)
            found = read.result
            expected = digests.setdefault(home, found["digest"])
            if found["digest"] != expected:
                raise RuntimeError(f"{name}: other sequences than the way before it")
            requests = pq.read_metadata(Path(home) / "requests.parquet").num_rows
            return (
                f"| {name} | {requests:,} | {(found['disk'] + source) / 1e6:,.0f} | {found['memory'] / 1e6:,.0f} | "
                f"{sum(m.wall for m in made):.1f} / {sum(m.cpu for m in made):.1f} | "
                f"{max(m.peak_mb for m in made):,.0f} | {found['batch_ms']:.1f} | "
                f"{found['epoch']:.1f} / {found['epoch_cpu']:.1f} |"
            )

        digests: dict[str, str] = {}
        pointed = of(tenth, "pointers")
        lines.append(line("pointers, a tenth", tenth, [pointed], "pointers"))
        lines.append(line("array a request, a tenth", tenth, [of(tenth, "request_snapshots")], "requests"))
        view = of(tenth, "action_snapshots")
        size = (Path(tenth) / "history" / "all.parquet").stat().st_size
        joined = of(tenth, "join_action_snapshots")
        lines.append(line("array an action, as-of join, a tenth", tenth, [view, joined], "joined", size))
        feast = of(tenth, "join_by_feast")
        lines.append(line("the same through Feast and our store, a tenth", tenth, [view, feast], "feast", size))
        pointed = of(full, "pointers")
        lines.append(line("**pointers**", full, [pointed], "pointers"))
        lines.append(line("array a request", full, [of(full, "request_snapshots")], "requests"))
        ten = of(full, "pointers", times=10)
        more = of(full, "epoch", way="pointers", batches=1000).result
    asked = USERS * scale * REQUESTS_A_USER
    return "\n".join(
        [
            "### The last 100 actions: three ways",
            "",
            f"{USERS * scale:,} users, {USERS * scale * ACTIONS_A_USER / 1e6:.0f} M actions, {asked:,} requests with "
            f"{more['actions']:.0f} actions on average; a tenth has a tenth of the users, actions and requests. "
            f"Medians of {runs} runs, each in a process of its own; files are Parquet with zstd; build is from the log "
            f"to the files. A digest over the sequences of {CHECKED:,} requests is the same for all ways. "
            "Again: `python -m benchmarks.features.sequences`.",
            "",
            "| way | requests | disk MB | memory MB | build wall / CPU s | peak MB | batch of 1,024, ms | "
            "epoch wall / CPU s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
            *lines,
            "",
            f"Of the pointers' build, finding the pointers takes {pointed.result['pointing_cpu']:.1f} CPU s; the rest "
            f"sorts the log and writes it. Ten times the requests on the same log: {ten.wall:.1f} / {ten.cpu:.1f} s, "
            f"{more['disk'] / 1e6:,.0f} MB on disk, {more['memory'] / 1e6:,.0f} MB in memory, "
            f"{more['batch_ms']:.1f} ms a batch, peak {ten.peak_mb:,.0f} MB. Disk and build of the arrays an action "
            "are those of the view and the joined table together, memory and batches those of the joined table; "
            f"importing Feast takes {feast.result['importing_cpu']:.1f} CPU s of its line.",
        ]
    )


def _log(home: str) -> ActionLog:
    return ActionLog.of(taken(pl.read_parquet(Path(home) / "log.parquet"), ACTIONS))


def _requests(home: str, times: int = 1) -> tuple[pa.Array, np.ndarray]:
    frame = pl.read_parquet(Path(home) / "requests.parquet")
    users = frame["user_id"].to_arrow().cast(pa.string())
    # Asking again a microsecond apart; the table stays in the order of time, more or less.
    at = (frame["time"].to_numpy()[None, :] + np.arange(times)[:, None]).ravel()
    return pa.concat_arrays([users] * times), at


def _hashed(log: ActionLog) -> np.ndarray:
    """Item ids as the ranking table has them: 64 bits each."""
    coded = log.item.dictionary_encode()
    hashes = np.array([xxhash.xxh3_64_intdigest(v.encode()) for v in coded.dictionary.to_pylist()], np.uint64).view(
        np.int64
    )
    return hashes[coded.indices.to_numpy()]


def _lists(log: ActionLog, item: np.ndarray, start: np.ndarray, end: np.ndarray) -> Iterator[pa.Table]:
    for i in range(0, len(start), CHUNK):
        first, length = start[i : i + CHUNK], (end - start)[i : i + CHUNK]
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        index = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], length)
        values = {"time": log.time[index], "actions": log.actions[index], "item": item[index]}
        yield pa.table({n: pa.ListArray.from_arrays(pa.array(offsets), pa.array(v)) for n, v in values.items()})


def _write_lists(path: Path, tables: Iterator[pa.Table], more: list[tuple[str, pa.DataType]] | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    schema = pa.schema([*LISTS, *(more or [])])
    with pq.ParquetWriter(path, schema, compression="zstd") as out:
        for table in tables:
            out.write_table(table.select(schema.names).cast(schema))


def _plain(found: pl.DataFrame) -> pl.DataFrame:
    """A request that found no row has an empty list, as in the other ways."""
    return found.select(pl.col(c).fill_null([]) for c in COLUMNS)


def _save(path: Path, columns: dict[str, np.ndarray]) -> None:
    pq.write_table(pa.table({n: pa.array(v) for n, v in columns.items()}), path, compression="zstd")


def _columns(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    table = pq.read_table(path).combine_chunks()
    return [table.column(n).to_numpy() for n in names]


def _batch(start: np.ndarray, end: np.ndarray, columns: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """(B, 100) times, actions, items and the mask; zero where there is none."""
    step = np.arange(HISTORY_LENGTH)
    mask = step < (end - start)[:, None]
    index = np.where(mask, start[:, None] + step, 0)
    return (*(np.where(mask, c[index], 0) for c in columns), mask)


if __name__ == "__main__":
    print(run())
