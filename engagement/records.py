"""Recorded snapshots: `snapshots/<digest>.json`, what a run has read, so that it can be repeated.

A record lists files. Where a compaction has merged some of them since, the record is read through the parts that hold
the same leaves now. A file that no part of the index can stand in for stays on disk as long as a record names it.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.index import Part, load_index, to_us

FORGOTTEN = "forgotten"  # key of a record whose data had to go: the marks of the users (see `forget`)


@dataclass(frozen=True)
class Record:
    """One recorded snapshot.

    Attributes:
        path: Its file.
        digest: Names it.
        as_of: The instant whose knowledge it is limited to.
        manifest: What the data was, in JSON.
        parts: The files that it listed when it was recorded; none where it is `forgotten`.
        forgotten: Marks of the users whose data it held and who were forgotten since; None for a whole record.
    """

    path: Path
    digest: str
    as_of: datetime
    manifest: dict[str, Any]
    parts: tuple[Part, ...]
    forgotten: tuple[str, ...] | None = None

    @classmethod
    def load(cls, root: Path, digest: str) -> "Record":
        """Read a record.

        Raises:
            EvergreenError: There is none, or it is damaged.
        """
        path = Path(root) / "snapshots" / f"{digest}.json"
        try:
            data = json.loads(path.read_text())
            forgotten = tuple(data[FORGOTTEN]) if FORGOTTEN in data else None
            parts = tuple(Part.from_json(p) for p in data.get("files", ()))
            return cls(path, data["digest"], datetime.fromisoformat(data["as_of"]), data["manifest"], parts, forgotten)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvergreenError(f"no readable snapshot {path} ({error})", "Run the retrain again") from error

    def save(self) -> None:
        """Write it; again changes nothing but the time at which it was last asked for."""
        data: dict[str, Any] = {"as_of": self.as_of.isoformat(), "digest": self.digest, "manifest": self.manifest}
        data |= {"files": [p.to_json() for p in self.parts]} if self.forgotten is None else {FORGOTTEN: self.forgotten}
        write_text(self.path, json.dumps(data, indent=1) + "\n")

    def files(self, root: Path) -> tuple[Part, ...]:
        """The files to read it from today: those that it lists, or, where one is gone, those that stand in."""
        return present(root, self.parts, to_us(self.as_of))


def records(root: Path) -> list[Record]:
    """All readable records; a damaged one names nothing."""
    found = []
    for path in sorted((root / "snapshots").glob("*.json")):
        try:
            found.append(Record.load(root, path.stem))
        except EvergreenError:
            continue
    return found


def resolve(parts: Iterable[Part], index: tuple[Part, ...], before: int) -> tuple[Part, ...]:
    """The fewest files of the index, and listed ones besides, that hold the same leaves.

    A part of the index stands in only if all that it shows before the instant is among the leaves listed: a late
    row that was imported after the record was made stays out of it.

    Args:
        parts: The files as they were listed.
        index: What makes up the store now.
        before: The instant of the snapshot, microseconds.
    """
    parts = tuple(parts)
    wanted = {leaf for p in parts for leaf in p.seen(before)}
    held = [p for p in index if p.seen(before) and wanted.issuperset(p.seen(before))]
    covered = {leaf for p in held for leaf in p.seen(before)}
    chosen = (*held, *(p for p in parts if not covered.issuperset(p.seen(before))))
    each_once = sum(len(p.seen(before)) for p in chosen) == len(wanted)
    return tuple(sorted(chosen, key=lambda p: p.path)) if each_once else parts


def present(root: Path, parts: tuple[Part, ...], before: int) -> tuple[Part, ...]:
    """The listed parts if their files are there, else those that hold the same leaves now."""
    if all((root / p.path).exists() for p in parts):
        return parts
    return resolve(parts, load_index(root), before)


def needed(root: Path, index: tuple[Part, ...]) -> set[str]:
    """Paths that the recorded snapshots have to be read from, in the index or not.

    A record that lists merged files is first written anew with those that hold the same leaves, so that the
    merged ones are free to go and the record stays whole when later the new ones leave the index.
    """
    paths: set[str] = set()
    for record in records(root):
        files = resolve(record.parts, index, to_us(record.as_of))
        if files != record.parts:
            asked = record.path.stat().st_mtime
            replace(record, parts=files).save()
            os.utime(record.path, (asked, asked))
        paths |= {p.path for p in files}
    return paths
