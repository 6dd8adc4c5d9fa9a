"""The Parquet behind the Feast views, written a day at a time.

A file is remembered with a fingerprint of everything that it was computed from (the parts of the log that could hold a
row for it, the declaration, this layout). A build therefore computes the files that are missing or whose input
changed, and a file is the same whether it was written in a backfill or alone. The log itself is read once a part
(`partials`).

    views/user_profile/all.parquet            every known version of every user
    views/item_profile/all.parquet            the same of items
    views/user_stats/2024-01-05.parquet       the numbers as of the hours of that day (`aggregates`); likewise
                                              item_stats, category_stats, user_category_stats
    views/user_history/2024-01-05.parquet     users with an action that became known that day: their last 100 then
    views/<view>/partial.parquet              the same for the unfinished day of the newest build
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.contract import TIMESTAMP
from engagement.files import write_text
from engagement.index import Leaf, Part, to_us
from engagement.snapshot import Snapshot
from engagement.table import TableSpec
from feature_repo.aggregates import DAY_HOURS, LOOK_BACK_DAYS, daily, of_everyone
from feature_repo.encode import DAY_US, HOUR_US
from feature_repo.features import (
    ARROW,
    ITEM_CATEGORY,
    ITEM_CREATED,
    View,
    category_of,
    declare,
    sized,
    statistics,
    views,
)
from feature_repo.history import ActionLog
from feature_repo.partials import Partials

LAYOUT = 3  # raise it when the meaning of a file changes: every home then rebuilds its views
EVERYTHING, PARTIAL = "all", "partial"
BLOCK_DAYS, BLOCK_ROWS = 64, 200_000  # computed at a time; bounds the memory of a backfill


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
    def categories(self) -> pl.DataFrame:
        """Of each item `item_id`, `category` (null where it has none) and `:created`, microseconds."""
        created = pl.col("created_timestamp").dt.timestamp("us").alias(":created")
        name = category_of(self.spec)
        if not name:
            return as_polars(self.items.select(["item_id", "created_timestamp"])).select(
                "item_id", pl.lit(None, pl.String).alias("category"), created
            )
        column = pl.col(name).list.first() if pa.types.is_list(self.items.field(name).type) else pl.col(name)
        items = as_polars(self.items.select(["item_id", "created_timestamp", name]))
        return items.select("item_id", column.alias("category"), created)


def fingerprint(inputs: Inputs) -> str:
    """Hex digest of the snapshot, the declaration and the layout: equal ones give equal views."""
    return hashlib.sha256(f"{_base(inputs.spec)}:{inputs.snapshot.digest}".encode()).hexdigest()


def schema(view: View) -> pa.Schema:
    """Columns of a view's Parquet files."""
    times = [("event_timestamp", TIMESTAMP), ("created_timestamp", TIMESTAMP)]
    return pa.schema([*((k, pa.string()) for k in view.keys), *times, *((n, ARROW[t]) for n, t in view.columns)])


def build_views(root: Path, inputs: Inputs) -> int:
    """Bring the files under `root` up to the snapshot; returns how many were written.

    What was computed from the log's parts is kept beside, in `partials`.
    """
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
    partials = Partials(root.parent / "partials", inputs.snapshot)
    partials.update()
    for name, table in _compute(inputs, partials, stale):
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
    snapshot, base = inputs.snapshot, _base(inputs.spec)
    as_of, log = to_us(snapshot.as_of), snapshot.parts("engagements")
    today = as_of // DAY_US
    leaves: dict[int, list[Leaf]] = {}
    for part in log:
        leaves.setdefault(_day_of(part), []).extend(part.leaves)
    days = range(min(leaves, default=today), today + 1)
    wanted: dict[str, str] = {}
    for view in views(inputs.spec):
        if view.name.endswith("_profile"):
            parts = snapshot.parts("items" if view.entities == ("item",) else "users")
            wanted[_path(view, EVERYTHING)] = _mark(base, [leaf for p in parts for leaf in p.seen(as_of)], as_of)
            continue
        told = _Prefixes(base, [leaf for found in leaves.values() for leaf in found])
        for day in days:
            stem, end = (PARTIAL, as_of) if day == today else (_stem(day), (day + 1) * DAY_US)
            read = [
                leaf
                for d in range(day - LOOK_BACK_DAYS, day + 1)
                for leaf in leaves.get(d, ())
                if leaf.known_from < end
            ]
            mark = told.mark(end) if view.name == "user_history" else _mark(base, read)
            wanted[_path(view, stem)] = f"{mark}:{as_of}" if stem == PARTIAL else mark
    return wanted


class _Prefixes:
    """Fingerprints of everything known at one instant after another, without hashing the past again each time."""

    def __init__(self, base: str, leaves: list[Leaf]) -> None:
        self._base, self._hash = base, hashlib.sha256()
        self._rest = sorted(leaves, key=lambda leaf: (leaf.known_from, leaf.path), reverse=True)

    def mark(self, before: int) -> str:
        """The fingerprint of all parts with a row known before an instant; instants must not fall."""
        while self._rest and self._rest[-1].known_from < before:
            leaf = self._rest.pop()
            self._hash.update(f"{leaf.path}={leaf.sha256};".encode())
        return f"{self._base}:{self._hash.hexdigest()[:32]}"


