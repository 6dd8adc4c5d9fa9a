"""What an import tells the person who asked for it."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ImportReport:
    """What an import did; `read` = `imported` + `already_present` + `merged` + `forgotten` + all `quarantined`.

    Attributes:
        read: Engagement rows delivered.
        imported: Rows that the store did not hold before, sampled ones not counted.
        already_present: Rows that it held.
        merged: Rows that the importer made part of another row.
        quarantined: Engagement rows by the reason for which they could not be used.
        quarantined_items: The same for items.
        quarantined_users: The same for users.
        requests: Distinct requests among the usable rows, new or present.
        users: Distinct users among them.
        items: Items delivered and usable, new or present.
        sampled: Candidates drawn by this import.
        first: Earliest `event_timestamp` of the usable rows; None without any.
        last: Latest.
        quarantine: The file with the quarantined rows.
        notes: Remarks of the importer and of the store.
        forgotten: Engagement rows of users who were forgotten; they are stored nowhere.
        unreadable: Files that could not be read, and were left out, with the reason.
    """

    read: int
    imported: int
    already_present: int
    merged: int
    quarantined: dict[str, int]
    quarantined_items: dict[str, int]
    quarantined_users: dict[str, int]
    requests: int
    users: int
    items: int
    sampled: int
    first: datetime | None
    last: datetime | None
    quarantine: Path | None = None
    notes: tuple[str, ...] = ()
    forgotten: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        plain = {"first": self.first and self.first.isoformat(), "last": self.last and self.last.isoformat()}
        return (
            asdict(self) | plain | {"quarantine": self.quarantine and str(self.quarantine), "notes": list(self.notes)}
        )


@dataclass(frozen=True)
class CompactReport:
    """What a compaction or a retention did, in parts of the engagement log.

    Attributes:
        days: Days of which parts were merged.
        merged: Parts that were merged.
        parts: Parts before.
        parts_left: Parts after.
        days_left_out: Days that left the store.
        snapshots_dropped: Records of snapshots that were dropped: their runs cannot be repeated any more.
    """

    days: int = 0
    merged: int = 0
    parts: int = 0
    parts_left: int = 0
    days_left_out: int = 0
    snapshots_dropped: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Damage:
    """A part that was taken out of the store.

    Attributes:
        path: Where it was, relative to the store's root.
        reason: What is wrong with it.
        rows: Rows that the store has lost with it.
        kept: Where the damaged file lies now; None for a missing one.
    """

    path: str
    reason: str
    rows: int
    kept: str | None


@dataclass(frozen=True)
class CheckReport:
    """What a check found: `parts` files of `bytes` in all, and the `damaged` ones among them."""

    parts: int
    bytes: int
    damaged: tuple[Damage, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class ForgetReport:
    """What forgetting a user removed from the store.

    Attributes:
        known: Whether the store held the user, now or before an earlier call.
        rows: Rows removed from the log, from `users` and from the quarantine, by table.
        files: Files that were rewritten or removed.
        snapshots: (digest, as_of) of the recorded snapshots that showed a row of the user, in order of `as_of`; an
            earlier call's are told again.
        times: Instants (microseconds, sorted) of the user's engagements, so that the caller can say which models
            were trained on them; not part of the JSON form.
    """

    known: bool
    rows: dict[str, int]
    files: int
    snapshots: tuple[tuple[str, str], ...]
    times: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        told = [{"digest": digest, "as_of": as_of} for digest, as_of in self.snapshots]
        return {"known": self.known, "rows": self.rows, "files": self.files, "snapshots": told}
