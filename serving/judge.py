"""Whether a canary step's answers are good enough to widen the canary. All thresholds are here.

The rules look at safety: did the challenger answer, with all predictions, with the scores that the
registered model gives for the same features? They are exact and few answers suffice. Latency is reported and
not judged: on a shared machine it says more about the neighbours than about the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

MAX_ERROR_RATE = 0.01
"""Fails when errors / requests > 0.01, for the challenger's requests and for the others separately."""

MIN_ANSWERS = 5
"""Inconclusive when the challenger gave fewer than 5 good answers (< 5)."""

SCORE_TOLERANCE = 1e-4
"""Fails when any score differs from the expected one by more than 1e-4 (> 1e-4)."""

CONSTANT_RANGE = 1e-7
"""Constant when no answer's largest and smallest primary score differ by more than 1e-7 (<= 1e-7)."""

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Answer:
    """What a client got for one request, C candidates and A actions.

    Attributes:
        request_id: The request.
        item_ids: The candidates that were asked for, C of them.
        wanted: Version that the split gives this user.
        status: HTTP status; 0 when no answer came.
        latency_ms: Milliseconds until the answer.
        version: Version that answered.
        ranked: Item ids in the order of the answer, best first.
        scores: (C, A) float32, rows in the order of `ranked`; empty when the answer holds none.
        error: What went wrong, where something did.
    """

    request_id: str
    item_ids: tuple[str, ...]
    wanted: str
    status: int
    latency_ms: float
    version: str = ""
    ranked: tuple[str, ...] = ()
    scores: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    error: str = ""

    @property
    def failed(self) -> bool:
        """No answer, an error, or an answer by another version than the user's (a failover)."""
        return self.status != 200 or self.version != self.wanted

    @property
    def problem(self) -> str:
        """Why it counts as failed, in words."""
        if self.error:
            return self.error
        if self.status != 200:
            return f"status {self.status}" if self.status else "no answer"
        return f"version {self.version or 'unknown'} answered in its place"


@dataclass(frozen=True)
class Judgement:
    """The outcome of one step, the rule that decided, and the reason in words."""

    outcome: Outcome
    rule: str
    reason: str


Expected = Mapping[str, np.ndarray]  # request id -> (C, A) scores, rows in the order of the request's candidates


def judge(answers: Sequence[Answer], expected: Expected, challenger: str, primary: int) -> Judgement:
    """Judge one canary step.

    Args:
        answers: All answers of the step, also those by the champion.
        expected: Scores by the registered challenger for the same features, for each request that was its
        own.
        challenger: Version under test.
        primary: Column of the primary action, by which candidates are ranked.

    Returns:
        The first rule that does not pass, or `pass`. A rule that fails outranks `too few answers`.
    """
    ours = [a for a in answers if a.wanted == challenger]
    others = [a for a in answers if a.wanted != challenger]
    good = [a for a in ours if not a.failed]
    rules: tuple[tuple[str, Callable[[], str]], ...] = (
        ("errors", lambda: _errors(ours, "the challenger")),
        ("errors", lambda: _errors(others, "the champion")),
        ("missing", lambda: _missing(good)),
        ("non-finite", lambda: _non_finite(good)),
        ("wrong", lambda: _wrong(good, expected)),
        ("order", lambda: _misranked(good, primary)),
        ("constant", lambda: _constant(good, primary)),
    )
    for rule, check in rules:
        reason = check()
        if reason:
            return Judgement("fail", rule, reason)
    if len(good) < MIN_ANSWERS:
        reason = f"{len(good)} answers by the challenger, {MIN_ANSWERS} are needed"
        return Judgement("inconclusive", "too few", reason)
    return Judgement("pass", "", f"{len(good)} answers as expected")


def _errors(answers: Sequence[Answer], who: str) -> str:
    """More than `MAX_ERROR_RATE` of the requests failed."""
    failed = [a for a in answers if a.failed]
    if len(failed) <= MAX_ERROR_RATE * len(answers):
        return ""
    return f"{len(failed)} of {len(answers)} requests to {who} failed: {failed[0].problem}"


def _missing(answers: Sequence[Answer]) -> str:
    """An answer lacks a candidate, names a foreign one, or has not one score for each."""
    for a in answers:
        if sorted(a.ranked) != sorted(a.item_ids) or a.scores.shape[:1] != (len(a.item_ids),) or not a.scores.size:
            have = min(len(a.scores), len(set(a.ranked) & set(a.item_ids)))
            return f"request {a.request_id} has predictions for {have} of {len(a.item_ids)} candidates"
    return ""


def _non_finite(answers: Sequence[Answer]) -> str:
    """A score is NaN or infinite."""
    bad = [a for a in answers if not np.isfinite(a.scores).all()]
    return f"{len(bad)} of {len(answers)} answers hold non-finite scores" if bad else ""


def _wrong(answers: Sequence[Answer], expected: Expected) -> str:
    """A score is off by more than `SCORE_TOLERANCE` from the registered model's, or cannot be compared."""
    for a in answers:
        truth = expected.get(a.request_id)
        if truth is None or truth.shape != a.scores.shape:
            return f"request {a.request_id} cannot be compared with the registered model"
        by_item = dict(zip(a.item_ids, truth, strict=True))
        gap = max(float(np.abs(by_item[item] - row).max()) for item, row in zip(a.ranked, a.scores, strict=True))
        if not gap <= SCORE_TOLERANCE:
            return f"wrong scores: request {a.request_id} is off by {gap:.2g} from the registered model"
    return ""


def _misranked(answers: Sequence[Answer], primary: int) -> str:
    """An answer is not sorted by its own primary score, best first."""
    for a in answers:
        if (np.diff(a.scores[:, primary]) > 0).any():
            return f"wrong order: request {a.request_id} is not ranked by its own scores"
    return ""


def _constant(answers: Sequence[Answer], primary: int) -> str:
    """Every answer with two candidates or more gives all of them the same primary score."""
    ranges = [float(np.ptp(a.scores[:, primary])) for a in answers if len(a.scores) > 1]
    if ranges and max(ranges) <= CONSTANT_RANGE:
        return f"constant scores in all of {len(ranges)} answers"
    return ""
