"""A window held against its like in the reference of a model, column by column."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

import numpy as np

from engagement.table import MISSING, Feature, Level, RankingTable, TableSpec
from monitoring import rules
from monitoring.calibrate import threshold
from monitoring.columns import Column, columns_of, group_of, predictions_of, vocabularies_of
from monitoring.like import composition, older
from monitoring.reference import Reference
from monitoring.sketch import IDS, OTHER, Counts, Sketch, Vectors, feature_blocks, points, sketch, unseen
from monitoring.stack import Stack
from monitoring.vector_drift import apart, vectors_told
from monitoring.verdict import ColumnDrift

LEVELS: tuple[Level, ...] = ("request", "candidate")
EVERYTHING = "everything"  # in place of a column: why nothing at all was compared

Names = Mapping[str, Mapping[int, str]]
"""Names of hashed categories, as far as they are known: by column, then by hash."""


@dataclass(frozen=True)
class Window:
    """What a check looks at.

    Attributes:
        start: Requests from this instant on.
        end: And before this one.
        table: All of these requests.
        part: Those of them that were scored, a sample where there are many.
        scores: (rows of `part`, A) predicted chances.
        names: Of categories.
    """

    start: datetime
    end: datetime
    table: RankingTable
    part: RankingTable
    scores: np.ndarray
    names: Names

    @classmethod
    def empty(cls, spec: TableSpec, start: datetime, end: datetime) -> "Window":
        """One in which nothing was shown."""
        none, ids = np.zeros(0, np.int64), np.zeros(0, np.bytes_)
        cat = {level: np.zeros((0, spec.width(level, True)), np.int64) for level in LEVELS}
        num = {level: np.zeros((0, spec.width(level, False)), np.float32) for level in LEVELS}
        table = RankingTable(
            spec=spec,
            request_id=ids,
            user_id=ids,
            time=none,
            offsets=np.zeros(1, np.int64),
            history_start=none,
            history_end=none,
            request_cat=cat["request"],
            request_num=num["request"],
            item_id=ids,
            item_cat=cat["candidate"],
            item_num=num["candidate"],
            labels=np.zeros((0, len(spec.actions)), np.uint8),
            sampled=np.zeros(0, bool),
            history_time=none,
            history_item=none,
            history_actions=none,
        )
        return cls(start, end, table, table, np.zeros((0, len(spec.actions))), {})


@dataclass(frozen=True)
class Pair:
    """Both sides of one numeric or categorical column, for pages and plots.

    Attributes:
        name: Of the column.
        kind: `numeric` or `categorical`.
        centre: Of its buckets, if numeric.
        reference: The nearest of its likes, weighed to the window's mix of hours; counts need not be whole.
        current: The window.
        names: Of the categories, by hash.
    """

    name: str
    kind: str
    centre: float
    reference: Counts
    current: Counts
    names: Mapping[int, str]


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` found; the fields are those of `DriftVerdict`, and the pairs of what was compared."""

    columns: tuple[ColumnDrift, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()


def compare(reference: Reference, window: Window) -> Comparison:
    """Compare a window with the nearest of its likes, column by column."""
    users = len(np.unique(window.table.user_id))
    if not window.table.requests:
        return Comparison(skipped={EVERYTHING: "the window holds no requests"})
    if rules.too_small(window.table.rows, users):
        few = f"{window.table.rows} rows by {users} users are too few to tell"
        return Comparison(skipped={EVERYTHING: few})
    found = _Finder(reference, window, users)
    found.features()
    found.predictions()
    return found.done()


@dataclass(frozen=True)
class _Measured:
    """One column before its threshold is known, which depends on how many there are."""

    column: Column
    score: float
    missing: tuple[float, float]
    note: Callable[[], str]
    pair: Pair | None = None

    @property
    def finite(self) -> bool:
        """Whether there is a score that can be held against a threshold."""
        return bool(np.isfinite(self.score))


class _Finder:
    """Collects what one comparison finds."""

    def __init__(self, reference: Reference, window: Window, users: int) -> None:
        self.reference, self.window = reference, window
        self.thin = reference.thin(users, window.table.rows)
        self.broken, self.skipped = declared(reference.spec, window.table.spec)
        self.users = users
        self.new = self._new_shares()
        self.measured: list[_Measured] = []

    def features(self) -> None:
        """Compare what is declared on both sides."""
        reference, table = self.reference, self.window.table
        seen = sketch(table, reference.centres)
        likes = likes_of(reference.stack, self.window.start, composition(table, reference.holidays))
        age = self.window.start - (reference.began or reference.start)
        for column in columns_of(reference.spec, reference.centres):
            if column.group == "statistic" and rules.still_filling(column.name, age):
                self.skipped[column.name] = f"counts more days than the {age.days} that were learned: it still fills"
            elif column.name not in self.broken:
                self._counts(column, reference.stack, likes, seen)
        for feature in reference.spec.features:
            if feature.kind == "embedding" and feature.name not in self.broken:
                self._vectors(Column(feature.name, "embedding", group_of(feature)), likes, seen.vectors[feature.name])
        self._new_values()

    def predictions(self) -> None:
        """Compare what the model predicts, where it was asked."""
        stack, part = self.reference.predicted, self.window.part
        if not part.requests or not stack.cells:
            return
        seen = sketch(part, {}, self.window.scores)
        likes = likes_of(stack, self.window.start, composition(part, self.reference.holidays))
        for column in predictions_of(self.reference.spec):
            if column.name in stack.columns and column.name in seen.columns:
                self._counts(column, stack, likes, seen)

    def _counts(self, column: Column, stack: Stack, likes: np.ndarray, seen: Sketch) -> None:
        sides = stack.mixes(column.name, likes) if column.name in stack.columns else [Counts.none()]
        new = seen.columns[column.name]
        # What a model learned last may be broken, too: that a column is, all weeks tell.
        old, filled = sides[0], [side for side in sides if column.known(side).total]
        missing = (column.missing(old, stack.size(likes[0])), column.missing(new, (seen.requests, seen.rows)))
        before, now = column.known(old), column.known(new)
        names = {**self.reference.names.get(column.name, {}), **self.window.names.get(column.name, {})}
        if not before.total:
            self.skipped[column.name] = "has no values in the reference"
            return
        rises = self.reference.usual.get(rules.MISSING_RISE + column.name, ())
        if rules.missing_broken(missing[0] + self._newcomers(column), missing[1], max(rises, default=0.0)):
            self.broken[column.name] = f"is missing in {missing[1]:.0%} of its rows, {missing[0]:.0%} before"
        elif rules.stuck(float(before.counts.max() / before.total), len(now.keys)):
            self.broken[column.name] = f"is stuck at one value, {named(column, names, int(now.keys[0]))}"
        if not now.total:
            if rules.emptied(missing[0], self.users):
                self.broken.setdefault(column.name, f"has no value at all, {1 - missing[0]:.0%} of its rows had before")
            if column.name not in self.broken:
                self.skipped[column.name] = "has no values in the window"
            return
        if len(before.keys) == 1 and np.array_equal(before.keys, now.keys):
            self.skipped[column.name] = "is the same everywhere, before and now"
            return
        score, nearest = column.nearest(filled, new)
        pair = Pair(column.name, column.kind, column.centre, nearest, new, names)
        self.measured.append(_Measured(column, score, missing, lambda: told(column, pair), pair))

    def _vectors(self, column: Column, likes: np.ndarray, now: Vectors) -> None:
        cells = [s.vectors.get(column.name) for s in self.reference.cells.values()]
        held = sum(v.count for v in cells if v)
        gone = sum(v.missing for v in cells if v)
        missing = (gone / max(held + gone, 1), now.missing / max(now.count + now.missing, 1))
        if rules.missing_broken(*missing):
            self.broken[column.name] = f"is missing in {missing[1]:.0%} of its rows, {missing[0]:.0%} before"
        nearest = apart(cells, likes, now)
        if nearest is None:
            self.skipped.setdefault(column.name, "has no vectors to compare")
            return
        score, weights = nearest
        self.measured.append(_Measured(column, score, missing, lambda: vectors_told(cells, weights, now)))

    def _newcomers(self, column: Column) -> float:
        """Share of the rows in which a trailing number may be missing because the user or the item is new."""
        share = max((self.new[n][0] for n in IDS if n in self.new), default=0.0)
        return share if column.group == "statistic" and share < rules.STRANGERS else 0.0

    def _new_shares(self) -> dict[str, tuple[float, float, Feature]]:
        """By hashed column: share of its values that are new, share of them that are missing, and the feature."""
        blocks = {f.name: (f, block) for f, block in feature_blocks(self.window.table)}
        found = {}
        for name in vocabularies_of(self.reference.vocabularies):
            if name not in self.broken:
                feature, block = blocks[name]
                share = unseen(self.reference.vocabularies[name], block.ravel())
                found[name] = (share, float((block == MISSING).mean()), feature)
        return {name: told for name, told in found.items() if np.isfinite(told[0])}

    def _new_values(self) -> None:
        for name, (share, gone, feature) in self.new.items():
            known = self.reference.vocabularies[name].distinct
            note = f"{share:.0%} of its values are new to the model, which knows {known:,.0f}"
            column = Column(rules.NEW + name, "vocabulary", group_of(feature))
            self.measured.append(_Measured(column, share, (0.0, gone), partial(str, note)))

    def done(self) -> Comparison:
        """Everything, each score beside its threshold."""
        found = []
        self.skipped |= {m.column.name: "cannot be compared: no finite score" for m in self.measured if not m.finite}
        measured = [m for m in self.measured if m.finite]
        age = (self.window.start - self.reference.end) / timedelta(days=1)
        for m in measured:
            past = self.reference.usual.get(m.column.name, ())
            thin = self.thin / rules.aged(m.column.kind, age)
            limit = threshold(m.column.kind, past, len(measured), self.reference.hours, thin)
            drifted = rules.column_drifted(m.score, limit)
            usual = float(np.median(past)) if past else 0.0
            found.append(
                ColumnDrift(
                    m.column.name,
                    m.column.kind,
                    m.column.group,
                    m.score,
                    usual,
                    limit,
                    drifted,
                    m.missing,
                    m.note() if drifted else "",
                )
            )
        return Comparison(tuple(found), self.broken, self.skipped, tuple(m.pair for m in measured if m.pair))


def declared(old: TableSpec, new: TableSpec) -> tuple[dict[str, str], dict[str, str]]:
    """What is wrong with the features themselves, and which are left out on purpose."""
    here = {f.name: f for f in new.features}
    broken = {f.name: "has vanished: the window does not hold it" for f in old.features if f.name not in here}
    for feature in old.features:
        now = here.get(feature.name, feature)
        if now != feature:
            broken[feature.name] = f"was declared as {_declared(feature)}, now as {_declared(now)}"
    known = {f.name for f in old.features}
    skipped = {n: "is new: the model does not know it" for n in here if n not in known}
    skipped |= {n: "is an id: only its new values are counted" for n in IDS if n in known}
    skipped |= {n: "is the clock: the like has the window's own hours and weekdays" for n in rules.CLOCKS if n in known}
    return broken, skipped


def likes_of(stack: Stack, start: datetime, wanted: np.ndarray) -> np.ndarray:
    """(2, C) both likes of a window, of the cells that were over when it began; of all where none were.

    Args:
        stack: The reference's cells.
        start: Of the window.
        wanted: (28,) requests of the window by cell.
    """
    before = older(stack.cells, start)
    return stack.likes(before if before.any() else ~before, wanted)


def told(column: Column, pair: Pair) -> str:
    """What moved, in words and in the raw unit."""
    old, new = column.known(pair.reference), column.known(pair.current)
    if column.kind == "numeric":
        a, b = (quantile(column, side, 0.5) for side in (old, new))
        if f"{a:.3g}" != f"{b:.3g}":
            return f"median {a:.3g} → {b:.3g}"
        (a, b), (c, d) = ((quantile(column, side, q) for q in (0.05, 0.95)) for side in (old, new))
        return f"5th to 95th percentile {a:.3g} to {b:.3g} → {c:.3g} to {d:.3g}"
    keys = np.union1d(old.keys, new.keys)
    shares = np.zeros((2, len(keys)))
    for row, side in zip(shares, (old, new), strict=True):
        row[np.searchsorted(keys, side.keys)] = side.counts / side.total
    most = int(np.argmax(np.abs(shares[1] - shares[0])))
    return f"{named(column, pair.names, int(keys[most]))} {shares[0][most]:.0%} → {shares[1][most]:.0%}"


def named(column: Column, names: Mapping[int, str], key: int) -> str:
    """A bucket in words: the raw number, or the category by its name, by its hash where the name is not known."""
    if column.kind == "numeric":
        return f"{raw(column, float(points(np.array([key]), column.centre)[0])):.3g}"
    if key in (MISSING, OTHER):
        return "no value" if key == MISSING else "rare values"
    return f'"{names[key]}"' if key in names else f"category {key:x}"[:17]


def quantile(column: Column, counts: Counts, share: float) -> float:
    """A quantile in the raw unit."""
    at = points(counts.keys, column.centre)
    order = np.argsort(at, kind="stable")
    summed = np.cumsum(counts.counts[order])
    return raw(column, float(at[order][np.searchsorted(summed, summed[-1] * share)]))


def raw(column: Column, value: float) -> float:
    """A stored number as it was before the declared transform."""
    return float(np.expm1(value)) if column.transform == "log1p" else value


def _declared(feature: Feature) -> str:
    return f"{feature.kind} of width {feature.width}, transform {feature.transform}"
