"""Embeddings of a window beside their like."""

import numpy as np

from monitoring.counts import Counts
from monitoring.vectors import FEWEST_VECTORS, Vectors, tell_apart


def apart(cells: list[Vectors | None], likes: np.ndarray, current: Vectors) -> tuple[float, np.ndarray] | None:
    """How well a classifier tells the window's vectors from those of the nearest of its likes.

    Args:
        cells: What each cell of the reference holds.
        likes: (L, C) weights of the cells in each like.
        current: The window's.

    Returns:
        Area under its curve, and the weights (C,) of the like; None if all likes or the window have too few vectors.
    """
    found = []
    for weights in likes:
        old = like_sample(cells, weights, len(current.sample))
        if min(len(old), len(current.sample)) >= FEWEST_VECTORS:
            held = Vectors(len(old), 0, old.sum(axis=0), Counts.none(), old)
            found.append((tell_apart(held, current), weights))
    return min(found, key=lambda f: f[0], default=None)


def like_sample(cells: list[Vectors | None], weights: np.ndarray, most: int) -> np.ndarray:
    """(up to `most`, D) vectors of the like: each cell's as often as it weighs, none twice."""
    held = [(v, w * v.count) for v, w in zip(cells, weights, strict=True) if v is not None and len(v.sample) and w > 0]
    if not held:
        return np.zeros((0, 0), np.float32)
    every = np.concatenate([v.sample for v, _ in held]).astype(np.float32)
    share = np.concatenate([np.full(len(v.sample), w / len(v.sample)) for v, w in held])
    at = (np.arange(most) + 0.5) / most * share.sum()
    return every[np.unique(np.searchsorted(np.cumsum(share), at).clip(max=len(every) - 1))]


def vectors_told(cells: list[Vectors | None], weights: np.ndarray, current: Vectors) -> str:
    """How the centre and the lengths of the vectors moved, in words."""
    old = like_sample(cells, weights, len(current.sample))
    centres = old.mean(axis=0), current.sample.mean(axis=0)
    lengths = [float(np.median(np.linalg.norm(side, axis=1))) for side in (old, current.sample)]
    moved = float(np.linalg.norm(centres[1] - centres[0])) / max(lengths[0], 1e-12)
    return f"centre moved by {moved:.0%} of a vector's length, median length {lengths[0]:.3g} → {lengths[1]:.3g}"
