"""A split of a table as plain arrays, in the form that other projects' models take.

Nothing is withheld: every declared feature is there, and the actions that our model reads as one sequence. Dictionaries
and statistics come from the training window alone.

Shapes: N candidates, R requests, C categorical columns, D numeric columns, L actions, S slots of a feature with several
values.
"""

import json
from pathlib import Path

import numpy as np

from engagement.table import MISSING, Feature, RankingTable

HISTORY = 64  # the actions that our laptop() model sees
MIN_COUNT = 2  # a value seen once in training shares the out-of-vocabulary id, which is how that id is learned at all
NONE, UNKNOWN = 0, 1  # codes of "no value" and of "not in the training window"


class Codes:
    """Dictionary of one hashed feature."""

    def __init__(self, hashes: np.ndarray) -> None:
        values, counts = np.unique(hashes, return_counts=True)
        self.values = values[(values != MISSING) & (counts >= MIN_COUNT)]

    @property
    def size(self) -> int:
        return len(self.values) + 2

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        if not len(self.values):
            return np.where(hashes == MISSING, NONE, UNKNOWN).astype(np.int32)
        place = np.minimum(np.searchsorted(self.values, hashes), len(self.values) - 1)
        known = np.where(self.values[place] == hashes, place + 2, UNKNOWN)
        return np.where(hashes == MISSING, NONE, known).astype(np.int32)


def write(train: RankingTable, evaluation: RankingTable, directory: Path) -> None:
    """Write `train.npz`, `evaluation.npz` and, last, `meta.json`.

    Arrays: `cat` (N, C) codes; `slots_<feature>` (N, S) codes; `num` (N, D), NaN where there is no value;
    `seq_<name>` (R, L) item codes of the last actions, newest first: all of them and those of each action;
    `request` (N,); `label` (N,) of the primary action.
    """
    directory.mkdir(parents=True, exist_ok=True)
    codes = {f.name: Codes(_hashes(train, f)) for f in train.spec.features if f.hashed}
    for name, table in (("train", train), ("evaluation", evaluation)):
        np.savez(directory / f"{name}.npz", **_arrays(table, codes))
    single = [f.name for f in train.spec.features if f.kind == "categorical"]
    meta = {
        "cat": {name: codes[name].size for name in single},
        "slots": {f.name: codes[f.name].size for f in train.spec.features if f.kind == "categories"},
        "seq": ["recent", *train.spec.actions],
    }
    (directory / "meta.json").write_text(json.dumps(meta))


def _arrays(table: RankingTable, codes: dict[str, Codes]) -> dict[str, np.ndarray]:
    spec, row = table.spec, table.request_of_row
    of_row = {}
    for f in spec.features:
        if f.hashed:
            found = codes[f.name](_hashes(table, f))
            of_row[f.name] = found[row] if f.level == "request" else found
    arrays = {
        "cat": np.concatenate([of_row[f.name] for f in spec.features if f.kind == "categorical"], 1),
        "num": np.concatenate([table.request_num[row], table.item_num], 1),
        "request": row,
        "label": table.labels[:, spec.actions.index(spec.primary_action)],
    }
    arrays |= {f"slots_{f.name}": of_row[f.name] for f in spec.features if f.kind == "categories"}
    item = codes["item_id"](np.asarray(table.history_item))
    arrays["seq_recent"] = _last(table, item, np.ones(len(item), bool))
    for bit, action in enumerate(spec.actions):
        arrays[f"seq_{action}"] = _last(table, item, (table.history_actions >> bit & 1).astype(bool))
    return arrays


def _hashes(table: RankingTable, feature: Feature) -> np.ndarray:
    """(R or N, width) hashes of a feature."""
    block = table.request_cat if feature.level == "request" else table.item_cat
    before = 0
    for other in table.spec.of(feature.level, hashed=True):
        if other == feature:
            break
        before += other.width
    return np.asarray(block[:, before : before + feature.width])


def _last(table: RankingTable, item: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(R, L) codes of the last wanted actions of each request's user, newest first."""
    chosen = np.flatnonzero(wanted)
    start, end = (np.searchsorted(chosen, point) for point in (table.history_start, table.history_end))
    index = end[:, None] - 1 - np.arange(HISTORY)
    real = index >= start[:, None]
    if not len(chosen):
        return np.full(index.shape, NONE, np.int32)
    return np.where(real, item[chosen[np.where(real, index, 0)]], NONE).astype(np.int32)
