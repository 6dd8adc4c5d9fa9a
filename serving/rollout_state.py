"""What a rollout has done so far, on disk after every transition and every look.

rollout.json            the rollout under way, or the last one
rollouts/<version>.json the record of each version's last finished rollout
ledger.jsonl            every transition, among other entries (`ledger.py`)
"""

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from engagement.errors import EvergreenError
from serving.evidence import CHALLENGER, CHAMPION, Evidence
from serving.files import write_json
from serving.ledger import Ledger

Final = Literal["champion", "rolled_back"]
PENDING, DARK, PROMOTED, ROLLED_BACK = "pending", "dark", "champion", "rolled_back"
TRANSITION = "transition"  # kind of the ledger's entries that are written here
WIDTH = math.log(1.02)  # of a histogram's bucket: percentiles are exact to 1 %


class OvertakenError(EvergreenError):
    """Another controller has taken the rollout up; this one is to touch nothing any more."""


@dataclass(frozen=True)
class Step:
    """One stage as far as it was judged.

    Attributes:
        percent: Share of users that the challenger had; 0: dark.
        looks: Times it was judged.
        requests: Requests of both versions' users.
        answered: Those of the challenger's that it answered.
        errors: Requests, put to both among them, without the answer that they should get.
        pairs: Requests that were put to both versions, off the users' path.
        latency: Histogram of answers' milliseconds, champion's and challenger's: count by logarithmic bucket.
        verdict: `pass`, `fail`, `inconclusive`, or `stopped` (no longer wanted).
        rule: The judge's rule that decided.
        reason: Why, in words.
        findings: What the judge found, its own JSON data.
    """

    percent: int
    looks: int = 0
    requests: int = 0
    answered: int = 0
    errors: int = 0
    pairs: int = 0
    latency: tuple[Mapping[str, int], Mapping[str, int]] = field(default_factory=lambda: ({}, {}))
    verdict: str = "inconclusive"
    rule: str = ""
    reason: str = ""
    findings: Any = None

    @property
    def p50_ms(self) -> tuple[float, float]:
        """Median latency of champion and challenger, milliseconds; NaN without answers."""
        return tuple(_percentile(h, 0.5) for h in self.latency)  # type: ignore[return-value]

    @property
    def p99_ms(self) -> tuple[float, float]:
        """Their 99th percentiles."""
        return tuple(_percentile(h, 0.99) for h in self.latency)  # type: ignore[return-value]

    def plus(self, evidence: Evidence) -> "Step":
        """This step with one portion more; it is not judged by it yet."""
        champion, challenger, pairs = evidence.champion, evidence.challenger, evidence.pairs
        failed = champion.failed_N.sum() + challenger.failed_N.sum() + pairs.failed_P2.any(axis=1).sum()
        dark = not len(champion) and not len(challenger)
        ours = pairs.latency_P2[:, CHALLENGER] if dark else challenger.latency_N
        theirs = pairs.latency_P2[:, CHAMPION] if dark else champion.latency_N
        answered = (~(pairs.failed_P2[:, CHALLENGER] if dark else challenger.failed_N)).sum()
        return replace(
            self,
            looks=self.looks + 1,
            requests=self.requests + len(champion) + len(challenger),
            answered=self.answered + int(answered),
            errors=self.errors + int(failed),
            pairs=self.pairs + len(pairs),
            latency=(_counted(self.latency[0], theirs), _counted(self.latency[1], ours)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data for people and scripts: percentiles in place of the histograms."""
        data: dict[str, Any] = _plain(asdict(self))
        del data["latency"]
        for name, values in (("p50_ms", self.p50_ms), ("p99_ms", self.p99_ms)):
            data[name] = {"champion": _number(values[0]), "challenger": _number(values[1])}
        return data


@dataclass(frozen=True)
class State:
    """A rollout.

    Attributes:
        version: Version that is rolled out.
        champion: Champion when it began; empty for a first model.
        id: Names this attempt in the ledger.
        why: Why it was begun, in words.
        salt: Salt of the users' buckets.
        stage: `pending`, `dark`, a percentage, `champion` or `rolled_back`.
        steps: Stages judged so far, the present one last.
        reason: Why it ended as it did.
        transitions: Number of transitions so far.
        fence: Number of controllers that have taken it up so far.
        judge: What the judge knows; None before the first look.
        mark: Up to where traffic was looked at.
    """

    version: str
    champion: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    why: str = ""
    salt: str = ""
    stage: str = PENDING
    steps: tuple[Step, ...] = ()
    reason: str = ""
    transitions: int = 0
    fence: int = 0
    judge: Any = None
    mark: Any = None

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.stage in (PROMOTED, ROLLED_BACK)

    @property
    def passed(self) -> frozenset[int]:
        """Percentages whose stage was passed."""
        return frozenset(s.percent for s in self.steps if s.verdict == "pass")

    def step(self, percent: int) -> Step:
        """The step of a stage, also if nothing was looked at yet."""
        return next((s for s in self.steps if s.percent == percent), Step(percent))

    def having(self, step: Step) -> tuple[Step, ...]:
        """All steps, with this one in its place."""
        return (*(s for s in self.steps if s.percent != step.percent), step)


@dataclass(frozen=True)
class RolloutResult:
    """How a rollout ended.

    Attributes:
        version: Version that was rolled out.
        outcome: `champion` or `rolled_back`.
        steps: The stages, in order, as JSON data (`Step.to_json`).
        serving_version: Champion afterwards; empty when there is none.
        reason: Why, in words.
        rollout: Id of the rollout in the ledger; empty where none was needed.
    """

    version: str
    outcome: Final
    steps: tuple[Mapping[str, Any], ...]
    serving_version: str
    reason: str
    rollout: str = ""

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
        self._records = directory / "rollouts"
        self._lock = directory / ".rollout.lock"
        self.ledger = Ledger(directory / "ledger.jsonl")

    def load(self) -> State | None:
        """The rollout under way, or the last one; of an earlier release's the steps do not count (they were judged by
        other rules), so that one that it left unfinished begins anew.

        Raises:
            EvergreenError: The file is damaged.
        """
        try:
            data = json.loads(self._state.read_text())
            if "fence" not in data:
                data = data | {"steps": []}
            steps = tuple(Step(**(s | {"latency": tuple(s["latency"])})) for s in data["steps"])
            return State(**(data | {"steps": steps}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise EvergreenError(f"unreadable rollout state {self._state} ({error})", "Delete the file") from error

    def begin(self, state: State, before: State | None) -> State:
        """Write a new rollout down; the one before it has ended.

        Raises:
            OvertakenError: Another controller did so first.
        """
        return self.move(replace(state, fence=before.fence + 1 if before else 1), PENDING, state.why, before=before)

    def take_up(self, state: State) -> State:
        """Become the one controller of a rollout: whoever had it before will be refused.

        Raises:
            OvertakenError: Another controller did so first.
        """
        return self._put(replace(state, fence=state.fence + 1), expected=state)

    def check(self, state: State | None) -> None:
        """Refuse to go on with a rollout that another controller has taken up; None: to begin where one has begun.

        Raises:
            OvertakenError: It was.
        """
        present = self.load()
        if _owner(present) != _owner(state):
            version = present.version if present else state.version if state else ""
            raise OvertakenError(
                f"another controller has taken up the rollout of version {version}",
                "This one has touched nothing since",
            )

    def save(self, state: State, **changes: Any) -> State:
        """Keep what was learnt within a stage.

        Raises:
            OvertakenError: Another controller has taken the rollout up.
        """
        return self._put(replace(state, **changes), expected=state)

    def move(self, state: State, stage: str, why: str, before: State | None = None, **changes: Any) -> State:
        """Go to a stage: an entry in the ledger, then the state on disk. Returns the new state.

        The ledger comes first: killed in between, the repeated transition is written with the same number, and a
        reader keeps the last entry of each (rollout, number).

        Args:
            state: The state so far.
            stage: Where it goes.
            why: In words, for the ledger.
            before: For a new rollout: the state that it replaces.
            changes: What else changes of the state.

        Raises:
            OvertakenError: Another controller has taken the rollout up.
        """
        moved = replace(state, stage=stage, transitions=state.transitions + 1, **changes)
        entry = {
            "kind": TRANSITION,
            "rollout": state.id,
            "number": moved.transitions,
            "version": state.version,
            "champion": state.champion,
            "from": state.stage,
            "to": stage,
            "why": why,
            "shown": moved.steps[-1].to_json() if moved.steps else None,
        }
        first = state.transitions == 0
        return self._put(moved, expected=before if first else state, entry=entry)

    def _put(self, state: State, expected: State | None, entry: Mapping[str, Any] | None = None) -> State:
        """Write, if what is on disk is still the expected controller's."""
        self._state.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock):
            self.check(expected)
            if entry:
                self.ledger.append(entry)
            write_json(self._state, asdict(state))
        return state

    def record(self, result: RolloutResult) -> None:
        """Keep a version's result."""
        write_json(self._records / f"{result.version}.json", asdict(result))

    def recorded(self, version: str) -> RolloutResult | None:
        """The result that was kept for a version, if any; an earlier release's says other things of its steps."""
        try:
            data = json.loads((self._records / f"{version}.json").read_text())
            if "rollout" not in data:
                return None
            return RolloutResult(**(data | {"steps": tuple(data["steps"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def transitions(self) -> list[dict[str, Any]]:
        """All transitions in order; of one that was written twice, the last."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for entry in self.ledger.entries():
            if entry.get("kind") == TRANSITION:
                found[entry["rollout"], entry["number"]] = entry
        return list(found.values())


def _owner(state: State | None) -> tuple[str, int] | None:
    return (state.id, state.fence) if state else None


def _counted(histogram: Mapping[str, int], latency_N: np.ndarray) -> dict[str, int]:
    known_N = latency_N[np.isfinite(latency_N)]
    buckets, counts = np.unique(np.ceil(np.log(np.maximum(known_N, 1e-3)) / WIDTH).astype(int), return_counts=True)
    found = dict(histogram)
    for bucket, count in zip(buckets.tolist(), counts.tolist(), strict=True):
        found[str(bucket)] = found.get(str(bucket), 0) + count
    return found


def _percentile(histogram: Mapping[str, int], share: float) -> float:
    """Nearest-rank percentile, at the middle of its bucket."""
    left = math.ceil(share * sum(histogram.values()))
    for bucket, count in sorted((int(b), n) for b, n in histogram.items()):
        left -= count
        if left <= 0:
            return math.exp((bucket - 0.5) * WIDTH)
    return math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 1)


def _plain(data: Any) -> Any:
    """JSON data without NaN and infinity, which JSON does not know."""
    if isinstance(data, Mapping):
        return {k: _plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
