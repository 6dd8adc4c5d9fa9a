"""Make two windows comparable: which columns can be compared, in which form, against which threshold.

Evidently stops at an all-null column, draws one bar a category for a column of 10^5 categories and takes a
small integer column for categories. So every column is brought into one of two plain forms before it sees it:
float64 without infinities, or strings out of at most `rules.TOP_CATEGORIES` + 2 categories.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from engagement.table import Feature, TableSpec
from monitoring import frame as frames
from monitoring import rules
from monitoring.noise import Deal

MISSING, OTHER = "(missing)", "(other)"
_NOT_COMPARED = {
    "categories": "a list: only its churn is told",
    "embedding": "a vector: no single distribution",
}


@dataclass(frozen=True)
class Column:
    """One column of both windows in comparable form; arrays have reference rows first, then current rows."""

    name: str
    kind: rules.Kind
    values: np.ndarray  # (N,) float64 with NaN, or (N,) str
    floor: float
    missing: tuple[float, float]

    @property
    def prediction(self) -> bool:
        """Whether it is a predicted score, not a feature."""
        return self.name.startswith(frames.SCORE)

    @property
    def threshold(self) -> float:
        """What the score is compared with: the rule's threshold, or just above the noise floor if higher."""
        return max(rules.THRESHOLD[self.kind], float(np.nextafter(self.floor, np.inf)))


@dataclass
class Comparison:
    """Everything that `prepare` found, column by column; the fields are those of `DriftVerdict`."""

    columns: list[Column] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    churn: dict[str, float] = field(default_factory=dict)


def prepare(reference: pa.Table, current: pa.Table, spec: TableSpec) -> Comparison:
    """Bring the declared features and the predictions of two non-empty windows into comparable form."""
    found = Comparison()
    deal = Deal.of(frames.users_of(reference), frames.users_of(current))
    scores = [Feature(frames.SCORE + action, "candidate", "numeric") for action in spec.actions]
    for feature in (*spec.features, *scores):
        if feature.name in frames.IDS:
            found.skipped[feature.name] = "an id: only its churn is told"
        elif feature.name in rules.CLOCKS:
            found.skipped[feature.name] = "a clock: it follows the window, not the world"
        elif feature.name not in reference.column_names:
            found.skipped[feature.name] = "not in the reference"
        elif feature.name not in current.column_names:
            found.broken[feature.name] = "is gone from the current window"
        else:
            _compare(found, feature, reference[feature.name], current[feature.name], deal)
    for name in ("user_id", "item_id"):
        if name in reference.column_names and name in current.column_names:
            found.churn[name] = frames.unseen(reference[name], current[name])
    return found


def _compare(
    found: Comparison, feature: Feature, reference: pa.ChunkedArray, current: pa.ChunkedArray, deal: Deal
) -> None:
    if feature.hashed:
        found.churn[feature.name] = frames.unseen(reference, current)
    nested = pa.types.is_nested(reference.type) or pa.types.is_nested(current.type)
    if feature.kind in _NOT_COMPARED or nested:
        found.skipped[feature.name] = _NOT_COMPARED.get(feature.kind, "holds lists")
        return
    if feature.kind == "numeric":
        values = [frames.numbers(side, feature.transform) for side in (reference, current)]
        known = [~np.isnan(side) for side in values]
    else:
        values = [frames.texts(side) for side in (reference, current)]
        known = [np.array([v is not None for v in side], dtype=bool) for side in values]
    missing = (1 - float(known[0].mean()), 1 - float(known[1].mean()))
    if _unusable(found, feature.name, missing, values[0][known[0]], values[1][known[1]]):
        return
    both = np.concatenate(values)
    if feature.kind == "numeric":
        column = Column(feature.name, "numeric", both, deal.wasserstein(both), missing)
    else:
        shown, codes = _categories(both)
        column = Column(feature.name, "categorical", shown[codes], deal.jensenshannon(codes), missing)
    found.columns.append(column)


def _categories(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The categories that are compared one by one, and the (N,) code of each row among them.

    They are the most frequent of both windows together: which they are does not depend on how the users were
    dealt out, so the noise floor holds for them.
    """
    named = np.array([MISSING if v is None else v for v in values], dtype=object).astype(str)
    names, codes, counts = np.unique(named, return_inverse=True, return_counts=True)
    top = names == MISSING
    top[np.argsort(-counts, kind="stable")[: rules.TOP_CATEGORIES]] = True
    shown, merged = np.unique(np.where(top, names.astype(object), OTHER).astype(str), return_inverse=True)
    return shown.astype(object), merged[codes]


def _unusable(
    found: Comparison, name: str, missing: tuple[float, float], reference: np.ndarray, current: np.ndarray
) -> bool:
    """Whether the column, given its values that are there, cannot be compared; says why in `found`."""
    if not len(reference):
        found.skipped[name] = "no values in the reference" if len(current) else "no values"
    elif rules.missing_broken(*missing):
        found.broken[name] = f"is missing in {missing[1]:.0%} of the rows ({missing[0]:.0%} in the reference)"
    elif not len(current):
        found.skipped[name] = "no values in the current window"
    elif rules.stuck(_largest_share(reference), len(set(current.tolist()))):
        found.broken[name] = f"is stuck at {current[0]}"
    else:
        return False
    return True


def _largest_share(values: np.ndarray) -> float:
    comparable = values.astype(str) if values.dtype == object else values
    return float(np.unique(comparable, return_counts=True)[1].max()) / len(values)
