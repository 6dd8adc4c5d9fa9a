"""Make two windows comparable: which columns can be compared, in which form, against which threshold.

Evidently stops at an all-null column, draws one bar a category for a column of 10^5 categories and takes a small
integer column for categories. So every column is brought into one of two plain forms before it sees it: float64
without infinities, or strings out of at most `rules.TOP_CATEGORIES` + 2 categories.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from engagement.table import Feature, TableSpec
from monitoring import frame as frames
from monitoring import rules
from monitoring.noise import Deal

MISSING, OTHER = "(missing)", "(other)"


@dataclass(frozen=True)
class Column:
    """One column of both windows in comparable form; arrays have reference rows first, then current rows."""

    name: str
    kind: rules.Kind
    prediction: bool
    values: np.ndarray  # (N,) float64 with NaN, or (N,) str
    floor: float
    missing: tuple[float, float]

    @property
    def threshold(self) -> float:
        """What the score is compared with: the rule's threshold, or just above the noise floor if that is higher."""
        return max(rules.THRESHOLD[self.kind], float(np.nextafter(self.floor, np.inf)))


@dataclass
class Comparison:
    """Everything that `prepare` found, column by column."""

    columns: list[Column] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    churn: dict[str, float] = field(default_factory=dict)


def prepare(reference: pa.Table, current: pa.Table, spec: TableSpec) -> Comparison:
    """Bring the declared features and the predictions of two non-empty windows into comparable form."""
    found = Comparison()
    deal = Deal.of(frames.users_of(reference), frames.users_of(current))
    scores = [Feature(frames.SCORE + a, "candidate", "numeric") for a in spec.actions]
    for feature in (*spec.features, *scores):
        _one(found, reference, current, feature, deal)
    for name in frames.IDS[1:]:
        if name in reference.column_names and name in current.column_names:
            found.churn[name] = frames.unseen(reference[name], current[name])
    return found


def _one(found: Comparison, reference: pa.Table, current: pa.Table, feature: Feature, deal: Deal) -> None:
    name = feature.name
    if name in frames.IDS:
        found.skipped[name] = "an id: only its churn is told"
        return
    if name not in reference.column_names:
        found.skipped[name] = "not in the reference"
        return
    if name not in current.column_names:
        found.broken[name] = "is gone from the current window"
        return
    pair = (reference[name], current[name])
    if feature.kind == "categories":
        found.skipped[name] = "a list: only its churn is told"
        found.churn[name] = frames.unseen(*pair)
    elif feature.kind == "embedding" or feature.width > 1:
        found.skipped[name] = "a vector: it has no single distribution"
    elif feature.kind == "numeric":
        _numeric(found, feature, pair, deal)
    else:
        _categorical(found, feature, pair, deal)


def _numeric(
    found: Comparison, feature: Feature, pair: tuple[pa.ChunkedArray, pa.ChunkedArray], deal: Deal
) -> None:
    ref, cur = (frames.numbers(column, feature.transform) for column in pair)
    missing = (float(np.isnan(ref).mean()), float(np.isnan(cur).mean()))
    if _unusable(found, feature.name, missing, ref[~np.isnan(ref)], cur[~np.isnan(cur)]):
        return
    values = np.concatenate([ref, cur])
    prediction = feature.name.startswith(frames.SCORE)
    found.columns.append(
        Column(feature.name, "numeric", prediction, values, deal.wasserstein(values), missing)
    )


def _categorical(
    found: Comparison, feature: Feature, pair: tuple[pa.ChunkedArray, pa.ChunkedArray], deal: Deal
) -> None:
    found.churn[feature.name] = frames.unseen(*pair)
    ref, cur = (frames.texts(column) for column in pair)
    known = [np.array([v for v in side if v is not None], dtype=object) for side in (ref, cur)]
    missing = (1 - len(known[0]) / len(ref), 1 - len(known[1]) / len(cur))
    if _unusable(found, feature.name, missing, *known):
        return
    values = np.array([MISSING if v is None else v for v in np.concatenate([ref, cur])], dtype=object)
    names, codes, counts = np.unique(values.astype(str), return_inverse=True, return_counts=True)
    # The most frequent of both windows together: which they are does not depend on how the users were dealt.
    top = np.zeros(len(names), dtype=bool)
    top[np.argsort(-counts, kind="stable")[: rules.TOP_CATEGORIES]] = True
    names = np.where(top | (names == MISSING), names, OTHER).astype(object)
    shown, codes = np.unique(names[codes].astype(str), return_inverse=True)
    found.columns.append(
        Column(
            feature.name,
            "categorical",
            False,
            shown[codes].astype(object),
            deal.jensenshannon(codes),
            missing,
        )
    )


def _unusable(
    found: Comparison, name: str, missing: tuple[float, float], reference: np.ndarray, current: np.ndarray
) -> bool:
    """Whether the column cannot be compared; says why in `broken` or `skipped`."""
    if not len(reference):
        found.skipped[name] = "no values in the reference" if len(current) else "no values"
        return True
    if rules.missing_broken(*missing):
        found.broken[name] = f"is missing in {missing[1]:.0%} of the rows ({missing[0]:.0%} in the reference)"
        return True
    if not len(current):
        found.skipped[name] = "no values in the current window"
        return True
    mode = np.unique(reference.astype(str) if reference.dtype == object else reference, return_counts=True)[
        1
    ].max()
    if rules.stuck(float(mode) / len(reference), len(set(current.tolist()))):
        found.broken[name] = f"is stuck at {current[0]}"
        return True
    return False
