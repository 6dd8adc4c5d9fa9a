"""The store's table of contents: which part files make up the log.

A part is never changed, and it belongs to the store only once `index.json` names it. Replacing that one file
is therefore the commit of a whole import: a killed import leaves parts that nobody reads and the next import
removes.

Compaction merges small parts into one. The merged part remembers its leaves, the parts as they were imported,
and everything that names data (digests, what is visible when) goes by leaves.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from engagement.errors import EvergreenError
from engagement.files import flush, write_text

Room = Literal["engagements", "items", "users"]
INDEX = "index.json"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Leaf:
    """A part as it was imported: what digests are computed from, whatever file holds its rows today.

    Attributes:
        path: Relative to the store's root, with `/`.
        sha256: Of the file's bytes.
        known_from: As in `Part`.
        added: As in `Part`.
    """

    path: str
    sha256: str
    known_from: int
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One immutable Parquet file of the store.

    Attributes:
        room: The table that it belongs to.
        path: Relative to the store's root, with `/`.
        sha256: Of the file's bytes.
        size: Bytes.
        rows: Number of rows.
        first: Earliest `event_timestamp` (items: `created_timestamp`), microseconds.
        last: The latest.
        known_from: The earliest instant at which one of its rows had become known, microseconds; a snapshot
            with `as_of` at or before it sees nothing of the part.
        sampled: Rows that were drawn rather than logged.
        merged: The leaves that a compaction made it of, in path order; empty for a part that is its own leaf.
        added: Its feature columns that the store's manifest did not name at first.
    """

    room: Room
    path: str
    sha256: str
    size: int
    rows: int
    first: int
    last: int
    known_from: int
    sampled: int = 0
    merged: tuple[Leaf, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """What it was made of, in path order."""
        return self.merged or (Leaf(self.path, self.sha256, self.known_from, self.added),)

    def seen(self, before: int) -> tuple[Leaf, ...]:
        """The leaves that hold a row known before an instant (microseconds): compaction does not change them."""
        return tuple(leaf for leaf in self.leaves if leaf.known_from < before)

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back."""
        plain = asdict(self) | {"merged": [_without_nothing(asdict(leaf)) for leaf in self.merged]}
        return _without_nothing(plain)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Part":
        """The inverse of `to_json`."""
        merged = tuple(Leaf(**{**leaf, "added": tuple(leaf.get("added", ()))}) for leaf in data.get("merged", ()))
        return cls(**{**data, "merged": merged, "added": tuple(data.get("added", ()))})


def _without_nothing(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k not in ("merged", "added") or v}


def load_index(root: Path) -> tuple[Part, ...]:
    """All parts of the store, in path order; none when there is no store yet.

    Raises:
        EvergreenError: The index exists but cannot be read.
    """
    path = root / INDEX
    try:
        return tuple(Part.from_json(p) for p in json.loads(path.read_text())["parts"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvergreenError(
            f"{path} cannot be read ({error})",
            "Delete the data directory of this home and import the dataset again",
        ) from error


def save_index(root: Path, parts: tuple[Part, ...]) -> None:
    """Commit: from here on the store consists of `parts`, also after a power cut: new files reach the disk first."""
    before = {p.path for p in load_index(root)}
    flush([root / p.path for p in parts if p.path not in before])
    ordered = sorted(parts, key=lambda p: p.path)
    write_text(root / INDEX, json.dumps({"version": 1, "parts": [p.to_json() for p in ordered]}, indent=0) + "\n")


def to_us(instant: datetime) -> int:
    """Microseconds since 1970 UTC of an aware instant.

    Raises:
        EvergreenError: The instant has no time zone.
    """
    if instant.tzinfo is None:
        raise EvergreenError(
            f"the instant {instant.isoformat()} has no time zone", "Add one, for example a final Z for UTC"
        )
    return (instant - _EPOCH) // timedelta(microseconds=1)


def from_us(us: int) -> datetime:
    """The aware UTC instant of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=int(us))
