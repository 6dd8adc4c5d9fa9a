"""What a rollout has done so far, on disk after every transition, and the ledger of all transitions.

rollout.json            the rollout under way, or the last one
rollouts/<version>.json the record of each version's last finished rollout
ledger.jsonl            every transition, one line, only ever appended to
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from engagement.errors import EvergreenError
from serving.files import write_json

Final = Literal["champion", "rolled_back"]
PENDING, CHAMPION, ROLLED_BACK = "pending", "champion", "rolled_back"


@dataclass(frozen=True)
class Step:
    """One canary step as it was judged.

    Attributes:
        percent: Share of users that the challenger had.
        requests: Requests replayed.
        answered: Those that the challenger answered.
        errors: Those without the answer that their user should get.
        p50_ms: Median latency of the challenger's answers through the gateway, milliseconds.
        p99_ms: Their 99th percentile.
        verdict: `pass`, `fail` or `inconclusive`.
        reason: Why, in words.
    """

    percent: int
    requests: int
    answered: int
    errors: int
    p50_ms: float
    p99_ms: float
    verdict: str
    reason: str


@dataclass(frozen=True)
class State:
    """A rollout.

    Attributes:
        id: Names this attempt in the ledger.
        version: Version that is rolled out.
        champion: Champion when it began; empty for a first model.
        salt: Salt of the users' buckets.
        stage: `pending`, a percentage, `champion` or `rolled_back`.
        steps: Steps judged so far.
        reason: Why it ended as it did.
        transitions: Number of transitions so far.
    """

    version: str
    champion: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    salt: str = ""
    stage: str = PENDING
    steps: tuple[Step, ...] = ()
    reason: str = ""
    transitions: int = 0

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.stage in (CHAMPION, ROLLED_BACK)

    @property
    def passed(self) -> frozenset[int]:
        """Percentages whose step was passed."""
        return frozenset(s.percent for s in self.steps if s.verdict == "pass")


@dataclass(frozen=True)
class RolloutResult:
    """How a rollout ended.

    Attributes:
        version: Version that was rolled out.
        outcome: `champion` or `rolled_back`.
        steps: The steps, in order.
        serving_version: Champion afterwards; empty when there is none.
        reason: Why, in words.
    """

    version: str
    outcome: Final
    steps: tuple[Step, ...]
    serving_version: str
    reason: str

    def to_json(self) -> str:
        """The result as JSON text."""
        return json.dumps(asdict(self), indent=1)


class Journal:
    """The rollout state of one home.

    Args:
        directory: `settings.serving`.
    """

    def __init__(self, directory: Path) -> None:
        self._state = directory / "rollout.json"
        self._ledger = directory / "ledger.jsonl"
        self._records = directory / "rollouts"

    def load(self) -> State | None:
        """The rollout under way, or the last one.

        Raises:
            EvergreenError: The file is damaged.
        """
        try:
            data = json.loads(self._state.read_text())
            return State(**(data | {"steps": tuple(Step(**s) for s in data["steps"])}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise EvergreenError(f"unreadable rollout state {self._state} ({error})", "Delete the file") from error

    def move(self, state: State, stage: str, why: str, **changes: Any) -> State:
        """Go to a stage: a line in the ledger, then the state on disk. Returns the new state.

        The ledger comes first: killed in between, the repeated transition is written with the same number,
        and a reader keeps the last line of each (rollout, number).
        """
        moved = replace(state, stage=stage, transitions=state.transitions + 1, **changes)
        line = {
            "rollout": state.id,
            "number": moved.transitions,
            "at": datetime.now(UTC).isoformat(),
            "version": state.version,
            "champion": state.champion,
            "from": state.stage,
            "to": stage,
            "why": why,
            "pid": os.getpid(),
        }
        self._append(line)
        write_json(self._state, asdict(moved))
        return moved

    def record(self, result: RolloutResult) -> None:
        """Keep a version's result."""
        write_json(self._records / f"{result.version}.json", asdict(result))

    def recorded(self, version: str) -> RolloutResult | None:
        """The result that was kept for a version, if any."""
        try:
            data = json.loads((self._records / f"{version}.json").read_text())
            return RolloutResult(**(data | {"steps": tuple(Step(**s) for s in data["steps"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def ledger(self) -> list[dict[str, Any]]:
        """All transitions in order; of one that was written twice, the last."""
        if not self._ledger.exists():
            return []
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for text in self._ledger.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # torn by a crash of the machine; its transition was repeated
                continue
            found[line["rollout"], line["number"]] = line
        return list(found.values())

    def _append(self, line: dict[str, Any]) -> None:
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._ledger, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
