"""Writing parts: the files of a finished import, before the index names them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from engagement.files import write_part
from engagement.index import Part, Room
from engagement.profiles import Profiles
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
            parts.append(
                _part(
                    root, "engagements", directory, to_stored(ordered, schema),
                    time=ordered["event_timestamp"], known=ordered["created_timestamp"],
                    sampled=int(ordered["sampled"].sum()),
                )
            )  # fmt: skip
            written += span.height
            progress("write", written)
    return parts


def write_profiles(root: Path, room: Room, profiles: Profiles) -> list[Part]:
    """Write new items or users as one part; none where nothing is new."""
    if not profiles.new.height:
        return []
    time = profiles.new[profiles.schema.names[1]]
    return [_part(root, room, root / room, to_stored(profiles.new, profiles.schema), time=time, known=time)]


def sweep(root: Path, parts: tuple[Part, ...]) -> None:
    """Remove what a killed import left: unfinished files, and parts that the index does not name."""
    named = {p.path for p in parts}
    for room in ROOMS:
        for path in (root / room).rglob("*"):
            leftover = path.name.endswith(".tmp") or path.name.startswith("part-")
            if leftover and path.relative_to(root).as_posix() not in named:
                path.unlink()


def _part(
    root: Path, room: Room, directory: Path, table: pa.Table, time: pl.Series, known: pl.Series, sampled: int = 0
) -> Part:
    path, digest, size = write_part(directory, table)
    us, known_us = time.dt.timestamp("us").to_numpy(), known.dt.timestamp("us").to_numpy()
    return Part(
        room=room,
        path=path.relative_to(root).as_posix(),
        sha256=digest,
        size=size,
        rows=table.num_rows,
        first=int(us.min()),
        last=int(us.max()),
        known_from=int(known_us.min()),
        sampled=sampled,
    )
