"""What Evidently's `DataDriftPreset` says of a window with its defaults, fast enough for thousands of windows.

It is Evidently's own code that chooses the test of each column, computes and decides it; only the tables and plots
around it are left out, which cost hundreds of times as much. Its tests get their rows sorted: what they tell does not
depend on the order, and the sorting inside them then costs next to nothing. `agrees` holds the answer against the real
preset's, that gets the rows as they are.
"""

import os
from dataclasses import dataclass
from typing import Any

os.environ["DO_NOT_TRACK"] = "1"  # before evidently is imported

import numpy as np
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.legacy.calculations.stattests.registry import get_stattest
from evidently.legacy.core import ColumnType
from evidently.presets import DataDriftPreset

from engagement.table import MISSING
from monitoring.compare import Window
from monitoring.sketch import IDS, SCORE, feature_blocks

DRIFT_SHARE = 0.5  # the preset's default: at this share of the columns the data set drifted
REFERENCE_ROWS = 10_000
FEW_VALUES = 5  # up to so many, Evidently takes a number for a category


@dataclass(frozen=True)
class Frame:
    """A window as Evidently takes it: raw columns, one row a candidate; ids and vectors are not compared."""

    columns: dict[str, pd.Series]
    categorical: tuple[str, ...]

    def data(self) -> pd.DataFrame:
        """As one frame."""
        return pd.DataFrame(self.columns)


@dataclass(frozen=True)
class Defaults:
    """What Evidently says: which columns drifted, and of how many; `error` where it raises instead."""

    drifted: tuple[str, ...]
    columns: int
    error: str = ""

    @property
    def alarm(self) -> bool:
        """Whether the data set drifted: a check that dies is an alarm, too."""
        return bool(self.error) or len(self.drifted) >= DRIFT_SHARE * self.columns


def frame(window: Window, most_rows: int | None = None) -> Frame:
    """The rows of a window, or evenly spaced ones where there are more than `most_rows`."""
    table = window.table
    rows = np.arange(table.rows)
    if most_rows is not None and table.rows > most_rows:
        rows = np.linspace(0, table.rows - 1, most_rows).astype(int)
    columns, categorical = dict[str, pd.Series](), []
    for feature, block in feature_blocks(table):
        if feature.name in IDS or feature.kind == "embedding":
            continue
        values = block[:, 0][rows if feature.level == "candidate" else table.request_of_row[rows]]
        if feature.hashed:
            categorical.append(feature.name)
            values = np.where(values == MISSING, np.nan, values % (1 << 52))  # a float holds these exactly
        columns[feature.name] = pd.Series(values.astype(float))
    columns |= {SCORE + a: pd.Series(window.scores[rows, i].astype(float)) for i, a in enumerate(table.spec.actions)}
    return Frame(columns, tuple(categorical))


class Check:
    """`DataDriftPreset()` with its defaults, window after window against one reference."""

    def __init__(self, reference: Frame) -> None:
        self.kinds = {
            n: ColumnType.Categorical if n in reference.categorical else ColumnType.Numerical for n in reference.columns
        }
        self.reference = {n: _clean(s) for n, s in reference.columns.items()}
        # The choice depends on both sides together only where the reference has at most five values.
        self.tests = {
            n: get_stattest(s, s, self.kinds[n], None) for n, s in self.reference.items() if s.nunique() > FEW_VALUES
        }

    def __call__(self, current: Frame) -> Defaults:
        """What the preset would say."""
        drifted = []
        for name, old in self.reference.items():
            new = _clean(current.columns[name])
            if old.empty or new.empty:
                return Defaults((), len(self.reference), f"an empty column '{name}'")
            test = self.tests.get(name) or get_stattest(old, new, self.kinds[name], None)
            if test(old, new, self.kinds[name], None).drifted:
                drifted.append(name)
        return Defaults(tuple(drifted), len(self.reference))


def _clean(values: pd.Series) -> pd.Series:
    known = values.to_numpy()
    return pd.Series(np.sort(known[np.isfinite(known)]))


def preset(reference: Frame, current: Frame) -> Defaults:
    """What the real `DataDriftPreset()` says; seconds a call."""
    numeric = [n for n in reference.columns if n not in reference.categorical]
    definition = DataDefinition(numerical_columns=numeric, categorical_columns=list(reference.categorical))
    old, new = (Dataset.from_pandas(f.data(), definition) for f in (reference, current))
    try:
        found: dict[str, Any] = Report([DataDriftPreset()], include_tests=True).run(new, old).dict()
    except ValueError as error:
        return Defaults((), len(reference.columns), str(error))
    failed = [t["name"] for t in found["tests"] if t["status"].value == "FAIL"]
    moved = tuple(n for n in reference.columns if f"Value Drift for column {n}" in failed)
    return Defaults(moved, len(reference.columns))


def agrees(reference: Frame, current: Frame) -> bool:
    """Whether `Check` says of a window what the real preset says."""
    ours, real = Check(reference)(current), preset(reference, current)
    return (ours.drifted, bool(ours.error)) == (real.drifted, bool(real.error))
