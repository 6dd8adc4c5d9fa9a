"""What a canary is judged on: what each version did for its users, and what both say to the same requests.

Evidence comes in portions, one a look; the judge (`judge.py`) adds them up. Whoever gathers it (`traffic.py`) decides
nothing: what is missing stays missing, and missing data is never a success.

Shapes: N requests of one arm, P requests put to both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

CHAMPION, CHALLENGER = 0, 1  # columns of everything that is paired
CONSTANT_RANGE = 1e-7
"""Constant when the largest and the smallest primary score differ by at most 1e-7 (<= 1e-7)."""
PROBLEMS = 3  # told of each arm


def _none(dtype: type) -> np.ndarray:
    return np.empty(0, dtype)


def _no_pairs(dtype: type) -> np.ndarray:
    return np.empty((0, 2), dtype)


@dataclass(frozen=True)
class Arm:
    """Requests that one version was to answer, in the order in which they came.

    Attributes:
        failed_N: bool: an error status, no answer in time, or an answer by another version in its place.
        invalid_N: bool: answered, but a candidate lacks its prediction, a score is not finite, the order is not that
            of the scores, or the scores are not those of the registered model where they are known.
        constant_N: bool: two candidates or more, and all have the same primary score.
        degraded_N: bool: answered from cached features or by popularity.
        latency_N: Milliseconds until the answer; NaN where there is none.
        score_N: Mean primary score of the candidates; NaN where there is none.
        user_N: int64 hash of the user.
        problems: What went wrong, in words, the first few.
    """

    failed_N: np.ndarray = field(default_factory=lambda: _none(bool))
    invalid_N: np.ndarray = field(default_factory=lambda: _none(bool))
    constant_N: np.ndarray = field(default_factory=lambda: _none(bool))
    degraded_N: np.ndarray = field(default_factory=lambda: _none(bool))
    latency_N: np.ndarray = field(default_factory=lambda: _none(float))
    score_N: np.ndarray = field(default_factory=lambda: _none(float))
    user_N: np.ndarray = field(default_factory=lambda: _none(np.int64))
    problems: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.failed_N)


@dataclass(frozen=True)
class Pairs:
    """Requests that both versions scored off the users' path ("shadow"); columns: champion, challenger.

    Attributes:
        failed_P2: bool, as in `Arm`.
        invalid_P2: bool, as in `Arm`.
        latency_P2: Milliseconds; NaN where there is no answer.
        score_P2: Mean primary score of the candidates.
        hits_P2: Saved items among the first three (numerator of HIT@3/save); NaN where the labels have not matured,
            where a model may have been trained on the request, or where there are three candidates or fewer. A pair
            whose labels mature later comes once more with its hits alone: not failed, latency and score NaN.
        user_P: int64 hash of the user.
        problems: What went wrong with the challenger, in words, the first few.
    """

    failed_P2: np.ndarray = field(default_factory=lambda: _no_pairs(bool))
    invalid_P2: np.ndarray = field(default_factory=lambda: _no_pairs(bool))
    latency_P2: np.ndarray = field(default_factory=lambda: _no_pairs(float))
    score_P2: np.ndarray = field(default_factory=lambda: _no_pairs(float))
    hits_P2: np.ndarray = field(default_factory=lambda: _no_pairs(float))
    user_P: np.ndarray = field(default_factory=lambda: _none(np.int64))
    problems: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.failed_P2)


@dataclass(frozen=True)
class Evidence:
    """One portion: what came in since the last look.

    Attributes:
        percent: Share of the users that the challenger had meanwhile, 0..100.
        champion: The champion's own requests; empty where there is no champion.
        challenger: The challenger's own requests; empty while it is dark.
        pairs: Requests that were put to both; for a first model the champion's columns are NaN and False.
        memory_mb: Resident memory of champion and challenger now; NaN where it is not known.
    """

    percent: int
    champion: Arm = field(default_factory=Arm)
    challenger: Arm = field(default_factory=Arm)
    pairs: Pairs = field(default_factory=Pairs)
    memory_mb: tuple[float, float] = (float("nan"), float("nan"))
