"""Writing parts: the files of a finished import, before the index names them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engagement.contract import ITEM_FIXED, USER_FIXED, Manifest, engagement_schema
from engagement.files import write_part
from engagement.index import INDEX, Leaf, Part, Room
from engagement.profiles import Profiles
from engagement.records import needed
from engagement.snapshot import ORDER
from engagement.spill import DAY_US, TimeSpill
from engagement.validate import to_stored

PART_ROWS = 1_000_000  # a day with more new rows is written as several parts, each a span of the day
ROOMS: tuple[Room, ...] = ("engagements", "items", "users")


def write_days(root: Path, rows: TimeSpill, schema: pa.Schema, progress: Callable[[str, int], None]) -> list[Part]:
    """Write engagement rows into their day's partition, sorted, so that the same rows give the same bytes."""
    parts, written = [], 0
    for day, count in rows.days().items():
        spans = -(-count // PART_ROWS)
        edges = [day * DAY_US + DAY_US * n // spans for n in range(spans + 1)]
        directory = root / "engagements" / f"day={np.datetime64(day, 'D')}"
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            span = rows.between(start, end)
            if not span.height:
                continue
            ordered = span.sort(ORDER)
            parts.append(make_part(root, "engagements", directory, to_stored(ordered, schema)))
            written += span.height
            progress("write", written)
    return parts


def write_profiles(root: Path, room: Room, profiles: Profiles) -> list[Part]:
    """Write new items or users as one part; none where nothing is new."""
    if not profiles.new.height:
        return []
    return [make_part(root, room, root / room, to_stored(profiles.new, profiles.schema))]


def sweep(root: Path, parts: tuple[Part, ...]) -> None:
    """Remove unfinished files, and parts that neither the index nor a recorded snapshot needs."""
    files = [f for room in ROOMS for f in (root / room).rglob("*") if f.name.endswith(".tmp") or f.match("part-*")]
    named = {p.path for p in parts}
    unnamed = {f.relative_to(root).as_posix() for f in files} - named
    if unnamed:  # looking into every record is left for when there is something to remove
        for path in unnamed - needed(root, parts):
            (root / path).unlink()


def make_part(root: Path, room: Room, directory: Path, table: pa.Table, merged: tuple[Leaf, ...] = ()) -> Part:
    """Write a table of at least one row, in the stored columns and order, as a part; the index does not name it yet."""
    path, digest, size = write_part(directory, table)
    log = room == "engagements"
    first = Manifest.load(root) if (root / INDEX).exists() else None
    fixed = engagement_schema(first).names if first and log else (*ITEM_FIXED, *USER_FIXED)
    us = [
        table[n].cast(pa.int64())
        for n in (("event_timestamp", "created_timestamp") if log else table.column_names[1:2])
    ]
    return Part(
        room=room,
        path=path.relative_to(root).as_posix(),
        sha256=digest,
        size=size,
        rows=table.num_rows,
        first=pc.min(us[0]).as_py(),
        last=pc.max(us[0]).as_py(),
        known_from=pc.min(us[-1]).as_py(),
        sampled=pc.sum(table["sampled"]).as_py() if log else 0,
        merged=merged,
        added=tuple(n for n in table.column_names if first and n not in (*fixed, *first.features()[room])),
    )
