"""Drive simulated canaries through the stages, each way to judge on a world of the same seed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from benchmarks.canary.rivals import Flagger, Kayenta, Verdict
from benchmarks.canary.traffic import BASE_MS, Look, Scenario, World
from serving.judge import Judge, homefeed

STAGES = (0, 1, 10, 50, 100)
LIMIT = 400  # looks of a whole canary: more is a fault of the driver
P99_MS = BASE_MS * float(np.exp(2.326 * np.sqrt(0.15**2 + 0.25**2 + 0.35**2)))  # of a quiet hour


class Judging(Protocol):
    """One way to judge."""

    def look(self, look: Look) -> Verdict:
        """What is done next: `pass` takes the next step."""
        ...


class Ours:
    """The judge, with `homefeed()`; every tenth look it is written down and read again, as after a crash."""

    def __init__(self) -> None:
        self.judge = Judge(homefeed())
        self.looks = 0
        self.why = ""

    def look(self, look: Look) -> Verdict:
        """As a rollout does."""
        self.looks += 1
        if self.looks % 10 == 0:
            self.judge = Judge.from_json(self.judge.to_json())
        judgement = self.judge.look(look.evidence)
        self.why = ("waited: " if judgement.exhausted else "") + judgement.rule
        if judgement.outcome == "pass":
            return "pass"
        return "fail" if judgement.outcome == "fail" or judgement.exhausted else "go on"


@dataclass(frozen=True)
class Method:
    """A way to judge and the stages it goes through."""

    name: str
    make: Callable[[], Judging]
    stages: tuple[int, ...]


METHODS = (
    Method("our judge", Ours, STAGES),
    Method("our judge, no dark stage", Ours, STAGES[1:]),
    Method("Kayenta, 50 points", lambda: Kayenta(False), STAGES[1:]),
    Method("Kayenta, 50 points, dark stage", lambda: Kayenta(False), STAGES),
    Method("Kayenta, every look, dark stage", lambda: Kayenta(True), STAGES),
    Method("Flagger, 99 %, 1.5 x p99", lambda: Flagger(0.99, 1.5 * P99_MS, 5), STAGES[1:]),
    Method("Flagger, 99.7 %, 1.15 x p99, dark stage", lambda: Flagger(0.997, 1.15 * P99_MS, 5), STAGES),
)


@dataclass(frozen=True)
class Result:
    """How one canary ended.

    Attributes:
        scenario: What was the matter.
        method: Who judged.
        harmful: Whether it should have been taken back.
        promoted: Whether it was not.
        exposed: Requests that the challenger answered for users.
        requests: All requests meanwhile.
        stage: Where it ended.
        why: The rule that ended it, ours only.
    """

    scenario: str
    method: str
    harmful: bool
    promoted: bool
    exposed: int
    requests: int
    stage: int
    why: str


def drive(scenario: Scenario, method: Method, seed: int) -> Result:
    """One canary from its first stage to its end."""
    world, judging = World(scenario, seed), method.make()
    exposed = requests = at = 0
    for _ in range(LIMIT):
        look = world.look(method.stages[at])
        exposed += len(look.evidence.challenger)
        requests += len(look.evidence.challenger) + len(look.evidence.champion)
        verdict = judging.look(look)
        at += verdict == "pass"
        if verdict == "fail" or at == len(method.stages):
            promoted = verdict == "pass"
            stage = method.stages[min(at, len(method.stages) - 1)]
            why = "" if promoted else getattr(judging, "why", "")
            return Result(scenario.name, method.name, scenario.harmful, promoted, exposed, requests, stage, why)
    raise RuntimeError(f"{method.name} never decided about {scenario.name}")


def varied(scenario: Scenario, seed: int) -> Scenario:
    """The scenario's own draw: how rare the crashing item is (heavy-tailed), when the champion has its moment."""
    rng = np.random.default_rng([seed, 7])
    crash = float(np.clip(scenario.crash * rng.lognormal(0, 1), 1e-4, 0.01)) if scenario.crash else 0.0
    incident = int(rng.integers(0, 40)) if scenario.incident >= 0 else -1
    return replace(scenario, crash=crash, incident=incident)
