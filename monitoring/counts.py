"""How often each value of a column occurred, in buckets that are the same for every window, so that counts add up.

A number is kept as the bucket of its distance from a fixed centre: sign, exponent and six bits of a float32, so
buckets are 1.6 % of the distance wide, and one bincount counts a million rows in milliseconds. What was counted apart
can be added, and two windows always meet on the same bins (as DDSketch keeps a relative error; Masson, Rim and Lee,
VLDB 2019). A category is its hash.

Shapes: N rows, K buckets that occur.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from engagement.table import MISSING

DROPPED_BITS = 17  # of a float32: what is left are sign, exponent and six bits
BUCKETS = 1 << (32 - DROPPED_BITS)
NO_NUMBER = -1  # bucket of what is missing, infinite or no number
OTHER = -2  # bucket of the categories beyond the most frequent
MOST_CATEGORIES = 1 << 17  # counted one by one in a window
SMALLEST = 1e-37  # distances from the centre below are none: among them all denormal numbers
CHUNK = 1 << 18  # rows at a time: bounds the memory


@dataclass(frozen=True)
class Counts:
    """How often each bucket of one column occurred.

    Attributes:
        keys: (K,) int64, ascending: bucket numbers, or hashes of categories (`MISSING` for none).
        counts: (K,) float64; whole numbers until they are weighed.
    """

    keys: np.ndarray
    counts: np.ndarray

    @classmethod
    def none(cls) -> "Counts":
        """Of no rows."""
        return cls(np.zeros(0, np.int64), np.zeros(0))

    @property
    def total(self) -> float:
        """Rows, those without a value included."""
        return float(self.counts.sum())

    def at(self, key: int) -> float:
        """Rows in one bucket."""
        return float(self.counts[self.keys == key].sum())

    def scaled(self, weight: float) -> "Counts":
        """Each count times `weight`."""
        return Counts(self.keys, self.counts * weight)

    def without(self, key: int) -> "Counts":
        """All buckets but one."""
        kept = self.keys != key
        return Counts(self.keys[kept], self.counts[kept])


def added(parts: Iterable[Counts]) -> Counts:
    """The counts of several windows together; a category that one has only among `OTHER` is there for all."""
    held = list(parts)
    if len(held) == 1:
        return held[0]
    keys = np.concatenate([p.keys for p in held]) if held else np.zeros(0, np.int64)
    counts = np.concatenate([p.counts for p in held]) if held else np.zeros(0)
    found, place = np.unique(keys, return_inverse=True)
    return _folded(Counts(found, np.bincount(place, counts, len(found))), held)


def numbers(values: np.ndarray, centre: float) -> Counts:
    """Counts of a numeric column (N,); NaN and infinities are in the bucket `NO_NUMBER`."""
    total = np.zeros(BUCKETS, np.int64)
    for start in range(0, len(values), CHUNK):
        total += _bucketed(values[start : start + CHUNK], centre)
    total[0] += total[_TINY].sum()
    keys = np.flatnonzero((total > 0) & ~_TINY & ~_NO_NUMBER)
    missing = total[_NO_NUMBER].sum()
    if not missing:
        return Counts(keys, total[keys].astype(float))
    return Counts(np.concatenate([[NO_NUMBER], keys]), np.concatenate([[missing], total[keys]]).astype(float))


def _bucketed(values: np.ndarray, centre: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        # Plus the negative centre, made so that it is never -0: then -0 and 0 meet in one bucket.
        apart = values.astype(np.float32) + np.float32(0.0 - centre)
    many = np.bincount(apart.view(np.uint32) >> DROPPED_BITS, minlength=BUCKETS)
    if many[_INFINITE].any():
        too_far = np.isinf(apart) & np.isfinite(values)  # for a float32, but a number still
        apart[too_far] = np.copysign(np.finfo(np.float32).max, apart[too_far])
        many = np.bincount(apart.view(np.uint32) >> DROPPED_BITS, minlength=BUCKETS)
    return many


def points(keys: np.ndarray, centre: float) -> np.ndarray:
    """(K,) float64: the middle of each bucket, in the column's own unit."""
    return _middles(keys) + float(np.float32(centre))


def _middles(keys: np.ndarray) -> np.ndarray:
    bits = (keys.astype(np.uint32) << DROPPED_BITS) | np.uint32(1 << (DROPPED_BITS - 1))
    middle = bits.view(np.float32).astype(np.float64)
    return np.where(np.abs(middle) < SMALLEST, 0.0, middle)


def categories(values: np.ndarray) -> Counts:
    """Counts of hashed categories (N,) int64; beyond the `MOST_CATEGORIES` most frequent they are one, `OTHER`."""
    tally = Tally()
    for start in range(0, len(values), CHUNK):
        tally.add(counted(values[start : start + CHUNK]))
    return tally.counts()


def counted(values: np.ndarray) -> Counts:
    """Counts of hashed categories (N,) int64, of every one; memory in proportion to N."""
    found = pl.Series("key", np.ascontiguousarray(values)).value_counts().sort("key")
    return Counts(found["key"].to_numpy(), found["count"].to_numpy().astype(float))


