"""How the features of a day look: what is missing, what is stuck. From a table, or from a model's reference."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engagement.table import MISSING, Feature, RankingTable, TableSpec
from monitoring.like import BLOCKS, Cell
from monitoring.sketch import NO_NUMBER, Sketch, feature_blocks, together

LEAST_USERS = 20
"""Days are judged if they had **≥** this many users: fewer can all stay at home, or all be alike."""

LEAST_ROWS = 200
"""And features on days with **≥** this many rows."""


@dataclass(frozen=True)
class Filled:
    """How a feature looks on one day.

    Attributes:
        missing: Share of the rows (or requests) without any value.
        same: Share of the values that are one and the same, if that is more than half of them; else any lesser number.
    """

    missing: float
    same: float


Look = Mapping[str, Filled]
"""Of one day, by feature."""


def look(table: RankingTable) -> Look:
    """How every feature of a table looks; empty for a table that is too small to tell."""
    if table.rows < LEAST_ROWS or len(np.unique(table.user_id)) < LEAST_USERS:
        return {}
    return {feature.name: _filled(block, feature) for feature, block in feature_blocks(table)}


def _filled(block: np.ndarray, feature: Feature) -> Filled:
    values = np.asarray(block)
    has = values != MISSING if feature.hashed else np.isfinite(values)
    missing = float(1 - (has.all(1) if feature.kind == "embedding" else has.any(1)).mean())
    found = values[has]
    if feature.kind == "embedding" or not len(found):
        return Filled(missing, 0.0)
    # What more than half of the values are is their median, too: no need to sort them.
    middle = np.partition(found, len(found) // 2)[len(found) // 2]
    return Filled(missing, float((found == middle).mean()))


def looks_of(spec: TableSpec, cells: Mapping[Cell, Sketch]) -> list[Look]:
    """How features looked on each day of a model's reference.

    Args:
        spec: What the columns mean.
        cells: The reference's sketches, by week and cell of the week.
    """
    days: dict[tuple[str, int], list[Sketch]] = {}
    for (week, cell), held in cells.items():
        days.setdefault((week, cell // BLOCKS), []).append(held)
    features = {f.name: f for f in spec.features}
    return [_looked(together(parts), features) for _, parts in sorted(days.items())]


def _looked(day: Sketch, features: Mapping[str, Feature]) -> Look:
    if day.rows < LEAST_ROWS or day.requests < LEAST_USERS:  # a reference does not count each day's users
        return {}
    looks = {}
    for name, counts in day.columns.items():
        feature = features[name]
        gone = MISSING if feature.hashed else NO_NUMBER
        known, rows = counts.without(gone), day.requests if feature.level == "request" else day.rows
        same = float(known.counts.max()) / known.total if known.total else 0.0
        looks[name] = Filled(counts.at(gone) / rows, same)
    for name, held in day.vectors.items():
        looks[name] = Filled(held.missing / max(1, held.count + held.missing), 0.0)
    return looks
