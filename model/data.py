"""Batches straight from the memory-mapped columns of a ranking table: no loop over rows, padding only the history.

Shapes: B requests, N candidates (ragged, not padded), L actions (newest first), W hashed columns, F numeric columns,
A actions. Ids are 63-bit hashes: 0 is "no value", and a hidden id (`hide`) is the negative of its hash.
"""

import hashlib
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable
from model.config import RankerConfig, TrainConfig
from model.history import recent
from model.weights import RowWeights

_CHUNK = 1 << 16  # rows of a column that statistics read at a time


@dataclass(frozen=True)
class Batch:
    """Some requests with their candidates and histories, as tensors.

    Attributes:
        request_ids_BW: Hashed request-level columns.
        request_num_BF: Numeric request-level columns, NaN where missing.
        item_ids_NW: Hashed candidate-level columns.
        item_num_NF: Numeric candidate-level columns.
        history_ids_BL: The items of the recent actions.
        history_bits_BL: What each action was: bit `a` set for action `a`.
        history_hours_BL: Age of each action at the request, hours.
        history_mask_BL: True for real actions, False for padding.
        history_visible_BL: True for actions that the sequence model sees; they come first. See `hide`.
        time_B: When each request was ranked, microseconds.
        request_of_row: (N,) which of the B requests a candidate belongs to.
        rows: (N,) which rows of the table the candidates are.
        labels_NA: 0.0 or 1.0.
        weight_N: Weight of each candidate in the loss.
    """

    request_ids_BW: Tensor
    request_num_BF: Tensor
    item_ids_NW: Tensor
    item_num_NF: Tensor
    history_ids_BL: Tensor
    history_bits_BL: Tensor
    history_hours_BL: Tensor
    history_mask_BL: Tensor
    history_visible_BL: Tensor
    time_B: Tensor
    request_of_row: Tensor
    rows: Tensor
    labels_NA: Tensor
    weight_N: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def action_types(bits_BL: Tensor, actions: int) -> Tensor:
    """(B, L) bit masks -> (B, L, actions): 1 where bit `a` is set. All actions are told apart, action 0 included."""
    return (bits_BL[..., None] >> torch.arange(actions, device=bits_BL.device)) & 1


class Batcher:
    """Cuts batches out of a table.

    Args:
        table: The ranking table, memory-mapped or not.
        config: For the length of the history.
        weights: Weight of each row in the loss; all one when left out.
    """

    def __init__(self, table: RankingTable, config: RankerConfig, weights: RowWeights | None = None) -> None:
        self.table = table
        self.config = config
        self.weights = weights

    def of_requests(self, requests: np.ndarray) -> Batch:
        """The given requests (indices) with all their candidates."""
        request_of_row = np.repeat(np.arange(len(requests)), self.sizes(requests))
        return self._batch(requests, self.table.rows_of(requests), request_of_row)

    def of_rows(self, rows: np.ndarray) -> Batch:
        """The given candidates (row indices), each as a request of its own."""
        return self._batch(self._requests(rows), rows, np.arange(len(rows)))

    def actions(self, rows: np.ndarray) -> np.ndarray:
        """Number of actions in the history of each of the given candidates (row indices)."""
        requests = self._requests(rows)
        return self.table.history_end[requests] - self.table.history_start[requests]

    def _requests(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.table.offsets, rows, side="right") - 1

    def sizes(self, requests: np.ndarray) -> np.ndarray:
        """Number of candidates of the given requests."""
        return self.table.offsets[requests + 1] - self.table.offsets[requests]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All requests in the order of an epoch: a resumed run cuts the batches that an unbroken one would."""
        return np.random.default_rng([seed, epoch]).permutation(self.table.requests)

    def _batch(self, requests: np.ndarray, rows: np.ndarray, request_of_row: np.ndarray) -> Batch:
        t, weight = self.table, np.ones(len(rows), np.float32)
        if self.weights is not None:
            weight = self.weights.of(rows, requests[request_of_row])
        past = recent(t, requests, self.config.history, self.config.first)
        arrays = {
            "request_ids_BW": t.request_cat[requests],
            "request_num_BF": t.request_num[requests],
            "item_ids_NW": t.item_cat[rows],
            "item_num_NF": t.item_num[rows],
            "time_B": t.time[requests],
            "request_of_row": request_of_row,
            "rows": rows,
            "labels_NA": t.labels[rows].astype(np.float32),
            "weight_N": weight,
            "history_ids_BL": past.item_BL,
            "history_bits_BL": past.bits_BL,
            "history_hours_BL": past.hours_BL,
            "history_mask_BL": past.mask_BL,
            "history_visible_BL": past.mask_BL,
        }
        return Batch(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})


_SAMPLE = 100_000  # rows from which quantiles are taken


def quantiles(block_RF: np.ndarray, columns: np.ndarray, count: int) -> Tensor:
    """(F, count) quantiles of some columns over their finite values in up to `_SAMPLE` rows spread over the block."""
    if not len(columns):
        return torch.zeros(0, count)
    rows = np.unique(np.linspace(0, len(block_RF) - 1, min(len(block_RF), _SAMPLE)).astype(int))
    part = np.asarray(block_RF[rows], np.float64)[:, columns]
    part[~np.isfinite(part)] = np.nan
    part = np.where(np.isfinite(part).any(0), part, 0)
    return torch.from_numpy(np.nanquantile(part, np.linspace(0, 1, count), axis=0).T.astype(np.float32))


def numeric_statistics(block_RF: np.ndarray, columns: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of some columns of a block, over their finite values.

    Returns:
        Mean, standard deviation, and whether values are ever missing (0.0 or 1.0): one number a column each.
    """
    count, total, square = (np.zeros(len(columns)) for _ in range(3))
    for start in range(0, len(block_RF), _CHUNK):
        part = np.asarray(block_RF[start : start + _CHUNK], np.float64)[:, columns]
        finite = np.isfinite(part)
        part = np.where(finite, part, 0)
        count, total, square = count + finite.sum(0), total + part.sum(0), square + (part * part).sum(0)
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 0))
    mean_F, std_F, missing_F = (torch.from_numpy(a.astype(np.float32)) for a in (mean, std, count < len(block_RF)))
    return mean_F, std_F, missing_F


