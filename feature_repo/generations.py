"""Generations of the online store: what is served now, and how a reader notices that it changed.

    online/<generation>/version.json   the declaration and the instant that its rows stand for
    online/<generation>/online.db      its rows, on a laptop; Redis has them under `evergreen:<generation>:`
    online/current                     link to the generation that is served

A directory without `version.json` is what a killed materialisation left; the next one removes it. A generation holds a
row of its own, the stamp, with the instant that it stands for: read together with other rows, it tells whether they are
of the state that the reader thinks, and whether they are there at all.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.index import to_us
from engagement.table import TableSpec
from feature_repo.features import views
from feature_repo.online_rows import OnlineRows, RedisRows, SQLiteRows
from feature_repo.packed import Codec, instants

CURRENT = "online/current"
STAMP: tuple[str, list[bytes]] = ("_generation", [b"as_of"])
_REMEDY = "Run evergreen retrain"


@dataclass(frozen=True)
class Generation:
    """One filled online store.

    Attributes:
        directory: Its directory.
        spec: The declaration.
        as_of: The instant whose knowledge it holds.
        reaching: `as_of`, or the later instant to which an update had begun when this was written.
        snapshot: Digest of the snapshot.
        files: What the snapshot read: leaves of the log, path by path with their digest.
        store: Digest of the address of the store that holds the rows.
    """

    directory: Path
    spec: TableSpec
    as_of: datetime
    reaching: datetime
    snapshot: str
    files: dict[str, str]
    store: str

    def save(self) -> None:
        """Write `version.json` in one step; with it, the directory is a generation."""
        recorded = {
            "generation": self.directory.name,
            "as_of": self.as_of.isoformat(),
            "reaching": self.reaching.isoformat(),
            "snapshot": self.snapshot,
            "layout": layout(self.spec),
            "store": self.store,
            "spec": self.spec.to_json(),
            "files": self.files,
        }
        write_text(self.directory / "version.json", json.dumps(recorded, indent=1))

    @classmethod
    def load(cls, directory: Path) -> "Generation":
        """Read `version.json`.

        Raises:
            EvergreenError: It is missing or damaged, or another version of Evergreen packed the rows.
        """
        try:
            recorded = json.loads((directory / "version.json").read_text())
            spec = TableSpec.from_json(recorded["spec"])
            as_of, reaching = (datetime.fromisoformat(recorded[n]) for n in ("as_of", "reaching"))
            found = cls(directory, spec, as_of, reaching, recorded["snapshot"], recorded["files"], recorded["store"])
            same = recorded["layout"] == layout(spec)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvergreenError(f"the online features in {directory} are damaged ({error!r})", _REMEDY) from error
        if not same:
            raise EvergreenError(f"the online features in {directory} are of another version of Evergreen", _REMEDY)
        return found

    def rows(self, url: str, patience: float | None = None) -> OnlineRows:
        """Its rows.

        Args:
            url: Address of the Redis that holds them; empty for SQLite.
            patience: Seconds to wait for the store; None: as long as suits whoever writes.

        Raises:
            EvergreenError: They are in another store than `url` names, or are gone.
        """
        if self.store != store_mark(url):
            raise EvergreenError(f"the features in {self.directory} were materialised into another store", _REMEDY)
        found = open_rows(self.directory, url, patience)
        check_stamp(found.get([STAMP])[0], self.directory)
        return found


def store_mark(url: str) -> str:
    """Digest of a store's address, which may hold a password."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def layout(spec: TableSpec) -> str:
    """Digest of how the rows of a declaration are packed."""
    return hashlib.sha256("".join(Codec(v).mark for v in views(spec)).encode()).hexdigest()[:16]


def open_rows(directory: Path, url: str, patience: float | None = None) -> OnlineRows:
    """The rows that belong to a directory: in SQLite there, or in the Redis at `url`."""
    if url:
        return RedisRows(url, f"evergreen:{directory.name}", patience)
    return SQLiteRows(directory / "online.db", patience)


def stamp(rows: OnlineRows, as_of: datetime) -> None:
    """Record which instant the rows stand for, after they are all there."""
    view, keys = STAMP
    rows.put(view, keys, [struct.pack("<qq", to_us(as_of), to_us(as_of))])


def check_stamp(found: Sequence[bytes | None], directory: Path) -> int:
    """The instant that the rows stand for, microseconds.

    Raises:
        EvergreenError: The store has lost them.
    """
    if found[0] is None:
        raise EvergreenError(f"the online store has lost the rows of {directory.name}", _REMEDY)
    return instants([found[0]])[0][0]


def served(root: Path) -> Path:
    """The directory of the generation that is served.

    Raises:
        EvergreenError: There is none yet.
    """
    try:
        return root / "online" / (root / CURRENT).readlink()
    except OSError as error:
        raise EvergreenError(f"no features were materialised in {root}", "Run evergreen retrain first") from error


def serve(directory: Path) -> None:
    """Point `online/current` at a generation."""
    link = directory.with_name(".current.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    link.replace(directory.parent / "current")


def fresh_directory(root: Path, as_of: datetime) -> Path:
    """An empty directory for a new generation, of a name that was never used before."""
    directory = root / "online" / f"{as_of:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    directory.mkdir(parents=True)
    return directory


def directories(root: Path) -> list[Path]:
    """Every generation, finished or not."""
    return [d for d in sorted((root / "online").glob("*")) if d.is_dir() and not d.is_symlink()]


def remove(directory: Path, url: str) -> None:
    """Remove a generation and its rows."""
    if url:
        open_rows(directory, url).clear()
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def settled(online: Path, exclusive: bool = False) -> Iterator[None]:
    """Hold `online/current` where it is.

    Whoever writes into the served generation shares the lock; whoever moves the link takes it alone, so that no write
    goes into a generation that was left.
    """
    online.mkdir(parents=True, exist_ok=True)
    with (online / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
