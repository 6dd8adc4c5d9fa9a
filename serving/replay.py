"""Requests from the log, asked again: evidence for a rollout where there are no users, or before they see anything.

In the dark stage each request goes to both versions directly. Once the challenger has users, requests go through the
gateway as their users' would, while some still go to both. What the challenger answers is compared with what the
registered model gives for the same features.

Shapes: N requests of one arm, P requests put to both, C candidates, A actions.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from engagement.errors import EvergreenError
from engagement.table import hash_id
from evergreen.settings import Settings
from model.metrics import K, first
from serving.admission import DEADLINE_HEADER, PRIORITY_HEADER, PURPOSE_HEADER
from serving.buckets import BUCKET_HEADER, bucket, in_canary
from serving.client import NOT_ASKED, SLOW, Answer, Call, Client
from serving.evidence import CHALLENGER, CHAMPION, CONSTANT_RANGE, PROBLEMS, Arm, Evidence, Pairs
from serving.plane import Unfit
from serving.processes import Processes
from serving.protocol import TOO_MANY, RankRequest
from serving.registry import Registry
from serving.scoring import Reader, Scorer, open_features
from serving.traffic import Asked, Portion, Stage

PATIENT = {DEADLINE_HEADER: "10000"}  # the most that a predictor grants: slow is for the judge to say, not an error
REPLAY = {PURPOSE_HEADER: "replay"} | PATIENT
SHADOW = {PURPOSE_HEADER: "shadow", PRIORITY_HEADER: "low"} | PATIENT  # nobody waits: the first to be shed
LOOK, LOOK_AT = 60, {0: 0, 1: 200}  # requests a look through the gateway; at 1 % few of them reach the challenger
PAIRS, PAIRS_AT = 10, {0: 60}  # requests a look put to both
SCORE_TOLERANCE = 1e-4
"""Invalid when any score differs from the registered model's by more than 1e-4 (> 1e-4)."""


class ReplayTraffic:
    """Replays known requests; a look takes up where the last one at the same stage left off, going round at the end.

    Args:
        settings: The home.
        registry: Its registry.
        asked: The requests, one at least.
        features: Opens the home's online features.
        scorer: Opens a bundle with them, to know what the challenger should answer.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        asked: Sequence[Asked],
        features: Callable[[Settings], Reader] = open_features,
        scorer: Callable[[Path, Reader], Scorer] = Scorer,
    ) -> None:
        self._settings, self._registry, self._asked = settings, registry, asked
        self._features, self._open = features, scorer
        self._truth: _Truth | None = None

    def look(self, stage: Stage, mark: Any) -> Portion:
        """Replay one portion; the mark is the stage and the number of looks it had."""
        turn = mark["turn"] if mark and mark["percent"] == stage.percent else 0
        if self._truth is None:
            self._truth = self._known(stage.challenger)
        truth = self._truth
        through = self._window(turn, LOOK_AT.get(stage.percent, LOOK))
        both = self._window(turn, PAIRS_AT.get(stage.percent, PAIRS))
        with Client(self._settings.model_name, truth.spec.actions) as client:
            champion, challenger = _arms(client, stage, [a.request for a in through], truth)
            pairs = _pairs(client, stage, both, truth)
        memory = (self._memory(stage.champion), self._memory(stage.challenger))
        evidence = Evidence(stage.percent, champion, challenger, pairs, memory)
        return Portion(evidence, {"percent": stage.percent, "turn": turn + 1})

    def _window(self, turn: int, size: int) -> list[Asked]:
        """The next requests, each once at most."""
        size = min(size, len(self._asked))
        return [self._asked[(turn * size + i) % len(self._asked)] for i in range(size)]

    def _known(self, version: str) -> "_Truth":
        """The registered challenger, opened here."""
        features = self._features(self._settings)  # without them nobody can be judged: not the challenger's fault
        directory = self._registry.fetch(version)
        try:
            return _Truth(self._open(directory, features))
        except EvergreenError as error:
            raise Unfit(error.problem, error.remedy) from error

    def _memory(self, version: str) -> float:
        """Resident memory of a version's predictor on this machine in MB; NaN where it does not run here."""
        process = Processes(self._settings).get(f"predictor-{version}") if version else None
        try:
            return psutil.Process(process.pid).memory_info().rss / 1e6 if process else float("nan")
        except psutil.Error:
            return float("nan")


