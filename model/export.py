"""A trained model as what a server runs: an ONNX graph and the keys of its look-ups, without PyTorch.

The graph scores padded requests and computes what only a request determines once a request. What needs a search by
id happens before it, in `model/served.py`; so does `fold_in`, which is a solver.

Shapes: B requests, C candidates of each (padded), L actions (padded), W hashed columns, F numeric columns, D embedding
width, R rows of the table that training saw, A actions, V width of a content vector, S signals, I items.
"""

import io
import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import RankingTable, TableSpec
from model.bundle import Bundle
from model.columns import ITEM_FEATURE, narrowed, place_of
from model.config import RankerConfig
from model.content import LEVEL_PRIOR, RIDGE
from model.files import sha, stamped, write_directory
from model.predict import score
from model.quantise import compared, quantised, within_budget
from model.ranker import Ranker
from model.servable import Servable
from model.served import CARD, FORMAT, GRAPH, LOOKUPS, ServedRanker

OPSET = 18
PARITY = 1e-4
"""An export whose probabilities differ from PyTorch's by more (>) than this anywhere is refused."""
POPULARITY_PRIOR = 20.0
"""Rows at an action's mean rate that an item starts with, before its own are counted."""
_SHAPES = (1, 3, 7)  # requests scored together when parity is measured
_SAMPLE = 24  # requests that parity is measured on
_JUDGED = 512  # and INT8


def export(bundle: Bundle, table: RankingTable, directory: Path, int8: bool = False) -> dict[str, Any]:
    """Write the bundle as what `ServedRanker` loads, atomically. Equal inputs give equal bytes, but for `speed`.

    Args:
        bundle: The model.
        table: Recent requests: what is popular is counted on all of them, parity and INT8 are measured on some.
        directory: Where it goes, `<bundle>/served`.
        int8: Try INT8 weights, and take them within the budget of `model/quantise.py`. Not the default: on the laptop's
            model they save a fifth of the time, and move probabilities by up to 0.01.

    Returns:
        The card, as in `served.json`.

    Raises:
        EvergreenError: The table is empty or lacks features of the model, or the graph does not compute what PyTorch
            does (see `PARITY`).
    """
    if not table.rows:
        raise EvergreenError("an export needs requests to compare its scores on", "Give it a longer window")
    table, config = narrowed(table, bundle.spec), bundle.recipe.ranker
    card: dict[str, Any] = {
        "format": FORMAT,
        "bundle": bundle.digest,
        "spec": bundle.spec.to_json(),
        "ranker": {name: getattr(config, name) for name in ("buckets", "history", "attended", "first")},
        "precision": "fp32",
        "quantisation": None,
    }
    graph, arrays = graph_of(bundle.ranker()), _lookups(bundle, table)
    served = ServedRanker(graph, arrays, card)
    card["parity"] = _parity(bundle, served, table)
    if int8:
        smaller = quantised(graph)
        told = compared(_some(table, _JUDGED), served, ServedRanker(smaller, arrays, card))
        taken = within_budget(told["overlap"], told["hit3"], told["hit3_int8"])
        card["quantisation"] = told | {"taken": taken, "bytes_fp32": len(graph), "bytes_int8": len(smaller)}
        if taken:
            graph, card["precision"] = smaller, "int8"
    files = {GRAPH: graph, LOOKUPS: _packed(arrays)}
    card["bytes"] = {name: len(data) for name, data in files.items()}
    card["files"] = {name: sha(data) for name, data in files.items()}
    write_directory(directory, {**files, CARD: stamped(card)})
    return card


def graph_of(ranker: Ranker) -> bytes:
    """The ranker as an ONNX graph with any number of requests, candidates and actions."""
    inputs = _example(ranker.spec, ranker.config)
    with warnings.catch_warnings(), torch.no_grad(), TemporaryDirectory() as room:
        traced = Path(room) / GRAPH
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Servable(ranker).eval(),
            tuple(inputs.values()),
            traced,
            input_names=list(inputs),
            output_names=["probabilities_BCA"],
            dynamic_axes={n: {i: d for i, d in enumerate(_letters(n)) if d in "BCL"} for n in inputs},
            opset_version=OPSET,
            # The newer exporter takes eleven seconds where this takes half of one; parity is measured either way.
            dynamo=False,
        )
        model = onnxscript.optimizer.optimize(onnx.load(traced))
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dim, letter in zip(value.type.tensor_type.shape.dim, _letters(value.name), strict=True):
            if dim.dim_param:
                dim.dim_param = letter
    return model.SerializeToString(deterministic=True)


def _letters(name: str) -> str:
    """What the dimensions of an input or output mean, by its name's suffix."""
    return name.rsplit("_", 1)[1]


