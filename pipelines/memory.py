"""What the laptop's scheduler remembers: the last instant of each entry, and what came of it."""

from datetime import datetime
from typing import Any

from evergreen.settings import Settings
from serving.files import read_json, write_json

TOLD = ("last", "line", "ended", "missed", "failed")


class Memory:
    """One JSON file, replaced as a whole; a lost or damaged one is an empty one.

    Args:
        settings: The home.
    """

    def __init__(self, settings: Settings) -> None:
        self._path = settings.pipeline_root / "schedule.json"

    def last(self, entry: str) -> datetime | None:
        """The newest instant that an entry ran for, aware; None if nothing is known."""
        try:
            last = datetime.fromisoformat(self._read(entry)["last"])
        except (KeyError, TypeError, ValueError):
            return None
        return last if last.tzinfo else None

    def told(self, entry: str) -> dict[str, Any]:
        """What a person is told of an entry.

        Returns:
            `last`: the newest instant it ran for. `line`, `ended`: what came of its newest try, and when. `missed`:
            instants before it for which it stood. `failed`: the instant of the newest try, if that failed.
        """
        known = self._read(entry)
        return {name: known.get(name) for name in TOLD}

    def ran(self, entry: str, instant: datetime, line: str, now: datetime, missed: int) -> None:
        """An entry's run for an instant ended well."""
        said = {"last": instant.isoformat(), "line": line, "ended": now.isoformat(), "missed": missed, "failed": None}
        self._write(entry, said)

    def failed(self, entry: str, instant: datetime, line: str, now: datetime) -> None:
        """An entry's run for an instant failed: it is still due."""
        self._write(entry, {"line": line, "ended": now.isoformat(), "failed": instant.isoformat()})

    def _read(self, entry: str) -> dict[str, Any]:
        found = read_json(self._path)
        known = found.get(entry) if isinstance(found, dict) else None
        return known if isinstance(known, dict) else {}

    def _write(self, entry: str, said: dict[str, Any]) -> None:
        found = read_json(self._path)
        whole = found if isinstance(found, dict) else {}
        write_json(self._path, {**whole, entry: {**self._read(entry), **said}})
