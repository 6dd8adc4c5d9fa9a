"""The log of decisions: one line a decision in `decisions.jsonl`, appended under a lock, never rewritten.

One file is the whole truth. A request is pending if it was decided and is not settled. So a kill between two steps
cannot leave a request without its decision, or a decision without its request. Only the lines that ask or settle are
parsed, so that a year of hourly checks costs a decision some milliseconds.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock

from engagement.errors import EvergreenError

LOG = "decisions.jsonl"
_NO = b'{"action": "none"'  # how the line of a "no" begins: keys are sorted


@dataclass(frozen=True)
class Decision:
    """One decision, as it stands in the log.

    Attributes:
        action: `retrain` asks for a retrain, `escalate` for a person.
        reason: One sentence, for `none` too.
        champion: The model version that was checked.
        as_of: ISO instant of the check.
        key: Idempotency key of what is or would be asked for.
        check: Hash of the check that it decides on; the same check gives the same decision.
        cause: What asks or would have asked: a missed slot, drift, lost quality; empty if nothing does.
        retrain_as_of: ISO instant up to which the retrain learns; empty unless `retrain`.
        skewed: Whether the clock of the check cannot be trusted; later checks are not measured by its instant.
    """

    action: Literal["retrain", "none", "escalate"]
    reason: str
    champion: str
    as_of: str
    key: str
    check: str
    cause: Literal["drift", "quality", "slot", ""] = ""
    retrain_as_of: str = ""
    skewed: bool = False

    @property
    def instant(self) -> datetime:
        """Instant of the check."""
        return datetime.fromisoformat(self.as_of)

    @property
    def early(self) -> bool:
        """Whether it asks for a retrain between two slots."""
        return self.action == "retrain" and self.cause != "slot"


class DecisionLog:
    """The log while its lock is held; see `opened`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        self._torn = len(self._lines.pop())  # what a killed writer left of its line

    def of_check(self, check: str) -> Decision | None:
        """The decision on a check, if it was decided on before."""
        mark = f'"check": "{check}"'.encode()
        return next((self._decision(n) for n in reversed(range(len(self._lines))) if mark in self._lines[n]), None)

    def newest(self, until: datetime | None) -> Decision | None:
        """The newest decision whose clock can be trusted.

        Args:
            until: Decisions on checks later than this are passed over: the clock ran ahead.
        """
        for number in reversed(range(len(self._lines))):
            decision = self._decision(number)
            if decision and not decision.skewed and (until is None or decision.instant <= until):
                return decision
        return None

    def asked(self) -> list[Decision]:
        """Every decision that asked for a retrain, oldest first."""
        found = (self._decision(n) for n, line in enumerate(self._lines) if not line.startswith(_NO))
        return [d for d in found if d and d.action == "retrain"]

    def pending(self) -> Decision | None:
        """The early retrain that was asked for and is not settled, if any."""
        entries = (self._entry(n) for n, line in enumerate(self._lines) if not line.startswith(_NO))
        settled = {e["taken"] for e in entries if "taken" in e}
        return next((d for d in self.asked() if d.early and d.key not in settled), None)

    def all(self) -> list[Decision]:
        """Every decision, oldest first."""
        return [d for d in map(self._decision, range(len(self._lines))) if d]

    def add(self, decision: Decision) -> None:
        """Append a decision."""
        self._append(asdict(decision))

    def settle(self, request: Decision, why: str) -> None:
        """Note that a request waits no longer."""
        self._append({"taken": request.key, "why": why})

    def claim(self, request: Decision, who: str) -> bool:
        """Note who does what a decision asked for: true for the first who comes, however often, and nobody else."""
        mark = f'"claimed": "{request.check}"'.encode()
        first = next((self._entry(n) for n, line in enumerate(self._lines) if mark in line), None)
        if first is None:
            self._append({"claimed": request.check, "by": who})
        return first is None or first.get("by") == who

    def _entry(self, number: int) -> dict[str, object]:
        try:
            entry = json.loads(self._lines[number])
            if not isinstance(entry, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise self._damaged(number) from error
        return entry

    def _decision(self, number: int) -> Decision | None:
        entry = self._entry(number)
        if "taken" in entry or "claimed" in entry:
            return None
        try:
            decision = Decision(**entry)  # type: ignore[arg-type]
            datetime.fromisoformat(decision.as_of)
        except (TypeError, ValueError) as error:
            raise self._damaged(number) from error
        return decision

    def _damaged(self, number: int) -> EvergreenError:
        return EvergreenError(f"line {number + 1} of {self.path} is not a decision", "Repair or remove that line")

    def _append(self, entry: dict[str, object]) -> None:
        """Append one line and force it to the disk; first cut off what a killed writer left of its line."""
        line = json.dumps(entry, sort_keys=True).encode()
        with self.path.open("ab") as file:
            file.truncate(file.seek(0, os.SEEK_END) - self._torn)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)
        self._torn = 0


@contextmanager
def opened(state_dir: Path) -> Iterator[DecisionLog]:
    """The log in a directory, which is created if missing; nobody else has it meanwhile.

    Raises:
        EvergreenError: The log cannot be written, or holds a line that is not a decision.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(state_dir / ".lock"):
            yield DecisionLog(state_dir / LOG)
    except OSError as error:
        raise EvergreenError(
            f"the decision log in {state_dir} cannot be written ({error})",
            "Free the disk or set another home",
        ) from error


def pending(state_dir: Path) -> Decision | None:
    """The early retrain that waits to be done, if any; does not take it."""
    with opened(state_dir) as log:
        return log.pending()


def take(state_dir: Path) -> Decision | None:
    """Take the early retrain that waits: it is returned to one caller only, and logged as done."""
    with opened(state_dir) as log:
        request = log.pending()
        if request:
            log.settle(request, "done")
        return request


def history(state_dir: Path) -> list[Decision]:
    """Every decision, oldest first."""
    with opened(state_dir) as log:
        return log.all()
