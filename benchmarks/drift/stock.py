"""Stock Evidently on the numbers and categories of `speed.py`; a module of its own, as it loads long."""

import os

os.environ["DO_NOT_TRACK"] = "1"  # before Evidently is imported

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from evidently import DataDefinition, Dataset, Report  # noqa: E402
from evidently.presets import DataDriftPreset  # noqa: E402

from benchmarks.drift.speed import CATEGORIES, NUMBERS, numeric, popular  # noqa: E402


def preset(rows: int, most: int) -> int:
    """Stock `DataDriftPreset` on the same numbers, and columns of up to `most` categories; how many drifted."""
    numbers, categories = [f"number_{i}" for i in range(NUMBERS)], [many for many in CATEGORIES if many <= most]
    definition = DataDefinition(numerical_columns=numbers, categorical_columns=[f"category_{c}" for c in categories])

    def window(seed: int) -> Dataset:
        rng = np.random.default_rng(seed)
        frame = pd.DataFrame(numeric(rng, rows)[:, :NUMBERS].astype(np.float64), columns=numbers)
        for many in categories:
            frame[f"category_{many}"] = popular(rng, many, rows).astype(str)
        return Dataset.from_pandas(frame, definition)

    found = Report([DataDriftPreset()]).run(window(1), window(0)).dict()
    return int(found["metrics"][0]["value"]["count"])
