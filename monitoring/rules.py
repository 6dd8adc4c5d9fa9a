"""When a window counts as drifted. Every number that decides is here, with its exact rule.

A check compares the window since the last training with a sample of the window on which the serving model
was trained. Three things must not start a retrain: the noise of a small window, the ordinary week-to-week
movement of a healthy feed, and broken data. The first is answered by a noise floor a column (`noise.py`), the
second by the thresholds below, the third by a verdict of its own.
"""

from collections.abc import Mapping
from typing import Literal

Kind = Literal["numeric", "categorical"]

METHOD: dict[Kind, str] = {"numeric": "wasserstein", "categorical": "jensenshannon"}
"""The distance by kind of column, fixed: Evidently's own choice flips with the number of rows.

Numbers: first Wasserstein distance after the declared transform, in standard deviations of the reference.
Categories: Jensen-Shannon distance (natural logarithm) over the `TOP_CATEGORIES` and the rest as one."""

THRESHOLD: dict[Kind, float] = {"numeric": 0.3, "categorical": 0.2}
"""A column drifted if its score is **≥** the larger of this and its noise floor.

Larger than the universal 0.1: see docs/monitoring.md for what two ordinary weeks of real feeds score."""

DRIFT_SHARE = 0.4
"""The window drifted if the share of drifted features among the tested ones (`drift_share`) is **≥** this."""

TOGETHER = "_stats__"
"""Trailing numbers of one view, which have this in their name, weigh as much as one other feature.

There are fourteen a view, all counting the same rows: each with a vote of its own, they would outvote the world."""

CLOCKS = ("hour_of_day", "day_of_week")
"""Features that are never compared: a window of three days holds three weekdays, whatever happens in the world."""

MIN_ROWS = 200
MIN_USERS = 10
"""A window can be judged if it holds **≥** `MIN_ROWS` rows by **≥** `MIN_USERS` users; so must the reference.

Fewer users than that can be re-drawn in too few ways for a noise floor to mean anything."""

BROKEN_MISSING = 0.5
"""A feature is broken if its share of missing values rose by **≥** this since the reference, or if gone."""

STUCK_SHARE = 0.5
"""A feature is broken, too, if it holds a single value now, while none held **>** this share before."""

TOP_CATEGORIES = 30
"""Categories compared one by one, the most frequent of both windows together; the others count as one."""

MAX_ROWS = 20_000
"""Rows of a window that are compared: whole requests in the order of a seeded hash until this is reached."""

REFERENCE_ROWS = 10_000
"""Rows of the training window that travel with a model."""


def column_drifted(score: float, threshold: float) -> bool:
    """Whether one column drifted: `score ≥ threshold`."""
    return score >= threshold


def drift_share(drifted: Mapping[str, bool]) -> float:
    """Share of drifted features, given for each tested one whether it drifted; trailing numbers weigh `TOGETHER`."""
    groups: dict[str, list[bool]] = {}
    for name, moved in drifted.items():
        groups.setdefault(name.split("__")[0] if TOGETHER in name else name, []).append(moved)
    return sum(sum(g) / len(g) for g in groups.values()) / len(groups) if groups else 0.0


def window_drifted(share: float, prediction: bool) -> bool:
    """Whether the window drifted: enough of the features, or the primary action's predicted score.

    The score counts alone because it is what users feel: features can all move a little and cancel, or one
    feature that carries the model can move a lot.
    """
    return prediction or share >= DRIFT_SHARE


def too_small(rows: int, users: int) -> bool:
    """Whether a window is too small to be judged: `rows < MIN_ROWS` or `users < MIN_USERS`."""
    return rows < MIN_ROWS or users < MIN_USERS


def missing_broken(reference: float, current: float) -> bool:
    """Whether missing values rose so much that the feed is broken: `current - reference ≥ BROKEN_MISSING`."""
    return current - reference >= BROKEN_MISSING


def stuck(reference_mode: float, current_values: int) -> bool:
    """Whether a feature froze: one value now, and no value held more than `STUCK_SHARE` of the reference."""
    return current_values == 1 and reference_mode <= STUCK_SHARE
