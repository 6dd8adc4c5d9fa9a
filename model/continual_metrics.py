"""What a replay shows of a strategy: pure functions of hits by request.

Every statistic is computed in the data and in resamples of users (percentile bootstrap: Efron and Tibshirani 1993,
ch. 13) at once, along a leading axis of which the first entry is the data. All strategies share the resamples, so
differences and ratios between them are paired. Hits are averaged over seeds before.

Shapes: B the data and its resamples, U users, Q requests of a window, I models, J windows whose exams they sat (J = I:
window j is the last that model j was trained on). `R[i, j]` is HIT@3 of model i on the exam of window j, NaN for j > i.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Sums:
    """Hits, and the requests that they were counted on.

    Attributes:
        hits_B: Sum of hits.
        requests_B: Number of requests.
    """

    hits_B: np.ndarray
    requests_B: np.ndarray

    @property
    def mean_B(self) -> np.ndarray:  # noqa: N802  # a shape, as in names of arrays
        """HIT@3; NaN where there is no request."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.hits_B / self.requests_B)


def pooled(parts: list[Sums]) -> Sums:
    """All requests of several windows together."""
    return Sums(sum_of([p.hits_B for p in parts]), sum_of([p.requests_B for p in parts]))


def sum_of(arrays: list[np.ndarray]) -> np.ndarray:
    """Sum over a list of (B,) arrays, of which there is at least one."""
    return np.asarray(np.sum(arrays, axis=0))


