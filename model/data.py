"""Batches straight from the memory-mapped columns of a ranking table: no loop over rows, padding only the history.

Shapes: B requests, N candidates (ragged, not padded), L actions (newest first), W hashed columns, F numeric columns,
A actions. Hashed ids are already rows of the embedding table: 0 is "no value".
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.config import RankerConfig, TrainConfig

HOUR_US = 3_600_000_000
_CHUNK = 1_000_000  # rows of a column that statistics read at a time


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
    request_of_row: Tensor
    rows: Tensor
    labels_NA: Tensor
    weight_N: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)


def hash_rows(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """Rows of the embedding table for 63-bit hashes: 0 for "no value", else 1 to `buckets` - 1."""
    return np.where(hashes == 0, 0, hashes % (buckets - 1) + 1)


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Batcher:
    """Cuts batches out of a table.

    Args:
        table: The ranking table, memory-mapped or not.
        config: For the size of the embedding table and of the history.
        weights: (N,) float32 weight of each row in the loss; all one when left out.
    """

    def __init__(self, table: RankingTable, config: RankerConfig, weights: np.ndarray | None = None) -> None:
        self.table = table
        self.config = config
        self.weights = weights

    def of_requests(self, requests: np.ndarray) -> Batch:
        """The given requests (indices) with all their candidates."""
        sizes = np.diff(self.table.offsets)[requests]
        ends = np.cumsum(sizes)
        request_of_row = np.repeat(np.arange(len(requests)), sizes)
        rows = np.arange(ends[-1]) + np.repeat(self.table.offsets[:-1][requests] - (ends - sizes), sizes)
        return self._batch(requests, rows, request_of_row)

    def of_rows(self, rows: np.ndarray) -> Batch:
        """The given candidates (row indices), each as a request of its own, with histories of full length."""
        requests = self.table.request_of_row[rows]
        return self._batch(requests, rows, np.arange(len(rows)), trim=False)

    def epoch(self, requests_per_batch: int, seed: int, epoch: int) -> Iterator[Batch]:
        """All requests in an order that depends on seed and epoch alone."""
        for part in self.order(requests_per_batch, seed, epoch):
            yield self.of_requests(part)

    def order(self, requests_per_batch: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The requests of each batch of an epoch: a resumed run cuts the batches that an unbroken one would."""
        order = np.random.default_rng([seed, epoch]).permutation(self.table.requests)
        return [order[i : i + requests_per_batch] for i in range(0, len(order), requests_per_batch)]

    def _batch(self, requests: np.ndarray, rows: np.ndarray, request_of_row: np.ndarray, trim: bool = True) -> Batch:
        t, buckets = self.table, self.config.buckets
        weight = np.ones(len(rows), np.float32) if self.weights is None else self.weights[rows]
        arrays = {
            "request_ids_BW": hash_rows(t.request_cat[requests], buckets),
            "request_num_BF": t.request_num[requests],
            "item_ids_NW": hash_rows(t.item_cat[rows], buckets),
            "item_num_NF": t.item_num[rows],
            "request_of_row": request_of_row,
            "rows": rows,
            "labels_NA": t.labels[rows].astype(np.float32),
            "weight_N": weight,
            **self._history(requests, trim),
        }
        return Batch(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})

    def _history(self, requests: np.ndarray, trim: bool) -> dict[str, np.ndarray]:
        t, config = self.table, self.config
        start, end = t.history_start[requests], t.history_end[requests]
        longest = int(np.max(end - start, initial=0))
        length = min(config.history, max(longest, config.first)) if trim else config.history
        index = end[:, None] - 1 - np.arange(length)
        mask = index >= start[:, None]
        index = np.where(mask, index, 0)
        if not len(t.history_time):
            empty = np.zeros(index.shape, np.int64)
            item, bits, hours = empty, empty, empty.astype(np.float32)
        else:
            item = np.where(mask, t.history_item[index], 0)
            bits = np.where(mask, t.history_actions[index], 0)
            age = np.maximum(t.time[requests][:, None] - t.history_time[index], 0)
            hours = np.where(mask, age / HOUR_US, 0).astype(np.float32)
        return {
            "history_ids_BL": hash_rows(item, config.buckets),
            "history_bits_BL": bits,
            "history_hours_BL": hours,
            "history_mask_BL": mask,
        }


def row_weights(table: RankingTable, config: TrainConfig) -> np.ndarray:
    """(N,) float32, mean 1: less for sampled candidates and, by `user_weight_power`, for very active users."""
    _, user, count = np.unique(table.user_id, return_inverse=True, return_counts=True)
    by_request = count[user].astype(np.float64) ** -config.user_weight_power
    weight = by_request[table.request_of_row] * np.where(table.sampled, config.sampled_weight, 1.0)
    mean = weight.mean()
    if not mean > 0:
        raise EvergreenError("every training row has weight 0", "Give sampled candidates a weight above 0")
    return (weight / mean).astype(np.float32)


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


def hide(batch: Batch, config: TrainConfig, generator: torch.Generator) -> Batch:
    """What only training does to a batch: hide the newest actions and some ids.

    Each request draws T ~ U(0, `time_window_hours`) and loses the actions younger than T (TransAct, section 3.3.4:
    it keeps the ranker from narrowing a feed to what was done a minute ago). Each hashed value is hidden with
    `id_dropout`, which is how the dense part learns to rank users and items that it has never seen.
    """

    def drop(ids: Tensor) -> Tensor:
        hidden = torch.rand(ids.shape, generator=generator) < config.id_dropout
        return ids.masked_fill(hidden, 0)

    window_B1 = torch.rand(len(batch.history_mask_BL), 1, generator=generator) * config.time_window_hours
    mask_BL = batch.history_mask_BL & (batch.history_hours_BL >= window_B1)
    # What is left moves to the front: the first K outputs are those of the newest visible actions, as in serving.
    order_BL = torch.argsort((~mask_BL).to(torch.uint8), dim=1, stable=True)
    mask_BL = mask_BL.gather(1, order_BL)
    return replace(
        batch,
        request_ids_BW=drop(batch.request_ids_BW),
        item_ids_NW=drop(batch.item_ids_NW),
        history_ids_BL=drop(batch.history_ids_BL).gather(1, order_BL).masked_fill(~mask_BL, 0),
        history_bits_BL=batch.history_bits_BL.gather(1, order_BL).masked_fill(~mask_BL, 0),
        history_hours_BL=batch.history_hours_BL.gather(1, order_BL).masked_fill(~mask_BL, 0),
        history_mask_BL=mask_BL,
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
