"""Distances of two windows on the same bins, by the formulas of Evidently 0.7.23, to the last digit that matters.

Both sides are counts of the same K buckets, (K,) each, as `aligned` gives them; missing values are no bucket here.
Each distance is NaN where a side has no rows.
"""

import numpy as np
from scipy.spatial import distance as scipy_distance

SMALLEST_SPREAD = 0.001  # what Evidently divides by at least
FEW_VALUES = 20  # of the reference: up to as many are no numbers but kinds to Evidently


def psi(reference: np.ndarray, current: np.ndarray) -> float:
    """Population stability index; an empty bin counts as a little, as in Evidently.

    A share of zero becomes 1e-4, or a millionth of the smallest share where that one is not above 1e-4.
    """
    if not _comparable(reference, current):
        return float("nan")
    p, q = (_filled(side / side.sum()) for side in (reference, current))
    return float(((p - q) * np.log(p / q)).sum())


def jensenshannon(reference: np.ndarray, current: np.ndarray) -> float:
    """Jensen-Shannon distance, natural logarithm: the square root of the divergence (Lin, 1991)."""
    if not _comparable(reference, current):
        return float("nan")
    with np.errstate(invalid="ignore"):  # a rounding below 0 has no root
        return float(np.nan_to_num(scipy_distance.jensenshannon(reference, current)))


def wasserstein(points: np.ndarray, reference: np.ndarray, current: np.ndarray) -> float:
    """First Wasserstein distance in standard deviations of the reference.

    Args:
        points: (K,) where each bin lies, ascending.
        reference: (K,) counts.
        current: (K,) counts.
    """
    if not _comparable(reference, current):
        return float("nan")
    p, q = reference / reference.sum(), current / current.sum()
    apart = np.abs(np.cumsum(p - q))[:-1] @ np.diff(points)
    mean = p @ points
    spread = np.sqrt(max(float(p @ np.square(points - mean)), 0.0))
    return float(apart / max(spread, SMALLEST_SPREAD))


def binned(points: np.ndarray, reference: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bins that Evidently gives a numeric column for PSI and Jensen-Shannon.

    Equally wide, as many as Sturges says; with up to `FEW_VALUES` values in the reference each value by itself.
    Buckets are finer: put together so, few rows in each do not look like drift.

    Args:
        points: (K,) where each bucket lies, ascending.
        reference: (K,) counts.
        current: (K,) counts.

    Returns:
        Counts of both sides, (B,) each, empty bins included.
    """
    if np.count_nonzero(reference) <= FEW_VALUES:
        return reference, current
    edges = np.histogram_bin_edges(points, int(np.ceil(np.log2(reference.sum() + current.sum()) + 1)))
    return np.histogram(points, edges, weights=reference)[0], np.histogram(points, edges, weights=current)[0]


def _comparable(reference: np.ndarray, current: np.ndarray) -> bool:
    return bool(reference.sum() > 0 and current.sum() > 0)


def _filled(shares: np.ndarray) -> np.ndarray:
    least = shares[shares > 0].min()
    return np.where(shares > 0, shares, least / 1e6 if least <= 1e-4 else 1e-4)
