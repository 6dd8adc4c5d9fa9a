"""Past checks, read from their directories: quickly with a year of them, and passing over what is damaged."""

import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from monitoring.verdict import DriftVerdict

BACK = timedelta(days=30)
"""Earlier checks of a model are looked for so far back (**≤**): what drifted longer ago confirms nothing."""

STAMP = "%Y%m%dT%H%M%S"  # the name of a check's directory: its instant in UTC
NAME = re.compile(r"\d{8}T\d{6}")
_log = logging.getLogger("evergreen.monitoring")


def stamp(instant: datetime) -> str:
    """The name of the directory of a check: its instant in UTC, to the second."""
    return f"{instant.astimezone(UTC):{STAMP}}"


def recent(checks: Path, model: str, before: datetime, n: int) -> list[DriftVerdict]:
    """The last checks of a model before an instant, newest first.

    Args:
        checks: Directory of the checks.
        model: The model's version.
        before: Aware; a check at this very instant is not among them.
        n: At most so many.
    """
    mark = f'"model_version": "{model}"'.encode()  # most files of other models need no parsing
    found: list[DriftVerdict] = []
    for name in reversed(_between(checks, before - BACK, before)):
        verdict = _read(checks / name, mark)
        if verdict and verdict.model_version == model:
            found.append(verdict)
        if len(found) == n:
            break
    return found


def newest(checks: Path, until: datetime) -> DriftVerdict | None:
    """The newest check up to an instant, of whatever model; None without one.

    Args:
        checks: Directory of the checks.
        until: Aware; a check at this very instant may be the one.
    """
    names = _between(checks, datetime.min.replace(tzinfo=UTC), until + timedelta(seconds=1))
    return next((verdict for name in reversed(names) if (verdict := _read(checks / name))), None)


def verdicts(checks: Path, since: datetime) -> list[DriftVerdict]:
    """Every check from an instant on, oldest first.

    Args:
        checks: Directory of the checks.
        since: Aware; a check at this very instant is among them.
    """
    names = _between(checks, since, datetime.max.replace(tzinfo=UTC))
    return [verdict for name in names if (verdict := _read(checks / name))]


def _between(checks: Path, start: datetime, end: datetime) -> list[str]:
    """Names of the checks in [start, end), oldest first; names are instants in UTC and sort like them."""
    try:
        names = [path.name for path in checks.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    low, high = (stamp(instant) for instant in (start, end))
    return sorted(name for name in names if low <= name < high and NAME.fullmatch(name))


def _read(check: Path, mark: bytes = b"") -> DriftVerdict | None:
    """One check; None where it is not finished, damaged (told in one line) or without the mark."""
    path = check / "drift.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None  # under way, or thinned
    except OSError as error:
        _log.warning("%s is passed over: it cannot be read (%s)", path, error.strerror)
        return None
    if mark and mark not in data and data.rstrip().endswith(b"}"):
        return None
    try:
        verdict = DriftVerdict.from_json(data.decode())
        datetime.fromisoformat(verdict.as_of)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s is passed over: it holds no drift verdict (%s)", path, error)
        return None
    return verdict
