"""Percentile bootstrap over users (Efron and Tibshirani 1993, ch. 13), vectorised.

Requests of one user are dependent, so whole users are drawn. A statistic that is a ratio of sums over requests needs
only each user's sums: a resample is a vector of user weights.
"""

from collections.abc import Iterator

import numpy as np

_BLOCK = 4_000_000  # weights held at once


def resample_means(values_QM: np.ndarray, user: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over requests in each resample of users.

    Args:
        values_QM: (Q, M) one row a request, one column a quantity; all columns share the resamples, so that
            differences between columns are paired.
        user: (Q,) user codes 0..U-1.
        resamples: B.
        seed: Seed; equal arguments give equal results.

    Returns:
        (B, M) float64.
    """
    sums_UM = np.zeros((int(user.max()) + 1, values_QM.shape[1] + 1))
    np.add.at(sums_UM, user, np.column_stack([values_QM, np.ones(len(user))]))
    drawn = np.concatenate([w_KU @ sums_UM for w_KU in _weights(len(sums_UM), resamples, seed)])
    return drawn[:, :-1] / drawn[:, -1:]


def _weights(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(K, U) blocks of how often each user is drawn, B rows in all."""
    rng = np.random.default_rng(seed)
    block = max(1, min(resamples, _BLOCK // users))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, users, (rows, users)) + np.arange(rows)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users)


def interval(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    """Lower and upper percentile bound of (B,) resampled values."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
