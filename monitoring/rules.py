"""When a window counts as drifted, and what it must hold to be judged. Every number that decides is here.

Three things must not start a retrain: the noise of a small window, the ordinary week-to-week movement of a healthy
feed, and broken data. The first two are answered by thresholds that are calibrated on the feed's own past
(`calibrate.py`), the third by a verdict of its own.
"""

import math
import re
from datetime import timedelta

METHOD = {"numeric": "wasserstein", "categorical": "jensenshannon"}
"""The distance by kind of column, fixed: Evidently's own choice flips with the number of rows.

Numbers: first Wasserstein distance after the declared transform, in standard deviations of the like.
Categories: Jensen-Shannon distance (natural logarithm) over the `TOP_CATEGORIES`, the rest as one, and none."""

START = {"numeric": 0.0, "categorical": 0.0, "vocabulary": 0.0, "embedding": 0.5}
"""Scores of windows that are alike."""

PRIOR = {"numeric": 0.3, "categorical": 0.2, "vocabulary": 0.3, "embedding": 0.65}
"""Thresholds by kind of column while no past window has told what is usual.

A vocabulary's score is a share of rows; an embedding's the area under the curve of a classifier, 0.5 if it learned
nothing."""

LEAST = {"numeric": 0.1, "categorical": 0.05, "vocabulary": 0.03, "embedding": 0.55}
MOST = {"numeric": math.inf, "categorical": 0.75, "vocabulary": 0.97, "embedding": 0.97}
"""No threshold is below the one, however still the past was (what moves less does not matter to a ranker), nor above
the other (what moves more is drift, however wild the past was)."""

FALSE_ALARMS = 0.3
"""Columns that may pass their threshold by chance in a month, all columns together, while nothing moves.

Over simulated streams (`benchmarks/drift`), 0.2 to 0.3 leaves 0.2 alarms a month and every drift is found within two
checks; at 0.5 it is 0.7, at 0.1 slow drifts are found later."""

EPISODE_HOURS = 6
"""Checks within so many hours see the same weather: a month has 720 / 6 chances of a false alarm.

Also where windows are longer. They slide on from check to check, so that there is always a next chance, and they
overlap, so that a second check confirms nothing; no more is asked of the single check where windows are short. Of five
months of MovieLens in windows of a week, 3 bursts are left of 14 with a chance a window."""

PRIOR_SPREAD = 0.08
PRIOR_WEIGHT = 4.0
MOST_DF = 12.0
"""Standard deviation of the roots of scores expected beforehand, how many windows that opinion weighs, and the degrees
of freedom that no number of windows exceeds: scores have heavier tails than the normal."""

PAST_WINDOWS = 60
"""Past windows that calibrate a model's thresholds, at most; an update inherits its parent's and adds its own."""

PAST_MOST = 56
"""Days of the training window, the newest, that past windows are taken from."""

PAST_DAYS = 7
"""A past window counts if the days before it that were known are **≥** this, and **≥** its own length: the first
weekend that a feed sees is no measure of the later ones."""

AGES = (0, 2, 4, 7)
"""Days between a reference's end and a window's start, in turn: so old is what a model learned when it is checked.

It is retrained twice a week, on what is older than the evidence that it is judged by."""

NEW = "new "
"""And the name of a column: the share of its values that the model never learned."""

TOP_CATEGORIES = 30
"""Categories compared one by one, the most frequent of the reference; the others count as one."""

CLOCKS = ("hour_of_day", "day_of_week")
"""Features that are not compared: a window is held against the same hours and weekdays, so they cannot differ."""

KEEP_DAYS = 28
"""A reference keeps the newest days that the model or its parents learned: four of each weekday."""

CELL_VECTORS = 64
"""Vectors of an embedding that a reference keeps of each six hours."""

HOURS = (1, 2, 3, 6, 12, 24, 48, 72, 168)
"""Lengths that the window of a check can have."""

ENOUGH_ROWS = 2_000
ENOUGH_USERS = 50
"""A check's window is the shortest whose median over the training window is **≥** both, else the longest."""

HOURS_WINDOWS = 200
"""So many windows, the newest, are looked at to choose a length."""

MIN_ROWS = 200
MIN_USERS = 10
"""A window can be judged if it holds **≥** `MIN_ROWS` rows by **≥** `MIN_USERS` users."""

BROKEN_MISSING = 0.2
GONE_MISSING = 0.5
USUAL_RISES = 3.0
"""A feature is broken if its share of missing values rose by **≥** `BROKEN_MISSING` and by **≥** `USUAL_RISES` times
the largest rise of any past window, or by **≥** `GONE_MISSING` whatever the past."""

MISSING_RISE = "missing "
"""And the name of a column, in `Reference.usual`: how much its share of missing values rose at most, by training."""

STRANGERS = 0.9
"""New users (or items) have no trailing numbers yet: those may be missing in as many more rows as there are new ones.
From this share of new ones on it is the ids themselves that look wrong, and they excuse nothing."""

EMPTIED_USERS = 10
"""A feature without a single value is broken if **≥** so many of the window's users should have had one."""

STUCK_SHARE = 0.5
"""A feature is broken, too, if it holds a single value now, while none held **>** this share before."""


def column_drifted(score: float, threshold: float) -> bool:
    """Whether one column drifted: `score ≥ threshold`."""
    return score >= threshold


def level(columns: int) -> float:
    """Chance of passing a threshold that each column may take: `FALSE_ALARMS` shared between columns and episodes."""
    return FALSE_ALARMS / (max(columns, 1) * 720 / EPISODE_HOURS)


def thin(users: float, usual: float) -> float:
    """How much steadier a window of the usual number of users is: `sqrt(users / usual)`, at most 1."""
    return float(min(1.0, (max(users, 1) / max(usual, 1)) ** 0.5))


def aged(kind: str, days: float) -> float:
    """How much further than the oldest of `AGES` a column may be from what was learned so many days ago.

    The share of new values grows with time, at most in proportion to it: the old ones leave ever more slowly.
    """
    return max(1.0, days / AGES[-1]) if kind == "vocabulary" else 1.0


def too_small(rows: int, users: int) -> bool:
    """Whether a window is too small to be judged: `rows < MIN_ROWS` or `users < MIN_USERS`."""
    return rows < MIN_ROWS or users < MIN_USERS


def missing_broken(reference: float, current: float, usual: float = 0.0) -> bool:
    """Whether missing values rose so much that the feed is broken; `usual` is the largest rise of past windows."""
    rise = current - reference
    return rise >= GONE_MISSING or rise >= max(BROKEN_MISSING, USUAL_RISES * usual)


def still_filling(name: str, age: timedelta) -> bool:
    """Whether a trailing number, `..._30d`, looks back further than anything was learned: a young log's only grows."""
    days = re.search(r"_(\d+)d$", name)
    return days is not None and age < timedelta(days=int(days[1]))


def emptied(reference_missing: float, users: int) -> bool:
    """Whether it is no chance that a feature has no value at all in a window of so many users."""
    return (1 - reference_missing) * users >= EMPTIED_USERS


def stuck(reference_mode: float, current_values: int) -> bool:
    """Whether a feature froze: one value now, and no value held more than `STUCK_SHARE` of the reference."""
    return current_values == 1 and reference_mode <= STUCK_SHARE


TRAILING = ("days_since_action",)
"""Features that tell what people did, beside those of a `_stats` view."""
