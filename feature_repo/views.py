"""The Parquet behind the Feast views, written a day at a time.

A file is remembered with a fingerprint of everything that it was computed from (the parts of the log that could hold a
row for it, the declaration, this layout). A build therefore computes the files that are missing or whose input
changed, and a file is the same whether it was written in a backfill or alone.

    views/user_profile/all.parquet            every known version of every user
    views/item_profile/all.parquet            the same of items
    views/user_stats/2024-01-05.parquet       the numbers as of that midnight, one row a user; likewise item_stats
    views/user_history/2024-01-05.parquet     users with an action that became known that day: their last 100 then
    views/user_history/partial.parquet        the same for the unfinished day of the newest build
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.contract import TIMESTAMP
from engagement.files import write_text
from engagement.index import Part, from_us, to_us
from engagement.snapshot import Snapshot
from engagement.table import TableSpec
from feature_repo.aggregates import LOOK_BACK, snapshots
from feature_repo.encode import DAY_US
from feature_repo.features import ARROW, ITEM_CREATED, View, declare, sized, statistics, views
from feature_repo.history import ActionLog

LAYOUT = 1  # raise it when the meaning of a file changes: every home then rebuilds its views
DAY = timedelta(days=1)
EVERYTHING, PARTIAL = "all", "partial"
BLOCK_DAYS = 64  # midnights computed at a time; bounds the memory of a backfill


@dataclass(frozen=True)
class Inputs:
    """What one build reads: a snapshot, with its tables loaded at most once."""

    snapshot: Snapshot

    @cached_property
    def items(self) -> pa.Table:
        """All items, embeddings as fixed-size lists."""
        return sized(self.snapshot.items())

    @cached_property
    def users(self) -> pa.Table:
        """All user rows."""
        return self.snapshot.users()

    @cached_property
    def spec(self) -> TableSpec:
        """The declaration for this snapshot."""
        return declare(self.snapshot.manifest, self.items.schema, self.users.schema)

    @cached_property
    def log(self) -> pl.DataFrame:
        """All engagement rows."""
        return as_polars(self.snapshot.engagements())

    @cached_property
    def actions(self) -> ActionLog:
        """All actions of all users."""
        return ActionLog.of(self.log, self.spec.actions)


def fingerprint(inputs: Inputs) -> str:
    """Hex digest of the snapshot, the declaration and the layout: equal ones give equal views."""
    return hashlib.sha256(f"{_base(inputs.spec)}:{inputs.snapshot.digest}".encode()).hexdigest()


def schema(view: View) -> pa.Schema:
    """Columns of a view's Parquet files."""
    times = [("event_timestamp", TIMESTAMP), ("created_timestamp", TIMESTAMP)]
    return pa.schema([(view.key, pa.string()), *times, *((n, ARROW[t]) for n, t in view.columns)])


def build_views(root: Path, inputs: Inputs) -> int:
    """Bring the files under `root` up to the snapshot; returns how many were written."""
    state_file = root / "state.json"
    known, wanted = _read_state(state_file), _wanted(inputs)
    stale = [n for n, mark in wanted.items() if known.get(n) != mark or not (root / n).exists()]
    later = {n: m for n, m in known.items() if n not in wanted and _still_true(n, m, inputs)}
    fresh = {n: m for n, m in wanted.items() if n not in set(stale)}
    # What is about to change is forgotten first: a build killed half way must not vouch for half of it.
    _write_state(state_file, known, {**later, **fresh})
    for file in root.glob("*/*.parquet"):
        if str(file.relative_to(root)) not in {**later, **wanted}:
            file.unlink()
    for name, table in _compute(inputs, stale):
        _write(root / name, table)
    _write_state(state_file, {**later, **fresh}, {**later, **wanted})
    return len(stale)


def as_polars(table: pa.Table) -> pl.DataFrame:
    """An Arrow table as a polars frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _wanted(inputs: Inputs) -> dict[str, str]:
    """Every file that the views consist of at the snapshot's `as_of`, with its fingerprint."""
    snapshot, spec = inputs.snapshot, inputs.spec
    base = _base(spec)
    as_of, parts = to_us(snapshot.as_of), snapshot.parts("engagements")
    wanted: dict[str, str] = {}
    for view in views(spec):
        if view.name.endswith("_profile"):
            of = snapshot.parts("items" if view.entity == "item" else "users")
            wanted[_path(view, EVERYTHING)] = _mark(base, of, as_of)
    names = {v.name: v for v in views(spec)}
    told = _Prefixes(base, parts)
    for midnight in _midnights(parts, as_of):
        low = midnight - LOOK_BACK // timedelta(microseconds=1)
        read = [p for p in parts if p.known_from < midnight and p.first < midnight and p.last >= low]
        for view in (names["user_stats"], names["item_stats"]):
            wanted[_path(view, _date(midnight))] = _mark(base, read)
        wanted[_path(names["user_history"], _date(midnight - DAY_US))] = told.mark(midnight)
    wanted[_path(names["user_history"], PARTIAL)] = _mark(base, parts, as_of)
    return wanted


