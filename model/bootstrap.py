"""Paired bootstrap over users of HIT@3, of its difference and of its relative difference.

Requests of one user are alike, so users are resampled, not requests (a cluster bootstrap): an interval over requests
would be too narrow. HIT@3 of a resample is a ratio of sums, sum of hits / number of requests, so all that a user
contributes are a few sums, and a resample is a row of multinomial counts times the matrix of those sums. Models share
the resamples: that is what makes the comparison paired. Intervals are percentile intervals (Efron & Tibshirani 1993,
chapter 13).
"""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
_CELLS = 8_000_000  # multinomial counts held at once


@dataclass(frozen=True)
class Interval:
    """A measured value with its bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float]:
        """[low, high]."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Paired:
    """Challenger against champion on the same requests.

    Attributes:
        difference: HIT@3 of the challenger minus that of the champion.
        relative: The difference as a share of the champion's HIT@3.
    """

    difference: Interval
    relative: Interval


def resample(columns_QM: np.ndarray, user: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of columns over requests, in every resample of users.

    Args:
        columns_QM: (Q, M) one value a request.
        user: (Q,) code of the request's user, from 0.
        seed: Seed of the resamples; equal users and seeds give equal resamples.
        resamples: How many.

    Returns:
        (resamples, M).
    """
    users = int(user.max()) + 1
    columns_QM = np.column_stack([np.ones(len(user)), columns_QM])
    sums_UM = np.stack([np.bincount(user, c, users) for c in columns_QM.T], 1)
    rng, share = np.random.default_rng(seed), np.full(users, 1 / users)
    parts = []
    for start in range(0, resamples, max(1, _CELLS // users)):
        size = min(max(1, _CELLS // users), resamples - start)
        parts.append(rng.multinomial(users, share, size=size) @ sums_UM)
    sums = np.concatenate(parts)
    return sums[:, 1:] / sums[:, :1]


def interval(value: float, samples: np.ndarray) -> Interval:
    """The percentile interval of resampled values; infinite samples are allowed and stay at the ends."""
    tail = (1 - LEVEL) / 2
    # No interpolation: between a number and infinity it has no meaning. Rounding outwards errs towards caution.
    low, high = np.quantile(samples, tail, method="lower"), np.quantile(samples, 1 - tail, method="higher")
    return Interval(float(value), float(low), float(high))


def bootstrap(hits_Q: np.ndarray, user: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Interval:
    """HIT@3 of one model and action, with its interval."""
    return interval(hits_Q.mean(), resample(hits_Q[:, None], user, seed, resamples)[:, 0])


def paired_bootstrap(
    champion_Q: np.ndarray, challenger_Q: np.ndarray, user: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> Paired:
    """Difference of two models' HIT@3 of one action on the same requests.

    Args:
        champion_Q: Hits by request.
        challenger_Q: Hits by request, in the same order.
        user: User codes by request.
        seed: Seed of the resamples.
        resamples: How many; at least 2,000 for a 95 % interval.
    """
    means = resample(np.column_stack([champion_Q, challenger_Q]), user, seed, resamples)
    point = np.array([champion_Q.mean(), challenger_Q.mean()])
    return Paired(
        difference=interval(point[1] - point[0], means[:, 1] - means[:, 0]),
        relative=interval(relative(point), relative(means)),
    )


def relative(means: np.ndarray) -> np.ndarray:
    """(challenger - champion) / champion over the last dimension [champion, challenger].

    Where the champion has no hits it is 0 if the challenger has none either, else infinity.
    """
    champion, challenger = means[..., 0], means[..., 1]
    safe = np.where(champion > 0, champion, 1)
    without = np.where(challenger > 0, np.inf, 0.0)
    return np.where(champion > 0, (challenger - champion) / safe, without)
