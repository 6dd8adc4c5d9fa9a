"""How a column's values map to those of the reference: the marks of another unit and of a default value."""

from typing import TYPE_CHECKING

import numpy as np

from engagement.table import MISSING
from monitoring.counts import NO_NUMBER, OTHER, Counts, points
from monitoring.distance import jensenshannon

if TYPE_CHECKING:
    from monitoring.compare import Pair

LEVELS = np.linspace(0.05, 0.95, 19)

UNIT_FACTOR = 5.0
"""A map of values is another unit from this factor on, either way; people and markets differ by less."""

UNIT_SHIFT = 4.0
"""Likewise for a shift of all values, in standard deviations of the reference."""

UNIT_RESIDUE = 0.06
"""Quantiles may stray so far from a straight line, as a share of their spread: buckets and samples are coarse."""

DEFAULT_GAIN = 0.2
"""A default value took at least this share of the rows."""

DEFAULT_RESIDUE = 0.18
"""And the rest is as it was: Jensen-Shannon distance of all other values **<** this."""

NEARLY_ZERO = 0.01
"""The middle of the bucket that holds 0 is not 0 but may be so far from it."""

COARSE = 16
"""Numbers are held against each other in so many quantile bins where the default is looked for."""


def unit_change(pair: "Pair") -> str:
    """In words, if the values are those of the reference by another unit: a straight map of the quantiles."""
    if pair.kind != "numeric":
        return ""
    before, now = _quantiles(pair.reference, pair.centre), _quantiles(pair.current, pair.centre)
    if before is None or now is None or np.ptp(now) <= 0 or np.ptp(before) <= 0:
        return ""
    factor, shift = np.polyfit(before, now, 1)
    residue = np.abs(now - (factor * before + shift)).max() / np.ptp(now)
    moved = abs(np.median(now) - np.median(before)) / _spread(pair)
    if residue < UNIT_RESIDUE and not 1 / UNIT_FACTOR < factor < UNIT_FACTOR:
        return f"looks like another unit: values are {abs(factor):.3g} times what they were"
    if residue < UNIT_RESIDUE and moved >= UNIT_SHIFT:
        return f"looks like another unit: values are shifted by {shift:+.3g}, their shape is the same"
    return _log_factor(before, now)


def _log_factor(before: np.ndarray, now: np.ndarray) -> str:
    """The same for numbers that are stored as log(1 + x): there a factor is a shift of what is large."""
    if min(before.min(), now.min()) < -NEARLY_ZERO or now.max() > 50:
        return ""
    known = (before > NEARLY_ZERO) & (now > NEARLY_ZERO)
    either = (before > NEARLY_ZERO) | (now > NEARLY_ZERO)
    if known.sum() < len(LEVELS) // 2 or (known != either).sum() > 1:
        return ""
    factors = np.log(np.expm1(now[known])) - np.log(np.expm1(before[known]))
    usual = float(np.median(factors))
    if abs(usual) < np.log(UNIT_FACTOR) or np.abs(factors - usual).max() > 0.25 * abs(usual):
        return ""
    return f"looks like another unit: before the logarithm, values are about {np.exp(usual):.3g} times what they were"


def default_fill(pair: "Pair") -> str:
    """In words, if one value took many rows from all the others evenly."""
    keys = np.union1d(pair.reference.keys, pair.current.keys)
    before, now = _shares(pair.reference, keys), _shares(pair.current, keys)
    gain = now - before
    gain[keys == OTHER] = 0
    most = int(np.argmax(gain))
    if gain[most] < DEFAULT_GAIN or now[most] >= 1:
        return ""
    others = np.delete(np.stack([before, now]), most, axis=1)
    if pair.kind == "numeric":
        others = _coarse(np.delete(keys, most), others, pair.centre)
    if jensenshannon(*others) >= DEFAULT_RESIDUE:
        return ""
    grew = f"{before[most]:.0%} → {now[most]:.0%} of the rows"
    return f"looks filled with a default: {_value(pair, int(keys[most]))} {grew}, at the cost of all others alike"


def _value(pair: "Pair", key: int) -> str:
    if key == (NO_NUMBER if pair.kind == "numeric" else MISSING):
        return "no value"
    if pair.kind == "numeric":
        value = points(np.array([key]), pair.centre)[0]
        return f"{value if abs(value) > NEARLY_ZERO * abs(pair.centre) else 0:.3g}"
    return f'"{pair.names[key]}"' if key in pair.names else "one unknown value"


def _shares(counts: Counts, keys: np.ndarray) -> np.ndarray:
    found = np.zeros(len(keys))
    found[np.searchsorted(keys, counts.keys)] = counts.counts
    return found / max(found.sum(), 1e-12)


def _coarse(keys: np.ndarray, sides: np.ndarray, centre: float) -> np.ndarray:
    """Both sides (2, K) in quantile bins of the first."""
    order = np.argsort(points(keys, centre), kind="stable")
    sides = sides[:, order]
    rank = np.cumsum(sides[0]) / max(sides[0].sum(), 1e-12)
    bins = np.minimum((rank * COARSE).astype(int), COARSE - 1)
    return np.stack([np.bincount(bins, side, COARSE) for side in sides])


def _quantiles(counts: Counts, centre: float) -> np.ndarray | None:
    """The column's value at each of `LEVELS`; None of no rows."""
    known = counts.without(NO_NUMBER)
    if known.total <= 0:
        return None
    values = points(known.keys, centre)
    order = np.argsort(values, kind="stable")
    rank = np.cumsum(known.counts[order]) / known.total
    return values[order][np.minimum(np.searchsorted(rank, LEVELS), len(values) - 1)]


def _spread(pair: "Pair") -> float:
    """Standard deviation of the reference."""
    known = pair.reference.without(NO_NUMBER)
    values = points(known.keys, pair.centre)
    mean = known.counts @ values / known.total
    return float(max(np.sqrt(known.counts @ np.square(values - mean) / known.total), 1e-9))
