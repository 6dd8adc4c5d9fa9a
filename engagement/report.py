"""What an import tells the person who asked for it."""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ImportReport:
    """What an import did; `read` = `imported` + `already_present` + `merged` + the sum of `quarantined`.

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
        notes: The importer's remarks.
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

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        plain = {"first": self.first and self.first.isoformat(), "last": self.last and self.last.isoformat()}
        return (
            asdict(self) | plain | {"quarantine": self.quarantine and str(self.quarantine), "notes": list(self.notes)}
        )
