"""Embeddings of a window in small, and how far two windows' embeddings are apart.

Shapes: N rows, V vectors of a sample, D their width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from monitoring.counts import Counts, Tally, added, numbers

VECTORS = 2_048  # the most that are kept of each embedding
FEWEST_VECTORS = 8  # a side; fewer tell nothing
RIDGE = 1e-3  # of the mean variance, added to each


@dataclass(frozen=True)
class Vectors:
    """What is kept of an embedding column.

    Attributes:
        count: Rows with a vector.
        missing: Rows without: some number of it is missing or infinite.
        total: (D,) float64, sum of the vectors.
        norms: Counts of their lengths, around 0: to be compared as any number is.
        sample: (V, D) float32, drawn evenly over the window.
    """

    count: int
    missing: int
    total: np.ndarray
    norms: Counts
    sample: np.ndarray


class VectorTally:
    """Gathers many parts of one embedding column in bounded memory."""

    def __init__(self, width: int) -> None:
        self._count, self._missing, self._total, self._norms = 0, 0, np.zeros(width), Tally()
        self._sample, self._step = np.zeros((0, width), np.float32), 1  # every how many-th vector is in the sample

    def add(self, part: np.ndarray) -> None:
        """One more part, (D, N) float32."""
        whole = np.isfinite(part).all(axis=0)
        known = part if whole.all() else part[:, whole]
        self._total += known.sum(axis=1, dtype=np.float64)
        self._norms.add(numbers(np.sqrt(np.einsum("dn,dn->n", known, known, dtype=np.float64)), 0.0))
        self._sample = np.concatenate([self._sample, known[:, -self._count % self._step :: self._step].T])
        while len(self._sample) > VECTORS:
            self._sample, self._step = self._sample[::2].copy(), self._step * 2
        self._count += known.shape[1]
        self._missing += part.shape[1] - known.shape[1]

    def vectors(self) -> Vectors:
        """Of all parts."""
        return Vectors(self._count, self._missing, self._total, self._norms.counts(), self._sample)


def all_vectors(parts: Iterable[Vectors]) -> Vectors:
    """The vectors of several windows together; each is in the sample by as many as it has rows."""
    held = list(parts)
    rate = min(len(p.sample) / p.count for p in held if p.count) if any(p.count for p in held) else 0.0
    rate = min(rate, VECTORS / max(1, sum(p.count for p in held)))
    return Vectors(
        sum(p.count for p in held),
        sum(p.missing for p in held),
        np.sum([p.total for p in held], axis=0),
        added(p.norms for p in held),
        np.concatenate([_thinned(p.sample, int(rate * p.count + 0.5)) for p in held]),
    )


def _thinned(sample: np.ndarray, wanted: int) -> np.ndarray:
    return sample[((np.arange(wanted) + 0.5) * len(sample) / max(1, wanted)).astype(int)]


def centroid_shift(reference: Vectors, current: Vectors) -> float:
    """Cosine distance of the mean vectors, 0 to 2.

    1 where only one side has a direction, 0 where neither has: no vectors, or they cancel out.
    """
    a, b = (side.total / max(1, side.count) for side in (reference, current))
    lengths = (float(np.linalg.norm(a)), float(np.linalg.norm(b)))
    if not all(lengths):
        return float(any(lengths))
    return float(np.clip(1 - (a / lengths[0]) @ (b / lengths[1]), 0.0, 2.0))


def tell_apart(reference: Vectors, current: Vectors, seed: int = 0) -> float:
    """How well a linear classifier tells the two windows' vectors apart on vectors that it did not learn: an AUC.

    Fisher's discriminant with a ridge, in closed form; learned on one half and judged on the other, and the other way
    round (Rabanser et al., NeurIPS 2019, call it a domain classifier). Both ways around it is the same. A value
    below one half is chance and counts as one half, and so does too little to learn from.

    Args:
        reference: One side.
        current: The other, of the same width.
        seed: Of the halves.
    """
    if min(len(reference.sample), len(current.sample)) < FEWEST_VECTORS:
        return 0.5
    halves = [_halves(side.sample, seed) for side in (reference, current)]
    both = [_auc(*(side[1 - i] @ _direction(*(s[i] for s in halves)) for side in halves)) for i in (0, 1)]
    return max(0.5, float(np.mean(both)))


def _halves(sample: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(sample))
    shuffled = sample[order].astype(np.float64)
    return shuffled[: len(order) // 2], shuffled[len(order) // 2 :]


def _direction(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    within = (np.cov(a, rowvar=False) + np.cov(b, rowvar=False)).reshape(a.shape[1], a.shape[1]) / 2
    ridge = RIDGE * np.trace(within) / len(within) or 1.0
    return np.linalg.solve(within + ridge * np.eye(len(within)), b.mean(axis=0) - a.mean(axis=0))


def _auc(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import rankdata  # a second to import, and every command imports this file

    ranks = rankdata(np.concatenate([a, b]))
    return float((ranks[len(a) :].sum() - len(b) * (len(b) + 1) / 2) / (len(a) * len(b)))
