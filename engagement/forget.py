"""Forgetting a user: every row out of every file, and a mark that keeps later imports from bringing them back.

The order makes it safe to kill and to repeat:

    1. the tombstone: from here on no import stores a row of the user
    2. new parts without the user, which the index does not name yet
    3. the records of snapshots that read the old parts are marked: their runs must be planned anew
    4. the index: from here on the store is without the user
    5. the old parts and the quarantine's rows leave the disk

Killed before 4, the store is as it was, and the same call again does all; killed after it, the call removes what is
left. A tombstone is SHA-256 of a random salt of the store and the user's id, never the id.
"""

import hashlib
import json
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from engagement.check import CORRUPT
from engagement.errors import EvergreenError
from engagement.files import read_part, write_part, write_text
from engagement.index import Part, Room, load_index, save_index, to_us
from engagement.parts import make_part, sweep
from engagement.reading import delivered, frame, reading
from engagement.records import Record, records
from engagement.report import ForgetReport

TOMBSTONES = "forgotten.json"
_ROOMS: tuple[Room, ...] = ("engagements", "users")


@dataclass(frozen=True)
class Tombstones:
    """The users whom a store has forgotten."""

    salt: str
    users: frozenset[str]

    @classmethod
    def load(cls, root: Path) -> "Tombstones":
        """Those of a store; a fresh salt and nobody where none was ever needed.

        Raises:
            EvergreenError: They are there but cannot be read; an import might bring a user back.
        """
        path = root / TOMBSTONES
        try:
            data = json.loads(path.read_text())
            return cls(data["salt"], frozenset(data["users"]))
        except FileNotFoundError:
            return cls(secrets.token_hex(16), frozenset())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvergreenError(
                f"{path} cannot be read ({error}), so forgotten users could come back",
                "Restore it from a backup, or delete it and forget those users again after the import",
            ) from error

    def mark(self, user_id: str) -> str:
        """What stands for a user's id."""
        return hashlib.sha256(f"{self.salt}{user_id}".encode()).hexdigest()

    def add(self, root: Path, user_id: str) -> None:
        """Write the user's tombstone."""
        users = sorted(self.users | {self.mark(user_id)})
        write_text(root / TOMBSTONES, json.dumps({"salt": self.salt, "users": users}, indent=0) + "\n")

    def of(self, users: pl.Series) -> pl.Series:
        """Which of these ids (text) are of forgotten users."""
        known = users.drop_nulls().unique() if self.users else users.clear()
        return users.is_in([u for u in known if self.mark(u) in self.users]).fill_null(value=False)

    def delivered(self, table: pa.Table) -> pl.Series:
        """Which rows of a delivery, in whatever type it has the ids, are of forgotten users."""
        if not self.users or "user_id" not in table.column_names:
            return pl.repeat(value=False, n=table.num_rows, dtype=pl.Boolean, eager=True)
        return self.of(reading(delivered("user_id", table.column("user_id")), pa.string()))

    def quarantined(self, bad: pl.DataFrame) -> pl.Series:
        """Which rows of the quarantine, in the columns of `validate.BAD`, are of forgotten users."""
        return self.of(quarantined_user(bad["row"]))


def quarantined_user(rows: pl.Series) -> pl.Series:
    """The user's id in rows of the quarantine as text; null where they have none. A number 7.0 reads as "7"."""
    return rows.str.json_path_match("$.user_id").str.replace(r"^(\d+)\.0$", "$1")


@dataclass(frozen=True)
class _Held:
    """What one file holds of the user: rows, the earliest instant at which one was known, their times."""

    rows: int
    known_from: int
    times: tuple[int, ...]