@dataclass(frozen=True)
class Share:
    """Where the requests and rows of one process lie in the batch that several of them share."""

    requests: int
    first_request: int
    rows: int
    first_row: int


def hide(batch: Batch, config: TrainConfig, generator: torch.Generator, share: Share | None = None) -> Batch:
    """What only training does to a batch: hide the newest actions and some ids.

    Each request draws T ~ U(0, `time_window_hours`); its sequence loses the actions younger than T (TransAct, 3.3.4:
    it keeps the ranker from narrowing a feed to what was done a minute ago). Each id is hidden with `id_dropout`: it is
    negated, which the embedding table takes for an id that it has never seen. So the fallback of new ids is learned.

    Chances are drawn for the whole batch, so that splitting it over processes (`share`) changes nothing.
    """
    share = share or Share(len(batch.request_ids_BW), 0, len(batch.rows), 0)
    by_request = (share.requests, share.first_request)

    def drop(ids: Tensor, total: int, first: int) -> Tensor:
        # Columns outermost, and the history last: its width differs between the shares of one batch, and numbers
        # for columns that another share has must not move those of columns that both have.
        chance = torch.rand(ids.shape[1], total, generator=generator).T[first : first + len(ids)]
        return torch.where(chance < config.id_dropout, -ids, ids)

    real_BL, hours_BL = batch.history_mask_BL, batch.history_hours_BL
    chance_B1 = torch.rand(share.requests, 1, generator=generator)
    window_B1 = chance_B1[share.first_request :][: len(real_BL)] * config.time_window_hours
    visible_BL = real_BL & (hours_BL >= window_B1)
    # What is left moves to the front: the first K outputs are those of the newest visible actions, as in serving.
    order_BL = torch.argsort((~visible_BL).to(torch.uint8) + (~real_BL).to(torch.uint8), dim=1, stable=True)
    return replace(
        batch,
        request_ids_BW=drop(batch.request_ids_BW, *by_request),
        item_ids_NW=drop(batch.item_ids_NW, share.rows, share.first_row),
        history_ids_BL=drop(batch.history_ids_BL, *by_request).gather(1, order_BL),
        history_bits_BL=batch.history_bits_BL.gather(1, order_BL),
        history_hours_BL=hours_BL.gather(1, order_BL),
        history_mask_BL=real_BL.gather(1, order_BL),
        history_visible_BL=visible_BL.gather(1, order_BL),
    )


def table_digest(table: RankingTable) -> str:
    """Hex SHA-256 of everything that training reads."""
    digest = hashlib.sha256(repr(table.spec).encode())
    for field in fields(table):
        array = getattr(table, field.name)
        if isinstance(array, np.ndarray):
            digest.update(f"{field.name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()
