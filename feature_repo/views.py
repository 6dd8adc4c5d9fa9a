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
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engagement.contract import TIMESTAMP
from engagement.files import write_text
from engagement.index import Part, from_us, to_us
from engagement.snapshot import Snapshot
from engagement.table import TableSpec
from feature_repo.aggregates import LOOK_BACK, snapshots
from feature_repo.encode import DAY_US
from feature_repo.features import View, declare, sized, statistics, views
from feature_repo.history import ActionLog

LAYOUT = 1  # raise it when the meaning of a file changes: every home then rebuilds its views
DAY = timedelta(days=1)
BLOCK_DAYS = 64  # midnights computed at a time; bounds the memory of a backfill
_ARROW = {
    "string": pa.string(),
    "strings": pa.list_(pa.string()),
    "float": pa.float64(),
    "floats": pa.list_(pa.float32()),
    "int": pa.int64(),
    "ints": pa.list_(pa.int64()),
}


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


def schema(view: View) -> pa.Schema:
    """Columns of a view's Parquet files."""
    times = [("event_timestamp", TIMESTAMP), ("created_timestamp", TIMESTAMP)]
    return pa.schema([(view.key, pa.string()), *times, *((n, _ARROW[t]) for n, t in view.columns)])


def build_views(root: Path, inputs: Inputs) -> int:
    """Bring the files under `root` up to the snapshot; returns how many were written."""
    state_file = root / "state.json"
    known = _read_state(state_file)
    wanted = _wanted(inputs)
    stale = [n for n, mark in wanted.items() if known.get(n) != mark or not (root / n).exists()]
    for name, table in _compute(inputs, stale):
        _write(root / name, table)
    _remove_strangers(root, wanted, known, to_us(inputs.snapshot.as_of))
    kept = {n: m for n, m in known.items() if (root / n).exists()}
    if {**kept, **wanted} != known:
        write_text(state_file, json.dumps({**kept, **wanted}, indent=0, sort_keys=True))
    return len(stale)


def as_polars(table: pa.Table) -> pl.DataFrame:
    """An Arrow table as a polars frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _wanted(inputs: Inputs) -> dict[str, str]:
    """Every file that the views consist of at the snapshot's `as_of`, with its fingerprint."""
    snapshot, spec = inputs.snapshot, inputs.spec
    base = hashlib.sha256(json.dumps([LAYOUT, spec.to_json()], sort_keys=True).encode()).hexdigest()
    as_of, parts = to_us(snapshot.as_of), snapshot.parts("engagements")
    wanted: dict[str, str] = {}
    for view in views(spec):
        if view.name.endswith("_profile"):
            of = snapshot.parts("items" if view.entity == "item" else "users")
            wanted[_path(view, "all")] = _mark(base, of, as_of)
    names = {v.name: v for v in views(spec)}
    for midnight in _midnights(parts, as_of):
        low = midnight - LOOK_BACK // timedelta(microseconds=1)
        read = [p for p in parts if p.known_from < midnight and p.first < midnight and p.last >= low]
        for view in (names["user_stats"], names["item_stats"]):
            wanted[_path(view, _date(midnight))] = _mark(base, read)
        told = [p for p in parts if p.known_from < midnight]
        wanted[_path(names["user_history"], _date(midnight - DAY_US))] = _mark(base, told)
    wanted[_path(names["user_history"], "partial")] = _mark(base, parts, as_of)
    return wanted


def _midnights(parts: list[Part], as_of: int) -> range:
    """The midnights that have a snapshot: after the first row, up to `as_of`; microseconds."""
    if not parts:
        return range(0)
    first = (min(p.first for p in parts) // DAY_US + 1) * DAY_US
    return range(first, as_of + 1, DAY_US)


def _compute(inputs: Inputs, names: list[str]) -> Iterator[tuple[str, pa.Table]]:
    by_view: dict[str, list[str]] = {}
    for name in names:
        by_view.setdefault(Path(name).parent.name, []).append(Path(name).stem)
    for view in views(inputs.spec):
        stems = by_view.get(view.name, [])
        if not stems:
            continue
        if view.name.endswith("_profile"):
            tables: Iterator[tuple[str, pa.Table]] = iter([("all", _profile(view, inputs))])
        elif view.name.endswith("_stats"):
            tables = _stats(view, inputs, sorted(stems))
        else:
            tables = _history(inputs, stems)
        for stem, table in tables:
            yield _path(view, stem), _as(view, table)


def _profile(view: View, inputs: Inputs) -> pa.Table:
    """Rows of users or items; known from the instant that they are valid from."""
    table = inputs.items if view.entity == "item" else inputs.users
    since = "created_timestamp" if view.entity == "item" else "event_timestamp"
    table = table.append_column("event_timestamp", table.column(since)) if view.entity == "item" else table
    if view.entity == "user":
        return table.append_column("created_timestamp", table.column(since))
    # A later version of an item does not make it young again.
    first = as_polars(table.select(["item_id", since])).select(pl.col(since).min().over("item_id"))
    return table.append_column("created_us", first[since].dt.timestamp("us").to_arrow())


def _stats(view: View, inputs: Inputs, stems: list[str]) -> Iterator[tuple[str, pa.Table]]:
    wanted = [datetime.fromisoformat(f"{s}T00:00:00+00:00") for s in stems]
    stats = statistics(inputs.spec.actions, inputs.spec.primary_action)
    empty = schema(view).empty_table()
    while wanted:
        block = [d for d in wanted[:BLOCK_DAYS] if d - wanted[0] < BLOCK_DAYS * DAY]
        shown = pl.col("event_timestamp").is_between(block[0] - LOOK_BACK, block[-1], closed="left")
        found = snapshots(inputs.log.filter(shown), view.key, stats, block[0], block[-1])
        for day in block:
            yield f"{day:%Y-%m-%d}", found[day].to_arrow() if day in found else empty
        wanted = wanted[len(block) :]


def _history(inputs: Inputs, stems: list[str]) -> Iterator[tuple[str, pa.Table]]:
    log, as_of = inputs.actions, to_us(inputs.snapshot.as_of)
    for stem in stems:
        low = as_of // DAY_US * DAY_US if stem == "partial" else to_us(datetime.fromisoformat(f"{stem}T00:00:00+00:00"))
        last = log.last_within(low, min(low + DAY_US, as_of))
        time, actions, item = log.arrays(last)
        owner = np_owner(log, last)
        # Feast reads "at or before"; an action may be seen strictly after it became known.
        visible = pa.array(log.known[last] + 1).cast(TIMESTAMP)
        columns = {"time": time, "actions": actions, "item": item}
        yield stem, pa.table(
            {"user_id": owner, "event_timestamp": visible, "created_timestamp": visible, **columns}
        )