class _Truth:
    """What the registered challenger gives for a request, worked out once."""

    def __init__(self, scorer: Scorer) -> None:
        self.spec = scorer.spec
        self.primary = scorer.spec.actions.index(scorer.spec.primary_action)
        self._scorer, self._scores = scorer, dict[str, np.ndarray]()
        self._lock = threading.Lock()

    def __call__(self, request: RankRequest) -> np.ndarray:
        with self._lock:
            if request.request_id not in self._scores:
                self._scores[request.request_id] = self._scorer(request)
            return self._scores[request.request_id]

    def fault(self, answer: Answer, known: bool) -> str:
        """What is wrong with the content of an answer, in words; empty where nothing is.

        Args:
            answer: An answer that did not fail.
            known: Whether its scores should be those of the registered challenger.
        """
        wanted, scores_CA = answer.request.item_ids, answer.scores_CA
        name = f"request {answer.request.request_id}"
        if sorted(answer.ranked) != sorted(wanted) or scores_CA.shape != (len(wanted), len(self.spec.actions)):
            have = min(len(scores_CA), len(set(answer.ranked) & set(wanted)))
            return f"{name} has predictions for {have} of {len(wanted)} candidates"
        if not np.isfinite(scores_CA).all():
            return f"{name} has non-finite scores"
        if (np.diff(scores_CA[:, self.primary]) > 0).any():
            return f"wrong order: {name} is not ranked by its own scores"
        if known and not answer.degraded:
            by_item = dict(zip(wanted, self(answer.request), strict=True))
            gap = max(float(np.abs(by_item[i] - row).max()) for i, row in zip(answer.ranked, scores_CA, strict=True))
            if not gap <= SCORE_TOLERANCE:
                return f"wrong scores: {name} is off by {gap:.2g} from the registered model"
        return ""

    def saved(self, answer: Answer, saved: frozenset[str] | None) -> float:
        """Saved items among the first three (`model.metrics.first`); NaN where that says nothing."""
        if saved is None or len(answer.ranked) <= K:
            return float("nan")
        items = [item.encode() for item in answer.ranked]
        places = first(answer.request.request_id.encode(), items, answer.scores_CA[:, self.primary])
        return float(sum(answer.ranked[place] in saved for place in places))


def _arms(client: Client, stage: Stage, requests: Sequence[RankRequest], truth: _Truth) -> tuple[Arm, Arm]:
    """Ask through the gateway; the arms of champion and challenger."""
    calls = [
        Call(stage.doors.gateway, r, REPLAY | {BUCKET_HEADER: str(bucket(r.user_id, stage.salt))}) for r in requests
    ]
    answers: dict[str, list[Answer]] = {stage.champion: [], stage.challenger: []}
    for answer in client.ask_all(calls):
        if answer.status == NOT_ASKED:
            continue
        answers[_whose(stage, answer)].append(answer)
    ours = answers[stage.challenger]
    for i, answer in enumerate(ours):
        if answer.status == 200 and answer.failed(stage.challenger):  # ask it alone, once, what ails it
            alone = client.ask(Call(stage.doors.challenger, answer.request, SHADOW, SLOW))
            error = alone.error or "it did not answer in time"
            ours[i] = replace(answer, error=f"{error} (v{answer.version} stepped in)")
            break
    champion = arm(answers[stage.champion], stage.champion, truth, False) if stage.champion else Arm()
    return champion, arm(ours, stage.challenger, truth, True)


