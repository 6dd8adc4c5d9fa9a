"""The cells of a reference, column by column, so that any mix of them is one product.

Shapes: C cells, K buckets that occur in any of them, W windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from monitoring.columns import Size
from monitoring.like import Cell, like, newest
from monitoring.sketch import Counts, Sketch


@dataclass(frozen=True)
class Stack:
    """Counts of all columns in all cells.

    Attributes:
        cells: (C,) which they are, in order of time.
        kinds: (C,) which of the 28 each one is.
        requests: (C,) how many requests each holds.
        rows: (C,) how many candidates.
        columns: By name, the buckets (K,) int64, ascending, and the counts (C, K), sparse.
    """

    cells: tuple[Cell, ...]
    kinds: np.ndarray
    requests: np.ndarray
    rows: np.ndarray
    columns: Mapping[str, tuple[np.ndarray, sparse.csr_array]]

    @classmethod
    def of(cls, cells: Mapping[Cell, Sketch]) -> "Stack":
        """Of the sketches of all cells."""
        held = list(cells.values())
        names = dict.fromkeys(name for s in held for name in s.columns)
        return cls(
            tuple(cells),
            np.array([c[1] for c in cells], np.int64),
            np.array([s.requests for s in held], float),
            np.array([s.rows for s in held], float),
            {n: _stacked([s.columns.get(n, Counts.none()) for s in held]) for n in names},
        )

    def size(self, weights: np.ndarray) -> Size:
        """Requests and candidates behind a mix of the cells."""
        return float(weights @ self.requests), float(weights @ self.rows)

    def likes(self, usable: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """(2, C) weights of the cells in both likes of a window: of all that is known, and of the newest.

        Args:
            usable: (C,) bool: which cells may be used.
            wanted: (28,) requests of the window by cell.
        """
        requests = np.where(usable, self.requests, 0)
        return np.stack([like(self.kinds, requests, wanted), newest(self.kinds, requests, wanted)])

    def mixes(self, name: str, weights: np.ndarray) -> list[Counts]:
        """The counts of one column in several mixes, (W, C): each cell times its weight."""
        keys, counts = self.columns[name]
        return [Counts(keys[row > 0], row[row > 0]) for row in weights @ counts]


def _stacked(parts: list[Counts]) -> tuple[np.ndarray, sparse.csr_array]:
    every = np.concatenate([p.keys for p in parts])
    keys, place = np.unique(every, return_inverse=True)
    ends = np.cumsum([0, *(len(p.keys) for p in parts)])
    counts = np.concatenate([p.counts for p in parts])
    return keys, sparse.csr_array((counts, place, ends), shape=(len(parts), len(keys)))
