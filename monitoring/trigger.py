"""When drift starts an early retrain: asked for once, never over broken data, never in a loop.

One file is the whole truth: `decisions.jsonl`, one line a decision, appended under a lock. A request is pending
if it was decided and not yet taken. So a kill between two steps cannot leave a request without its decision, or
a decision without its request.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from filelock import FileLock

from engagement.errors import EvergreenError
from monitoring.verdict import DriftVerdict

COOLDOWN = timedelta(hours=36)
"""No retrain is asked for if another was asked for **<** this before or after `as_of`, whatever the champion.

Long enough for the retrain that was asked for to finish and roll out, shorter than the gap of two slots."""

SLOT_NEAR = timedelta(hours=6)
"""No retrain is asked for if the next regular slot is **≤** this away: it would train on the same window."""


@dataclass(frozen=True)
class Decision:
    """One decision, as it stands in the log.

    Attributes:
        action: `retrain` asks for an early retrain.
        reason: One sentence, for `none` too.
        champion: The model version that was checked.
        as_of: ISO instant of the check.
        key: Idempotency key of the request: one champion asks at most once a day.
        check: Hash of the check that it decides on; the same check gives the same decision.
    """

    action: Literal["retrain", "none"]
    reason: str
    champion: str
    as_of: str
    key: str
    check: str


def decide(verdict: DriftVerdict, state_dir: Path, next_slot: datetime) -> Decision:
    """Decide whether a check asks for an early retrain, and log it; the same check again decides the same.

    Args:
        verdict: The check.
        state_dir: Directory of the log; created if missing.
        next_slot: The next regular retrain after the check, aware.

    Raises:
        EvergreenError: The log holds a line that is not a decision.
    """
    as_of = datetime.fromisoformat(verdict.as_of).astimezone(UTC)
    check = _identity(verdict)
    with _locked(state_dir) as log:
        decisions, taken = _read(log)
        for earlier in decisions:
            if earlier.check == check:
                return earlier
        key = f"{verdict.model_version}@{as_of:%Y-%m-%d}"
        refusal = _refusal(verdict, as_of, key, next_slot, decisions, taken)
        decision = Decision(
            action="none" if refusal else "retrain",
            reason=refusal or verdict.reason,
            champion=verdict.model_version,
            as_of=verdict.as_of,
            key=key,
            check=check,
        )
        _append(log, asdict(decision))
        return decision


def _identity(verdict: DriftVerdict) -> str:
    """Hash of what a check found. Scores stay out: summed in another order, they differ in their last digits."""
    found = [verdict.model_version, verdict.as_of, verdict.rows, verdict.share, verdict.drifted_columns]
    return hashlib.sha256(json.dumps([*found, sorted(verdict.broken)]).encode()).hexdigest()[:16]


def pending(state_dir: Path) -> Decision | None:
    """The request that waits to be taken, if any; does not take it."""
    with _locked(state_dir) as log:
        return _pending(*_read(log))


def take(state_dir: Path) -> Decision | None:
    """Take the pending request: it is returned to one caller only, and logged as taken."""
    with _locked(state_dir) as log:
        request = _pending(*_read(log))
        if request:
            _append(log, {"taken": request.key})
        return request


def history(state_dir: Path) -> list[Decision]:
    """Every decision, oldest first."""
    with _locked(state_dir) as log:
        return _read(log)[0]


def _refusal(
    verdict: DriftVerdict,
    as_of: datetime,
    key: str,
    next_slot: datetime,
    decisions: list[Decision],
    taken: set[str],
) -> str | None:
    """Why no retrain is asked for, or None if one is."""
    if verdict.broken:
        name, why = next(iter(verdict.broken.items()))
        return f"Broken data is repaired, not trained on: {name} {why}"
    if not verdict.drifted:
        return verdict.reason
    waiting = _pending(decisions, taken)
    if waiting:
        return f"Drift, but a retrain is already asked for (by the check of {waiting.as_of})"
    for earlier in decisions:
        if earlier.action != "retrain":
            continue
        if earlier.key == key:
            return f"Drift, but a retrain of this champion was asked for today (by the check of {earlier.as_of})"
        if abs(as_of - datetime.fromisoformat(earlier.as_of)) < COOLDOWN:
            return f"Drift, but within {_hours(COOLDOWN)} of the retrain asked for by the check of {earlier.as_of}"
    if next_slot - as_of <= SLOT_NEAR:
        return f"Drift, but the slot of {next_slot:%Y-%m-%d %H:%M} UTC is at most {_hours(SLOT_NEAR)} away"
    return None


def _pending(decisions: list[Decision], taken: set[str]) -> Decision | None:
    return next((d for d in decisions if d.action == "retrain" and d.key not in taken), None)


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.0f} h"


@contextmanager
def _locked(state_dir: Path) -> Iterator[Path]:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(state_dir / ".lock"):
            yield state_dir / "decisions.jsonl"
    except OSError as error:
        raise EvergreenError(
            f"the decision log in {state_dir} cannot be written ({error})",
            "Free the disk or set another home",
        ) from error


def _read(log: Path) -> tuple[list[Decision], set[str]]:
    """Decisions, and the keys of the requests that were taken."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []  # the rest after the last newline is torn
    decisions, taken = [], set()
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
            if "taken" in data:
                taken.add(data["taken"])
            else:
                decisions.append(Decision(**data))
        except (ValueError, TypeError) as error:
            raise EvergreenError(f"line {number} of {log} is not a decision", "Repair or remove that line") from error
    return decisions, taken


def _append(log: Path, entry: dict[str, str]) -> None:
    """Append one line and force it to the disk; first cut off what a killed writer left of its line."""
    with log.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