class _Prefixes:
    """Fingerprints of everything known at one instant after another, without hashing the past again each time."""

    def __init__(self, base: str, parts: list[Part]) -> None:
        self._base, self._hash = base, hashlib.sha256()
        self._rest = sorted(parts, key=lambda p: (p.known_from, p.path), reverse=True)

    def mark(self, before: int) -> str:
        """The fingerprint of all parts with a row known before an instant; instants must not fall."""
        while self._rest and self._rest[-1].known_from < before:
            part = self._rest.pop()
            self._hash.update(f"{part.path}={part.sha256};".encode())
        return f"{self._base}:{self._hash.hexdigest()[:32]}"


def _midnights(parts: list[Part], as_of: int) -> list[int]:
    """The midnights that have a snapshot: after the first row, up to `as_of`; microseconds.

    Where there is none yet, the latest midnight stands in with no rows, so that every view has a file to be read.
    """
    newest = as_of // DAY_US * DAY_US
    first = min((p.first for p in parts), default=as_of)
    return list(range((first // DAY_US + 1) * DAY_US, as_of + 1, DAY_US)) or [newest]


def _compute(inputs: Inputs, names: list[str]) -> Iterator[tuple[str, pa.Table]]:
    as_of = to_us(inputs.snapshot.as_of)
    for view in views(inputs.spec):
        stems = [Path(n).stem for n in names if Path(n).parent.name == view.name]
        if view.name.endswith("_profile"):
            tables: Iterator[tuple[str, pa.Table]] = ((s, _profile(view, inputs)) for s in stems)
        else:
            days = sorted(_day(s, as_of) for s in stems)
            tables = _stats(view, inputs, days) if view.name.endswith("_stats") else _history(inputs, days)
        for stem, table in tables:
            yield _path(view, stem), _as(view, table)


def _profile(view: View, inputs: Inputs) -> pa.Table:
    """Rows of users or items; known from the instant that they are valid from."""
    if view.entity == "user":
        return inputs.users.append_column("created_timestamp", inputs.users.column("event_timestamp"))
    created = inputs.items.column("created_timestamp")
    table = inputs.items.append_column("event_timestamp", created)
    return table.append_column(ITEM_CREATED, created.cast(pa.int64()))


def _stats(view: View, inputs: Inputs, days: list[datetime]) -> Iterator[tuple[str, pa.Table]]:
    stats = statistics(inputs.spec.actions, inputs.spec.primary_action)
    while days:
        block = [d for d in days if d - days[0] < BLOCK_DAYS * DAY]
        shown = pl.col("event_timestamp").is_between(block[0] - LOOK_BACK, block[-1], closed="left")
        found = snapshots(inputs.log.filter(shown), view.key, stats, block[0], block[-1])
        for day in block:
            yield f"{day:%Y-%m-%d}", found[day].to_arrow() if day in found else schema(view).empty_table()
        days = days[len(block) :]


def _history(inputs: Inputs, days: list[datetime]) -> Iterator[tuple[str, pa.Table]]:
    """Each user's newest actions at the end of each day on which the user had one; the day of `as_of` is partial."""
    log, as_of = inputs.actions, to_us(inputs.snapshot.as_of)
    for day in days:
        low = to_us(day)
        last = log.last_within(low, min(low + DAY_US, as_of))
        # Feast reads "at or before"; an action may be seen only strictly after it became known.
        visible = pa.array(log.known[last] + 1).cast(TIMESTAMP)
        columns = dict(zip(("time", "actions", "item"), log.arrays(last), strict=True))
        stem = f"{day:%Y-%m-%d}" if low + DAY_US <= as_of else PARTIAL
        yield (
            stem,
            pa.table(
                {"user_id": log.owners(last), "event_timestamp": visible, "created_timestamp": visible, **columns}
            ),
        )


def _day(stem: str, as_of: int) -> datetime:
    if stem == PARTIAL:
        return from_us(as_of // DAY_US * DAY_US)
    return datetime.fromisoformat(f"{stem}T00:00:00+00:00")


def _as(view: View, table: pa.Table) -> pa.Table:
    wanted = schema(view)
    return table.select(wanted.names).cast(wanted)


def _path(view: View, stem: str) -> str:
    return f"{view.name}/{stem}.parquet"


def _date(us: int) -> str:
    return f"{from_us(us):%Y-%m-%d}"


def _base(spec: TableSpec) -> str:
    return hashlib.sha256(json.dumps([LAYOUT, spec.to_json()], sort_keys=True).encode()).hexdigest()[:16]


def _mark(base: str, parts: list[Part], as_of: int = 0) -> str:
    named = json.dumps([as_of, [(p.path, p.sha256) for p in parts]])
    return f"{base}:{hashlib.sha256(named.encode()).hexdigest()[:32]}"


def _still_true(name: str, mark: str, inputs: Inputs) -> bool:
    """Whether a file of a later day than `as_of`, which this build does not ask for, may stay."""
    stem = Path(name).stem
    later = stem not in (PARTIAL, EVERYTHING) and to_us(_day(stem, 0)) + DAY_US > to_us(inputs.snapshot.as_of)
    return later and mark.startswith(_base(inputs.spec))


def _read_state(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # no state, or a damaged one: everything is computed again


def _write_state(path: Path, old: dict[str, str], new: dict[str, str]) -> None:
    if new != old or not path.exists():
        write_text(path, json.dumps(new, indent=0, sort_keys=True))


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)