def _example(spec: TableSpec, config: RankerConfig) -> dict[str, Tensor]:
    """Inputs to trace the graph with."""
    b, c, length, actions = 2, 3, config.first + 2, len(spec.actions)

    def rows(*size: int) -> Tensor:
        return torch.zeros(*size, 2, dtype=torch.long)

    return {
        "request_rows_BW2": rows(b, spec.width("request", hashed=True)),
        "request_num_BF": torch.zeros(b, spec.width("request", hashed=False)),
        "history_rows_BL2": rows(b, length),
        "history_types_BLA": torch.zeros(b, length, actions),
        "history_hours_BL": torch.zeros(b, length),
        "history_mask_BL": torch.ones(b, length, dtype=torch.bool),
        "history_vectors_BLV": torch.zeros(b, length, config.content),
        "long_BV": torch.zeros(b, config.content),
        "now_BV": torch.zeros(b, config.content),
        "level_B": torch.zeros(b),
        "item_rows_BCW2": rows(b, c, spec.width("candidate", hashed=True)),
        "item_num_BCF": torch.zeros(b, c, spec.width("candidate", hashed=False)),
        "item_vectors_BCV": torch.zeros(b, c, config.content),
        "item_bias_BC": torch.zeros(b, c),
    }


def _lookups(bundle: Bundle, table: RankingTable) -> dict[str, np.ndarray]:
    """What is found by id; see `model/lookups.py`."""
    found = {name: bundle.weights[f"vectors.{name}"].numpy() for name in bundle.ranker().content.state()}
    nothing = np.zeros((1, found["item_VIC"].shape[-1]), np.float32)
    keys, rates = _popularity(table)
    return {
        "table_rows": bundle.weights["table.rows"].numpy(),
        "item_keys": found["item_keys"],
        "item_IV": np.concatenate([found["item_VIC"][-1], nothing]),
        "bias_I": np.append(found["bias_VI"][-1], np.float32(0)),
        "user_keys": found["user_keys"],
        "user_UV": np.concatenate([found["user_VUC"][-1], nothing]),
        "mean": found["mean_V"][-1],
        "values_A": found["values_A"],
        "ridge": np.float32(RIDGE),
        "level_prior": np.float32(LEVEL_PRIOR),
        "popular_keys": keys,
        "popular_rates": rates,
    }


def _popularity(table: RankingTable) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the items shown (K,), ascending; rates of the actions (K + 1, A), the mean ones last."""
    _, column = place_of(table.spec, "candidate", ITEM_FEATURE)
    keys, item_N = np.unique(table.item_cat[:, column], return_inverse=True)
    mean_A = table.labels.mean(0, dtype=np.float64)
    done_KA = np.stack([np.bincount(item_N, column, len(keys)) for column in table.labels.T], 1)
    shown_K1 = np.bincount(item_N, minlength=len(keys))[:, None]
    rates_KA = (done_KA + POPULARITY_PRIOR * mean_A) / (shown_K1 + POPULARITY_PRIOR)
    return keys, np.concatenate([rates_KA, mean_A[None]]).astype(np.float32)


def _parity(bundle: Bundle, served: ServedRanker, table: RankingTable) -> dict[str, float]:
    """Compare with PyTorch, alone and in company, with and without histories.

    Raises:
        EvergreenError: A probability differs by more than `PARITY`, or only one of the two is a number.
    """
    some, worst = _some(table, _SAMPLE), 0.0
    for part in (some, replace(some, history_end=some.history_start)):
        expected_NA = score(bundle, part)
        cuts = np.minimum(np.cumsum([0, *_SHAPES, part.requests]), part.requests)
        alone = [part.select(np.arange(a, b)) for a, b in itertools.pairwise(cuts)]
        got_NA = np.concatenate([scores for one in alone for scores in served.score([one])])
        # A broken model is exported as broken as it is: the canary must see it.
        same = np.isnan(got_NA) & np.isnan(expected_NA)
        gap_NA = np.where(same, 0, np.abs(got_NA - expected_NA))
        worst = max(worst, float(np.nan_to_num(gap_NA, nan=np.inf).max()))
    if worst > PARITY:
        raise EvergreenError(
            f"the exported graph differs from PyTorch by {worst:.2g} in a probability, more than {PARITY}",
            "Report it: the model was not exported",
        )
    return {"worst": worst, "requests": 2 * some.requests}


def _some(table: RankingTable, count: int) -> RankingTable:
    """Up to so many requests, spread over the table."""
    return table.select(np.unique(np.linspace(0, table.requests - 1, min(count, table.requests)).astype(int)))


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    """As an .npz file; equal arrays give equal bytes."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()