class Users:
    """Resamples of the users of all windows together: who is drawn, is drawn with all requests in every window."""

    def __init__(self, user_by_window: list[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> None:
        """Draw.

        Args:
            user_by_window: (Q,) an id a request, of any type that sorts.
            resamples: Besides the data, which comes first.
            seed: Equal arguments give equal resamples.
        """
        names, codes = np.unique(np.concatenate(user_by_window), return_inverse=True)
        ends = np.cumsum([len(u) for u in user_by_window])[:-1]
        self._codes = np.split(codes, ends)
        rng, users = np.random.default_rng(seed), len(names)
        drawn = [np.bincount(rng.integers(0, users, users), minlength=users) for _ in range(resamples if users else 0)]
        self._weight_BU = np.array([np.ones(users), *drawn], np.float32)

    def sums(self, window: int, hits_QM: np.ndarray, chosen_Q: np.ndarray | None = None) -> list[Sums]:
        """Sums of M columns of hits in one window.

        Args:
            window: Index of the window.
            hits_QM: One column a model, rows are the window's requests, or the chosen ones of them.
            chosen_Q: bool, the requests that the rows are; all without it.
        """
        codes = self._codes[window] if chosen_Q is None else self._codes[window][chosen_Q]
        weight_BQ = self._weight_BU[:, codes]
        hits_BM = (weight_BQ @ hits_QM.astype(np.float32)).astype(np.float64)
        requests_B = weight_BQ.sum(1, dtype=np.float64)
        return [Sums(hits_B, requests_B) for hits_B in hits_BM.T]


def estimate(value_B: np.ndarray) -> dict[str, float] | None:
    """The value in the data and its percentile interval; None where it is not defined in the data."""
    if not np.isfinite(value_B[0]):
        return None
    drawn = value_B[1:][np.isfinite(value_B[1:])]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if len(drawn) else [np.nan] * 2
    found = {"value": float(value_B[0]), "low": float(low), "high": float(high)}
    return {k: round(v, 6) + 0.0 if np.isfinite(v) else None for k, v in found.items()}  # type: ignore[misc]


def relative(value_B: np.ndarray, reference_B: np.ndarray) -> np.ndarray:
    """(B,) value / reference - 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(value_B / reference_B - 1)


def gap_closed(strategy_B: np.ndarray, finetune_B: np.ndarray, scratch_B: np.ndarray) -> dict[str, Any]:
    """Share of the way from fine-tuning to training from scratch: (s - finetune) / (scratch - finetune).

    (How ADER, Mi et al. 2020, arXiv 2007.12000, sets its methods between "Finetune" and "Joint".) A ratio whose
    denominator may be 0 says nothing, so it is told only where scratch is proven ahead.

    Returns:
        `gap`: scratch / finetune - 1; `share`, None where scratch is not ahead; `why_none`, empty where it is.
    """
    gap = estimate(relative(scratch_B, finetune_B))
    why_none = "gap not resolved"
    if gap and gap["low"] is not None:
        why_none = "" if gap["low"] > 0 else "scratch is behind" if gap["high"] < 0 else why_none
    with np.errstate(invalid="ignore", divide="ignore"):
        share = estimate((strategy_B - finetune_B) / (scratch_B - finetune_B)) if not why_none else None
    return {"gap": gap, "share": share, "why_none": why_none}


def comparable_ages(ages: tuple[int, ...], windows: int) -> tuple[int, ...]:
    """The ages that at least half of the windows (and one) can test, so that all ages share enough windows."""
    return tuple(a for a in ages if a <= windows // 2 and a < windows)


def freshness(tested: dict[tuple[int, int], Sums], ages: tuple[int, ...]) -> dict[int, np.ndarray]:
    """HIT@3 by the age of the model in slots, each on the same windows: those that the oldest model was there for.

    (Test-then-train: Monolith, Liu et al. 2022, arXiv 2209.07663, algorithm 1.)

    Args:
        tested: By (window, age).
        ages: To compare.
    """
    windows = sorted({w for w, age in tested if age == max(ages)})
    return {age: pooled([tested[w, age] for w in windows]).mean_B for age in ages}


def matrix(examined: dict[tuple[int, int], Sums], models: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits (B, I, J), NaN for j > i, and requests (B, J), from sums by (model, window)."""
    resamples = len(next(iter(examined.values())).hits_B)
    hits_BIJ, requests_BJ = np.full((resamples, models, models), np.nan), np.zeros((resamples, models))
    for (i, j), sums in examined.items():
        hits_BIJ[:, i, j], requests_BJ[:, j] = sums.hits_B, sums.requests_B
    return hits_BIJ, requests_BJ


def ratings(hits_BIJ: np.ndarray, requests_BJ: np.ndarray) -> np.ndarray:
    """R: (B, I, J) HIT@3; NaN where a window has no exam."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(hits_BIJ / requests_BJ[:, None, :])


def backward_transfer(R_BIJ: np.ndarray) -> np.ndarray:
    """BWT = mean over j < T of R[T, j] - R[j, j], T the last model (Lopez-Paz and Ranzato 2017, arXiv 1706.08840)."""
    own_BJ = np.diagonal(R_BIJ, axis1=1, axis2=2)
    return _mean((R_BIJ[:, -1] - own_BJ)[:, :-1])


def forgetting(R_BIJ: np.ndarray) -> np.ndarray:
    """F = mean over j < T of max over l < T of R[l, j] - R[T, j] (Chaudhry et al. 2018, arXiv 1801.10112).

    Models older than a window are no part of the maximum. Which model was best is decided in the data, once: a
    maximum over noise would rise with every resample. It still favours the best, so F is above 0 without forgetting.
    """
    if R_BIJ.shape[1] < 2:
        return np.full(len(R_BIJ), np.nan)
    windows = np.arange(R_BIJ.shape[1] - 1)
    best = np.argmax(np.nan_to_num(R_BIJ[0, :-1, :-1], nan=-np.inf), axis=0)
    return _mean(R_BIJ[:, best, windows] - R_BIJ[:, -1, :-1])


def stability(R_BIJ: np.ndarray) -> np.ndarray:
    """Mean of R below the diagonal: HIT@3 of every model on windows before its last."""
    below = np.tril(np.ones(R_BIJ.shape[1:], bool), -1)
    return _mean(R_BIJ[:, below])


def memory(hits_BIJ: np.ndarray, first: int = 1) -> dict[int, np.ndarray]:
    """By lag: the share of HIT@3 lost on windows that are `lag` slots old, against when they were new.

    1 - sum over j of hits[j + lag, j] / sum over j of hits[j, j], over all windows from `first` on that are so old.
    (Window 0 is the whole history before the first slot.) Requests of all windows count alike, so a small window is
    no noisier than its size.
    """
    models = hits_BIJ.shape[1]
    own_BJ = np.diagonal(hits_BIJ, axis1=1, axis2=2)
    lost = {}
    for lag in range(models - first):
        windows = np.arange(first, models - lag)
        later_B, own_B = hits_BIJ[:, windows + lag, windows].sum(1), own_BJ[:, windows].sum(1)
        lost[lag] = -relative(later_B, own_B)
    return lost


def _mean(values_BX: np.ndarray) -> np.ndarray:
    """(B,) mean over what is defined in the data: windows without an exam are left out."""
    defined = np.isfinite(values_BX[0])
    if not defined.any():
        return np.full(len(values_BX), np.nan)
    kept = np.isfinite(values_BX) & defined
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(kept, values_BX, 0).sum(1) / kept.sum(1))