def _compute(inputs: Inputs, partials: Partials, names: list[str]) -> Iterator[tuple[str, pa.Table]]:
    stale: dict[str, list[str]] = {}
    for name in names:
        stale.setdefault(Path(name).parent.name, []).append(Path(name).stem)
    today = to_us(inputs.snapshot.as_of) // DAY_US
    stats = []
    for view in views(inputs.spec):
        days = sorted(today if s == PARTIAL else _number(s) for s in stale.get(view.name, ()) if s != EVERYTHING)
        if view.name.endswith("_profile") and view.name in stale:
            yield _path(view, EVERYTHING), _as(view, _profile(view, inputs))
        elif view.name.endswith("_stats"):
            stats.append((view, set(days)))
        elif days:
            log = ActionLog.of(partials.actions())
            for day in days:
                stem = PARTIAL if day == today else _stem(day)
                yield _path(view, stem), _as(view, _history(log, day, to_us(inputs.snapshot.as_of)))
    yield from _stats(stats, inputs, partials)


def _profile(view: View, inputs: Inputs) -> pa.Table:
    """Rows of users or items; known from the instant that they are valid from."""
    if view.entities == ("user",):
        return inputs.users.append_column("created_timestamp", inputs.users.column("event_timestamp"))
    created = inputs.items.column("created_timestamp")
    table = inputs.items.append_column("event_timestamp", created)
    table = table.append_column(ITEM_CREATED, created.cast(pa.int64()))
    return table.append_column(ITEM_CATEGORY, inputs.categories["category"].to_arrow().cast(pa.string()))


def _stats(wanted: list[tuple[View, set[int]]], inputs: Inputs, partials: Partials) -> Iterator[tuple[str, pa.Table]]:
    """The wanted days of the stats views, block by block of days that follow each other."""
    stats = statistics(inputs.spec.actions, inputs.spec.primary_action)
    log, newest = inputs.snapshot.parts("engagements"), to_us(inputs.snapshot.as_of) // HOUR_US
    for block in _blocks(sorted({d for _, days in wanted for d in days}), log):
        first, last = block[0] * DAY_HOURS, min(block[-1] * DAY_HOURS + DAY_HOURS - 1, newest)
        counts = partials.counts(p for p in log if block[0] - LOOK_BACK_DAYS <= _day_of(p) <= block[-1])
        everyone = of_everyone(counts, stats, first, last)
        by_category = _with_category(counts, inputs) if category_of(inputs.spec) else counts
        for view, days in wanted:
            rows = by_category if "category" in view.keys else counts
            for day, table in daily(rows, view.keys, stats, everyone, first, last):
                if day in days:
                    stem = PARTIAL if day == newest // DAY_HOURS else _stem(day)
                    yield _path(view, stem), _as(view, table)


def _with_category(counts: pl.DataFrame, inputs: Inputs) -> pl.DataFrame:
    """Counts with the item's category; a row is known as one of its category only once the item is."""
    joined = counts.join(inputs.categories, on="item_id", how="left")
    known = pl.max_horizontal(":known", pl.col(":created") // HOUR_US)
    return joined.with_columns(known.alias(":known")).drop(":created")


def _blocks(days: list[int], log: list[Part]) -> Iterator[list[int]]:
    rows: dict[int, int] = {}
    for part in log:
        rows[_day_of(part)] = rows.get(_day_of(part), 0) + part.rows
    block: list[int] = []
    for day in days:
        full = sum(rows.get(d, 0) for d in [*block, day]) > BLOCK_ROWS or len(block) == BLOCK_DAYS
        if block and (full or day != block[-1] + 1):
            yield block
            block = []
        block.append(day)
    if block:
        yield block


def _history(log: ActionLog, day: int, as_of: int) -> pa.Table:
    """The newest actions of each user with one that became known that day, as of its end or of `as_of`."""
    last = log.last_within(day * DAY_US, min((day + 1) * DAY_US, as_of))
    # Feast reads "at or before"; an action may be seen only strictly after it became known.
    visible = pa.array(log.known[last] + 1).cast(TIMESTAMP)
    columns = log.arrays(last)
    return pa.table({"user_id": log.owners(last), "event_timestamp": visible, "created_timestamp": visible, **columns})


def _day_of(part: Part) -> int:
    """Days since 1970; a part holds rows of one day, so all its leaves are of the same one."""
    return part.first // DAY_US


def _stem(day: int) -> str:
    return str(np.datetime64(day, "D"))


def _number(stem: str) -> int:
    return int(np.datetime64(stem, "D").astype(np.int64))


def _as(view: View, table: pa.Table) -> pa.Table:
    wanted = schema(view)
    return table.select(wanted.names).cast(wanted)


def _path(view: View, stem: str) -> str:
    return f"{view.name}/{stem}.parquet"


def _base(spec: TableSpec) -> str:
    return hashlib.sha256(json.dumps([LAYOUT, spec.to_json()], sort_keys=True).encode()).hexdigest()[:16]


def _mark(base: str, leaves: list[Leaf], as_of: int = 0) -> str:
    named = json.dumps([as_of, sorted((leaf.path, leaf.sha256) for leaf in leaves)])
    return f"{base}:{hashlib.sha256(named.encode()).hexdigest()[:32]}"


def _still_true(name: str, mark: str, inputs: Inputs) -> bool:
    """Whether a file of a day that begins after `as_of`, which this build does not ask for, may stay."""
    stem = Path(name).stem
    later = stem not in (PARTIAL, EVERYTHING) and _number(stem) > to_us(inputs.snapshot.as_of) // DAY_US
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
