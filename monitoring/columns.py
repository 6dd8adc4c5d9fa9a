"""One column of a window beside its like: what is compared with what, and how far apart they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engagement.table import MISSING, Feature, Level, TableSpec
from monitoring import distance, rules
from monitoring.sketch import IDS, NO_NUMBER, OTHER, SCORE, Counts, Vocabulary, aligned

Size = tuple[float, float]
"""Requests and candidates of a window; weighed ones need not be whole."""


@dataclass(frozen=True)
class Column:
    """What is compared of one feature or prediction.

    Attributes:
        name: Of the feature, or `score_<action>`.
        kind: `numeric` or `categorical`.
        group: As in `ColumnDrift`.
        centre: Of its buckets, if numeric.
        width: Of a list of categories, counted value by value; 0 for a single value.
        transform: Of numbers, before they are stored.
        level: Of the feature: a request's counts once a request, a candidate's once a candidate.
    """

    name: str
    kind: str
    group: str
    centre: float = 0.0
    width: int = 0
    transform: str = "none"
    level: Level = "candidate"

    def known(self, counts: Counts) -> Counts:
        """What is compared: numbers that are there; of single categories with what is missing, as one more."""
        if self.kind == "numeric":
            return counts.without(NO_NUMBER)
        return counts.without(MISSING) if self.width else counts

    def missing(self, counts: Counts, size: Size) -> float:
        """Share of the rows that have no value at all.

        Args:
            counts: Of the column; of a list, `MISSING` is counted once a row without any value.
            size: Of the window.
        """
        rows = size[0] if self.level == "request" else size[1]
        return counts.at(NO_NUMBER if self.kind == "numeric" else MISSING) / rows if rows else 0.0

    def score(self, like: Counts, current: Counts) -> float:
        """The distance of a window from one like; both hold a value."""
        if self.kind == "numeric":
            return distance.wasserstein(*aligned(self.known(like), self.known(current), self.centre))
        return distance.jensenshannon(*folded(self.known(like), self.known(current)))

    def nearest(self, likes: Sequence[Counts], current: Counts) -> tuple[float, Counts]:
        """The distance of a window from the nearest of its likes, and which that is; all hold a value."""
        scores = [self.score(like, current) for like in likes]
        best = min(range(len(scores)), key=scores.__getitem__)
        return scores[best], likes[best]


def folded(like: Counts, current: Counts) -> tuple[np.ndarray, np.ndarray]:
    """(K,) counts of the most frequent categories of the like, of all others, and of none, on both sides."""
    named = np.flatnonzero((like.keys != OTHER) & (like.keys != MISSING))
    top = np.sort(like.keys[named[np.argsort(-like.counts[named], kind="stable")[: rules.TOP_CATEGORIES]]])
    sides = []
    for side in (like, current):
        at = np.minimum(np.searchsorted(top, side.keys), max(len(top) - 1, 0))
        place = np.where(np.isin(side.keys, top), at, len(top))
        place[side.keys == MISSING] = len(top) + 1
        sides.append(np.bincount(place, side.counts, len(top) + 2))
    return sides[0], sides[1]


def columns_of(spec: TableSpec, centres: Mapping[str, float]) -> tuple[Column, ...]:
    """Every declared feature that is compared by its counts."""
    return tuple(
        Column(
            f.name,
            "categorical" if f.hashed else "numeric",
            group_of(f),
            centres.get(f.name, 0.0),
            f.width if f.kind == "categories" else 0,
            f.transform,
            f.level,
        )
        for f in spec.features
        if f.kind != "embedding" and f.name not in (*IDS, *rules.CLOCKS)
    )


def vocabularies_of(known: Mapping[str, Vocabulary]) -> tuple[str, ...]:
    """Columns whose new values are counted: ids, and categories too many to be compared one by one."""
    least = {n: 0 if n in IDS else rules.TOP_CATEGORIES for n in known}
    return tuple(n for n in sorted(known) if known[n].distinct > least[n])


def predictions_of(spec: TableSpec) -> tuple[Column, ...]:
    """The predicted score of each action."""
    return tuple(Column(SCORE + a, "numeric", "prediction") for a in spec.actions)


def group_of(feature: Feature) -> str:
    """What a feature tells of: its name says so, as the feature declarations name them (`user_stats__...`)."""
    room = feature.name.split("__")[0]
    if room.endswith("_stats") or feature.name in rules.TRAILING:
        return "statistic"
    if room.startswith("context") or feature.name in rules.CLOCKS:
        return "context"
    return "user" if feature.level == "request" else "item"