def _whose(stage: Stage, answer: Answer) -> str:
    """The version that is to answer for it. An error that says no version counts against the challenger."""
    if not stage.doors.sticky:
        return stage.champion if answer.version == stage.champion else stage.challenger
    canary = not stage.champion or in_canary(answer.request.user_id, stage.salt, stage.percent)
    return stage.challenger if canary else stage.champion


def arm(answers: Sequence[Answer], wanted: str, truth: _Truth, known: bool) -> Arm:
    """Answers of one version's users as columns."""
    failed = [a.failed(wanted) for a in answers]
    faults = ["" if f else truth.fault(a, known) for a, f in zip(answers, failed, strict=True)]
    problems = [a.error or a.problem(wanted) or fault for a, fault in zip(answers, faults, strict=True)]
    return Arm(
        failed_N=np.array(failed, bool),
        invalid_N=np.array([bool(f) for f in faults], bool),
        constant_N=np.array([_constant(a, truth.primary) for a in answers], bool),
        degraded_N=np.array([bool(a.degraded) for a in answers], bool),
        latency_N=np.array([_latency(a) for a in answers], float),
        score_N=np.array([_score(a, truth.primary) for a in answers], float),
        user_N=_users([a.request for a in answers]),
        problems=_first(problems),
    )


def _pairs(client: Client, stage: Stage, asked: Sequence[Asked], truth: _Truth) -> Pairs:
    """Put requests to both versions directly, every other one to the champion first."""
    sides = ((CHAMPION, stage.champion, stage.doors.champion), (CHALLENGER, stage.challenger, stage.doors.challenger))
    order = [
        (p, column, Call(door, a.request, SHADOW, SLOW))
        for p, a in enumerate(asked)
        for column, version, door in (sides if p % 2 else sides[::-1])
        if version
    ]
    answers: list[list[Answer | None]] = [[None, None] for _ in asked]
    for (p, column, _), heard_of in zip(order, client.ask_all([call for *_, call in order]), strict=True):
        answers[p][column] = heard_of
    # Shed because there was more urgent work, or not asked at all: no word about the version.
    heard = [p for p, both in enumerate(answers) if not any(a and a.status in (TOO_MANY, NOT_ASKED) for a in both)]
    failed_P2, invalid_P2 = np.zeros((len(heard), 2), bool), np.zeros((len(heard), 2), bool)
    latency_P2, score_P2, hits_P2 = (np.full((len(heard), 2), np.nan) for _ in range(3))
    problems = []
    for row, p in enumerate(heard):
        for column, version, _ in sides:
            answer = answers[p][column]
            if answer is None:
                continue
            failed = answer.failed(version)
            fault = "" if failed else truth.fault(answer, column == CHALLENGER)
            failed_P2[row, column], invalid_P2[row, column] = failed, bool(fault)
            latency_P2[row, column], score_P2[row, column] = _latency(answer), _score(answer, truth.primary)
            if not failed and not fault:
                hits_P2[row, column] = truth.saved(answer, asked[p].saved)
            if column == CHALLENGER:
                problems.append(answer.problem(version) or fault)
    users_P = _users([asked[p].request for p in heard])
    return Pairs(failed_P2, invalid_P2, latency_P2, score_P2, hits_P2, users_P, _first(problems))


def _constant(answer: Answer, primary: int) -> bool:
    scores_C = answer.scores_CA[:, primary] if answer.scores_CA.size else np.empty(0)
    return len(scores_C) > 1 and bool(np.ptp(scores_C) <= CONSTANT_RANGE)


def _latency(answer: Answer) -> float:
    return answer.latency_ms if answer.status else float("nan")


def _score(answer: Answer, primary: int) -> float:
    return float(answer.scores_CA[:, primary].mean()) if answer.scores_CA.size else float("nan")


def _users(requests: Sequence[RankRequest]) -> np.ndarray:
    return np.array([hash_id("user_id", r.user_id) for r in requests], np.int64)


def _first(problems: Sequence[str]) -> list[str]:
    return [p for p in problems if p][:PROBLEMS]