class Tally:
    """Adds up counts of many parts of one column in bounded memory."""

    def __init__(self) -> None:
        self._parts: list[Counts] = []
        self._held = 0

    def add(self, part: Counts) -> None:
        """One more part."""
        self._parts.append(part)
        self._held += len(part.keys)
        if self._held > 16 * MOST_CATEGORIES:
            self._parts = [trimmed(added(self._parts), 8 * MOST_CATEGORIES)]
            self._held = len(self._parts[0].keys)

    def counts(self) -> Counts:
        """Of all parts."""
        return trimmed(added(self._parts), MOST_CATEGORIES)


def trimmed(counts: Counts, most: int) -> Counts:
    """The most frequent categories, and all others as `OTHER`; what is missing stays by itself."""
    return kept(counts, most_frequent(counts, most))


def most_frequent(counts: Counts, most: int) -> np.ndarray:
    """(up to `most`,) the most frequent categories, ascending by hash; of equals those with the smaller hash."""
    known = np.flatnonzero((counts.keys != MISSING) & (counts.keys != OTHER))
    first = np.argsort(-counts.counts[known], kind="stable")[:most]
    return np.sort(counts.keys[known[first]])


def kept(counts: Counts, keys: np.ndarray) -> Counts:
    """These categories, and all others as `OTHER`.

    Where something is folded, a category that did not occur is kept with a count of nought: that it did not is known.
    """
    wanted = np.isin(counts.keys, keys) | (counts.keys == MISSING)
    if wanted.all():
        return counts
    absent = np.setdiff1d(keys, counts.keys, assume_unique=True) if not counts.at(OTHER) else np.zeros(0, np.int64)
    found = np.concatenate([[OTHER], counts.keys[wanted], absent]).astype(np.int64)
    many = np.concatenate([[counts.counts[~wanted].sum()], counts.counts[wanted], np.zeros(len(absent))])
    order = np.argsort(found)
    return Counts(found[order], many[order])


def _folded(counts: Counts, sides: Iterable[Counts]) -> Counts:
    """With what any side holds only among `OTHER` there."""
    known = np.ones(len(counts.keys), bool)
    for side in sides:
        if side.at(OTHER) > 0:
            known &= np.isin(counts.keys, side.keys) | (counts.keys == MISSING)
    if known.all():
        return counts
    return kept(counts, counts.keys[known & (counts.keys != OTHER)])


def aligned(reference: Counts, current: Counts, centre: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two windows on the same bins, for `monitoring.distance`; what is missing is left out.

    A category that one side has only among `OTHER` is counted there on both.

    Args:
        reference: One side.
        current: The other.
        centre: Of a numeric column; None for categories.

    Returns:
        (K,) where each bin lies, ascending (of categories just their place), and the counts of both sides, (K,) each.
    """
    gone = MISSING if centre is None else NO_NUMBER
    given = (reference.without(gone), current.without(gone))
    sides = given if centre is not None else tuple(_folded(side, given) for side in given)
    keys = np.union1d(sides[0].keys, sides[1].keys)
    counts = np.zeros((2, len(keys)))
    for many, side in zip(counts, sides, strict=True):
        many[np.searchsorted(keys, side.keys)] = side.counts
    if centre is None:
        return np.arange(len(keys)), counts[0], counts[1]
    at = points(keys, centre)
    order = np.argsort(at, kind="stable")
    return at[order], counts[0, order], counts[1, order]


def drawn(counts: Counts, centre: float, n: int) -> np.ndarray:
    """(n,) float64 values spread evenly over the distribution of a numeric column, ascending; missing ones NaN, last.

    Of no rows there are no values.
    """
    known = counts.without(NO_NUMBER)
    if not counts.total:
        return np.zeros(0)
    missing = round(n * counts.at(NO_NUMBER) / counts.total)
    at = points(known.keys, centre)
    order = np.argsort(at, kind="stable")
    return np.concatenate([at[order][_spread(known.counts[order], n - missing)], np.full(missing, np.nan)])


def drawn_categories(counts: Counts, names: Mapping[int, str], n: int) -> np.ndarray:
    """(n,) names, spread evenly over the distribution of a categorical column, the most frequent first.

    A category without a name is the start of its hash, as in `#1a2b3c`. Of no rows there are no values.
    """
    order = np.argsort(-counts.counts, kind="stable")
    special = {MISSING: "(missing)", OTHER: "(other)"}
    called = [special.get(key) or names.get(key) or f"#{key:016x}"[:7] for key in counts.keys[order].tolist()]
    return np.array(called, dtype=object)[_spread(counts.counts[order], n)]


def _spread(counts: np.ndarray, n: int) -> np.ndarray:
    """(n,) the bucket at the middle of each n-th part of the rows; of no rows (0,)."""
    ends = np.cumsum(counts)
    if not len(ends) or not ends[-1]:
        return np.zeros(0, np.int64)
    return np.searchsorted(ends, (np.arange(n) + 0.5) / n * ends[-1], side="right")


_INFINITE = np.array([0x7F80_0000, 0xFF80_0000]) >> DROPPED_BITS
_NO_NUMBER = (np.arange(BUCKETS) & _INFINITE[0]) == _INFINITE[0]
_TINY = np.zeros(BUCKETS, bool)
_TINY[~_NO_NUMBER] = _middles(np.flatnonzero(~_NO_NUMBER)) == 0
_TINY[0] = False  # where they go
