"""An exported model at work: numpy finds what belongs to ids, ONNX Runtime computes. Nothing here imports PyTorch.

ranker.onnx   the graph (`model/export.py`), or its INT8 form
lookups.npz   what is found by id (`model/lookups.py`)
served.json   what it is: spec, sizes, parity with PyTorch, SHA-256 of the two files

Shapes: B requests, C candidates (padded), L actions (padded), W hashed columns, F numeric columns, A actions, N rows of
a table.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from engagement.errors import EvergreenError
from engagement.table import RankingTable, TableSpec
from model.columns import ITEM_FEATURE, USER_FEATURE, narrowed, place_of
from model.files import read, read_card, sha
from model.history import recent
from model.lookups import lookups_of

SERVED = "served"  # the directory, within the bundle's
GRAPH, LOOKUPS, CARD = "ranker.onnx", "lookups.npz", "served.json"
FORMAT = 1
_AGAIN = "Register the model again: the judge step of a retrain exports it"


class ServedRanker:
    """Scores requests. Threads take turns: one set of buffers is reused from call to call.

    Args:
        graph: The ONNX graph.
        arrays: What is found by id.
        card: What `served.json` holds.
    """

    def __init__(self, graph: bytes, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        self.card = card
        self.spec = TableSpec.from_json(card["spec"])
        self.precision: str = card["precision"]
        self.session = session(graph)
        self._inputs = frozenset(i.name for i in self.session.get_inputs())
        self._config = card["ranker"]
        self._rows, self._content, self._popularity = lookups_of(arrays, self._config["buckets"])
        _, self._user_column = place_of(self.spec, "request", USER_FEATURE)
        _, self._item_column = place_of(self.spec, "candidate", ITEM_FEATURE)
        self._buffers, self._lock = _Buffers(), Lock()
        self._same = self.spec  # the newest spec that was found to be equal

    @classmethod
    def load(cls, directory: Path) -> "ServedRanker":
        """Read and verify an export.

        Raises:
            EvergreenError: It is missing, damaged, was changed, or is of a format that this code does not read.
        """
        if not (directory / CARD).is_file():
            raise EvergreenError(f"there is no exported model in {directory}", _AGAIN)
        try:
            card = read_card(directory / CARD)
            if card["format"] != FORMAT:
                raise EvergreenError(
                    f"{directory} holds an export of format {card['format']}, and this code reads {FORMAT}", _AGAIN
                )
            files = {name: read(directory / name) for name in (GRAPH, LOOKUPS)}
            for name, data in files.items():
                if sha(data) != card["files"][name]:
                    raise EvergreenError(f"{directory / name} was changed or damaged after it was written", _AGAIN)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvergreenError(f"{directory / CARD} is damaged ({error})", _AGAIN) from error
        with np.load(io.BytesIO(files[LOOKUPS]), allow_pickle=False) as arrays:
            return cls(files[GRAPH], dict(arrays), card)

    def score(self, tables: Sequence[RankingTable]) -> list[np.ndarray]:
        """Calibrated probabilities of every action for every candidate; all requests go through the graph together.

        Args:
            tables: Requests, one a table or several; their labels are not read. A table may have more features than
                the model was trained on.

        Returns:
            A table's scores (N, A) float32, in the order of its rows and of `spec.actions`.

        Raises:
            EvergreenError: A table lacks a feature that the model was trained on, or has other actions.
        """
        tables = [self._narrowed(table) for table in tables]
        sizes = [np.diff(table.offsets) for table in tables]
        most = max((int(s.max(initial=0)) for s in sizes), default=0)
        if not most:
            return [np.zeros((0, len(self.spec.actions)), np.float32) for _ in tables]
        with self._lock:
            (scores_BCA,) = self.session.run(None, self.feed(tables, most))
        found, start = [], 0
        for size_B in sizes:
            part_BCA = scores_BCA[start : start + len(size_B)]
            real = [scores_CA[:size] for scores_CA, size in zip(part_BCA, size_B, strict=True)]
            found.append(np.concatenate(real or [scores_BCA[0, :0]]))
            start += len(size_B)
        return found

    def popular(self, item_ids: Sequence[str]) -> np.ndarray:
        """(C, A) float32: how often each action followed where an item was shown, whoever saw it; smoothed.

        An item that was never shown has the mean rates.
        """
        return self._popularity.of(item_ids)

    def feed(self, tables: Sequence[RankingTable], candidates: int) -> dict[str, np.ndarray]:
        """The graph's inputs, in buffers that the next call reuses.

        Args:
            tables: Requests with the features of `spec`.
            candidates: C, of the request that has the most.
        """
        past = [recent(t, np.arange(t.requests), self._config["history"], self._config["first"]) for t in tables]
        length = max(p.mask_BL.shape[1] for p in past)
        item_BL, bits_BL, hours_BL, mask_BL = (
            self._buffers.padded(name, [row for p in past for row in getattr(p, name)], length)
            for name in ("item_BL", "bits_BL", "hours_BL", "mask_BL")
        )
        types_BLA = ((bits_BL[..., None] >> np.arange(len(self.spec.actions))) & 1).astype(np.float32)
        user_BW = np.concatenate([table.request_cat for table in tables])
        item_BCW, number_BCF = (
            self._buffers.padded(name, _by_request(tables, name), candidates) for name in ("item_cat", "item_num")
        )
        found, newest = self._content, slice(self._config["attended"])
        place_BL, place_BC = found.items(item_BL), found.items(item_BCW[..., self._item_column])
        now_BV, level_B = found.fold_in(place_BL, types_BLA, mask_BL)
        inputs = {
            "request_rows_BW2": self._table_rows("request_rows", user_BW),
            "request_num_BF": np.concatenate([table.request_num for table in tables]),
            "history_rows_BL2": self._table_rows("history_rows", item_BL[:, newest]),
            "history_types_BLA": types_BLA[:, newest],
            "history_hours_BL": hours_BL[:, newest],
            "history_mask_BL": mask_BL[:, newest],
            "history_vectors_BLV": found.item_IV[place_BL[:, newest]],
            "long_BV": found.user_UV[found.users(user_BW[:, self._user_column])],
            "now_BV": now_BV,
            "level_B": level_B,
            "item_rows_BCW2": self._table_rows("item_rows", item_BCW),
            "item_num_BCF": number_BCF,
            "item_vectors_BCV": found.item_IV[place_BC],
            "item_bias_BC": found.bias_I[place_BC],
        }
        return {name: array for name, array in inputs.items() if name in self._inputs}

    def _narrowed(self, table: RankingTable) -> RankingTable:
        # One reader gives all its tables the same spec; comparing sixty features takes as long as their look-up.
        if table.spec is self._same:
            return table
        own = narrowed(table, self.spec)
        if own is table:
            self._same = table.spec
        return own

    def _table_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        rows = self._buffers.make(name, (*ids.shape, 2), np.int64)
        self._rows.find(ids, rows)
        return rows


class _Buffers:
    """Arrays by name, made once for the largest size seen; a smaller one is the beginning of the same memory."""

    def __init__(self) -> None:
        self._flat: dict[str, np.ndarray] = {}

    def make(self, name: str, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """An array whose content is whatever was left there."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or len(flat) < size:
            flat = self._flat[name] = np.empty(size, dtype)
        return flat[:size].reshape(shape)

    def padded(self, name: str, parts: Sequence[np.ndarray], size: int) -> np.ndarray:
        """Arrays (n, ...) stacked as (len(parts), size, ...), zero behind each."""
        out = self.make(name, (len(parts), size, *parts[0].shape[1:]), parts[0].dtype)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
            row[len(part) :] = 0
        return out


def session(graph: bytes) -> ort.InferenceSession:
    """ONNX Runtime on one thread: several processes serve, and two threads on two cores only wait for each other."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # It plans memory for every new combination of sizes and keeps the plans; no two requests need have equal sizes.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    # The fused kernel takes three times as long as the two that it replaces, on rows as narrow as an action's.
    slow = ["SkipLayerNormFusion"]
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=slow)


def _by_request(tables: Sequence[RankingTable], block: str) -> list[np.ndarray]:
    """The rows of a candidate block, request after request."""
    return [
        getattr(table, block)[table.offsets[r] : table.offsets[r + 1]]
        for table in tables
        for r in range(table.requests)
    ]