def forget(root: Path, user_id: str) -> ForgetReport:
    """Remove a user from a store whose lock is held; see the module's text for the order.

    Raises:
        EvergreenError: A part of the index is missing or corrupt: whether it holds the user cannot be known.
    """
    index, tombstones = load_index(root), Tombstones.load(root)
    held, unreadable = _search(root, index, user_id)
    quarantined = _search_quarantine(root, user_id)
    mark = tombstones.mark(user_id)
    known = bool(held or unreadable or quarantined) or mark in tombstones.users
    if not known:
        return ForgetReport(known=False, rows={}, files=0, snapshots=())
    if mark not in tombstones.users:
        tombstones.add(root, user_id)
    shutil.rmtree(root / ".tmp", ignore_errors=True)  # what a killed import had read
    after = tuple(new for p in index if (new := _without(root, p, user_id) if p.path in held else p))
    for record in records(root):
        _mark_record(root, record, held, mark)
    if after != index:
        save_index(root, after)
    for path in (*held, *unreadable):
        (root / path).unlink()
    for file in quarantined:
        _clean_quarantine(root, file, user_id)
    sweep(root, after)
    log = {p.path: p.room for p in index if p.path in held}
    rows = {room: sum(held[p].rows for p, r in log.items() if r == room) for room in _ROOMS}
    told = [r for r in records(root) if r.forgotten and mark in r.forgotten]
    return ForgetReport(
        known=True,
        rows=rows | {"quarantine": sum(quarantined.values())},
        files=len(held) + len(unreadable) + len(quarantined),
        snapshots=tuple((r.digest, r.as_of.isoformat()) for r in sorted(told, key=lambda r: (r.as_of, r.digest))),
        times=tuple(sorted({t for h in held.values() for t in h.times})),
    )


def _search(root: Path, index: tuple[Part, ...], user_id: str) -> tuple[dict[str, _Held], list[str]]:
    """Parts on disk that hold the user, also those that only records name; and files that nobody can search.

    The latter are damaged ones in the quarantine and damaged parts outside the index: they must go unread.
    """
    held: dict[str, _Held] = {}
    unreadable = [p.relative_to(root).as_posix() for p in (root / "quarantine").glob(f"{CORRUPT}*")]
    named = {p.path for p in index}
    on_disk = {f.relative_to(root).as_posix() for room in _ROOMS for f in (root / room).rglob("part-*.parquet")}
    for path in sorted(on_disk | {p.path for p in index if p.room in _ROOMS}):
        try:
            users = read_part(root / path, ["user_id"]).column("user_id")
            if not pc.any(pc.equal(users, user_id)).as_py():
                continue
            table = read_part(root / path)
        except EvergreenError:
            if path in named:
                raise
            unreadable.append(path)
            continue
        rows = table.filter(pc.equal(table["user_id"], user_id))
        log = "created_timestamp" in rows.column_names
        known = pc.min(rows["created_timestamp" if log else "event_timestamp"].cast(pa.int64())).as_py()
        times = rows["event_timestamp"].cast(pa.int64()).to_pylist() if log else []
        held[path] = _Held(rows.num_rows, known, tuple(times))
    return held, unreadable


def _without(root: Path, part: Part, user_id: str) -> Part | None:
    table = read_part(root / part.path)
    rest = table.filter(pc.not_equal(table["user_id"], user_id))
    return make_part(root, part.room, (root / part.path).parent, rest) if rest.num_rows else None


def _mark_record(root: Path, record: Record, held: dict[str, _Held], mark: str) -> None:
    files = [held[p.path] for p in record.files(root) if p.path in held]
    if files:
        shown = any(h.known_from < to_us(record.as_of) for h in files)
        replace(record, parts=(), forgotten=(mark,) if shown else ()).save()


def _search_quarantine(root: Path, user_id: str) -> dict[Path, int]:
    """Rows of the user by quarantine file."""
    found: dict[Path, int] = {}
    for path in sorted((root / "quarantine").glob("*.parquet")):
        if not path.name.startswith(CORRUPT):
            rows = int(_of_user(frame(read_part(path, ["row"])), user_id).sum())
            found |= {path: rows} if rows else {}
    return found


def _clean_quarantine(root: Path, path: Path, user_id: str) -> None:
    table = read_part(path)
    rest = table.filter((~_of_user(frame(table), user_id)).to_arrow())
    if rest.num_rows:
        write_part(root / "quarantine", rest, stem="")
    path.unlink()


def _of_user(bad: pl.DataFrame, user_id: str) -> pl.Series:
    """Which rows of the quarantine are the user's; an id that was delivered as bytes is shown there in hex."""
    return quarantined_user(bad["row"]).is_in([user_id, user_id.encode().hex()]).fill_null(value=False)
