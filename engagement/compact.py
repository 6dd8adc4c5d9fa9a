"""Keeping the store small: many small parts of a day become one, old days leave, files that nobody names go."""

from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path

from engagement import parts as writing
from engagement.contract import Manifest, engagement_schema
from engagement.files import read_part
from engagement.index import Part, load_index, save_index
from engagement.parts import make_part, sweep
from engagement.reading import frame
from engagement.report import CompactReport
from engagement.snapshot import ORDER, seen_manifest, together
from engagement.spill import DAY_US
from engagement.validate import to_stored

MANY_PARTS = 8
"""An import ends with a compaction of the days that have more (`>`) parts than this."""


def compact(root: Path, more_than: int = 1) -> CompactReport:
    """Merge the parts of each day that has more than `more_than`, up to `PART_ROWS` rows a part.

    The rows, the digests and what is visible at any instant stay as they were. Replacing the index commits all days
    at once: killed before it, the store is as it was, and the next import removes what was written.
    """
    index = load_index(root)
    groups = [g for day in _days(index) if len(day) > more_than for g in _groups(day)]
    merged = [_merge(root, group) for group in groups]
    gone = {p.path for group in groups for p in group}
    after = (*(p for p in index if p.path not in gone), *merged)
    if merged:
        save_index(root, after)
        sweep(root, after)
    return CompactReport(
        days=len({Path(p.path).parent for p in merged}), merged=len(gone), parts=_count(index), parts_left=_count(after)
    )


def retain(root: Path, days: int, now: datetime) -> CompactReport:
    """Keep the newest `days` days of the log (UTC days, the day of the newest engagement included).

    A recorded snapshot keeps the files that it needs on disk, so that its run can be repeated, for `days` days after
    it was last recorded; then its record is dropped. Files that neither the index nor a record needs are removed.
    """
    index = load_index(root)
    log = [p for p in index if p.room == "engagements"]
    edge = (max((p.last for p in log), default=0) // DAY_US - days + 1) * DAY_US
    old = {p.path for p in log if p.last < edge}
    sweep(root, index)  # brings the records up to earlier compactions while the index still tells of them
    kept = tuple(p for p in index if p.path not in old)
    if old:
        save_index(root, kept)
    dropped, bound = 0, (now - timedelta(days=days)).timestamp()
    for record in (root / "snapshots").glob("*.json"):
        if record.stat().st_mtime < bound:
            record.unlink()
            dropped += 1
    sweep(root, kept)
    left = {Path(p).parent for p in old}
    return CompactReport(parts=len(log), parts_left=_count(kept), days_left_out=len(left), snapshots_dropped=dropped)


def _count(index: tuple[Part, ...]) -> int:
    return sum(p.room == "engagements" for p in index)


def _days(index: tuple[Part, ...]) -> list[list[Part]]:
    log = sorted((p for p in index if p.room == "engagements"), key=lambda p: (p.first, p.path))
    return [list(parts) for _, parts in groupby(log, key=lambda p: p.first // DAY_US)]


def _groups(day: list[Part]) -> list[list[Part]]:
    """Neighbours in time that fit into one part; those that would stay alone are left out."""
    groups: list[list[Part]] = [[]]
    for part in day:
        if groups[-1] and sum(p.rows for p in groups[-1]) + part.rows > writing.PART_ROWS:
            groups.append([])
        groups[-1].append(part)
    return [g for g in groups if len(g) > 1]


def _merge(root: Path, group: list[Part]) -> Part:
    schema = engagement_schema(seen_manifest(Manifest.load(root), group))
    rows = together([frame(read_part(root / p.path)) for p in group], schema).sort(ORDER)
    return make_part(
        root,
        "engagements",
        (root / group[0].path).parent,
        to_stored(rows, schema),
        merged=tuple(sorted((leaf for p in group for leaf in p.leaves), key=lambda leaf: leaf.path)),
    )
