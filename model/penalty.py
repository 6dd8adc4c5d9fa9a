"""A quadratic pull back to the champion's weights, equally strong whatever the size of the batches.

Dense weights are held on every step. A row of the embedding table is held on the steps whose requests refer to it: no
other step moves it, and so a step costs what its batch touches, not what the table holds. Rare rows would then be held
less than common ones, and all of them the more the larger the batches are. So the pull on a row is divided by how
often it comes: (share of the batch's requests that refer to it) / (share of the window's). Every batch is a uniform
sample of the window's requests, so the mean of that weight is 1 for every row and every size of batch, and the mean
penalty is the full sum_i F_i (theta_i - champion_i)^2, over the rows that the window refers to.

A request refers to its own ids, those of its candidates and those of its whole history, hidden from the step or not:
what training hides is drawn anew on every step, and the shares must not depend on it.

Shapes: B requests, N candidates, L actions, W hashed columns, U rows with any importance, D numbers in a row, P pairs.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable
from model.bundle import Bundle
from model.data import Batch, Batcher
from model.distributed import Ranks
from model.fisher import Importance
from model.hashing import rows_of
from model.optim import dense_parameters
from model.ranker import Ranker

_CHUNK = 1024  # requests of the window that are counted at once
_KEYS = 1 << 32  # more than a table has candidates

Penalty = Callable[[Ranker, Batch], Tensor]


def penalty(champion: Bundle, importance: Importance, table: RankingTable, device: torch.device) -> Penalty:
    """sum_i F_i (theta_i - champion_i)^2 on each batch of a window; its mean over batches is that of all rows.

    With the Fisher it is EWC's (Kirkpatrick et al. 2017, arXiv 1612.00796), with `Importance.even` that of plain L2.
    The factor lambda / 2 is the caller's. Under several processes each returns the value of the whole batch.

    Args:
        champion: The model whose weights pull.
        importance: F, of all dense weights and of any rows of the table.
        table: The window: every batch must be of requests of it.
        device: Where the ranker in training is.
    """
    teacher, ranks = champion.ranker().to(device), Ranks.current()
    buckets = teacher.config.buckets
    anchor = _flat({k: p.detach() for k, p in dense_parameters(teacher).items()})
    fisher = _flat({k: importance.dense[k].to(device) for k in dense_parameters(teacher)})
    rows_U, fisher_UD = importance.rows.to(device), importance.table_UD.to(device)
    anchor_UD = teacher.table.weight.detach()[rows_U]
    share_U = _shares(Batcher(table, teacher.config), rows_U, buckets)

    def value(ranker: Ranker, batch: Batch) -> Tensor:
        total = (fisher * (_flat(dense_parameters(ranker)) - anchor).square()).sum()
        # Of the whole batch, in every process; one without requests of its own repeats another's, which count once.
        place, count = _counted(ranks.union(_pairs(batch, rows_U, buckets)))
        weight = count / len(ranks.union(_keys(batch))) / share_U[place]
        moved_D = ranker.table(rows_U[place]) - anchor_UD[place]
        return total + (weight[:, None] * fisher_UD[place] * moved_D.square()).sum()

    return value


def _flat(weights: dict[str, Tensor] | dict[str, torch.nn.Parameter]) -> Tensor:
    return torch.cat([w.flatten() for w in weights.values()])  # one tensor: a step is a few operations, not hundreds


def _shares(batcher: Batcher, rows_U: Tensor, buckets: int) -> Tensor:
    """(U,) share of the window's requests that refer to each row; rows that none refers to count as one request's."""
    total, requests = torch.zeros(len(rows_U), device=rows_U.device), batcher.table.requests
    for start in range(0, requests, _CHUNK):
        batch = batcher.of_requests(np.arange(start, min(start + _CHUNK, requests))).to(rows_U.device)
        place, count = _counted(_pairs(batch, rows_U, buckets).unique())
        total[place] += count
    return total.clamp(min=1) / requests


def _counted(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The different places in ascending, different pairs, and how many requests refer to each."""
    place, count = torch.unique_consecutive(pairs // _KEYS, return_counts=True)
    return place, count


def _pairs(batch: Batch, rows_U: Tensor, buckets: int) -> Tensor:
    """(P,) every pair of a place in `rows_U` and the key of a request that refers to it, as one number."""
    blocks = (batch.request_ids_BW, batch.item_ids_NW, batch.history_ids_BL)
    keys_B = _keys(batch)
    keys = (keys_B, keys_B[batch.request_of_row], keys_B)
    ids = torch.cat([b.flatten() for b in blocks]).abs()  # a hidden id is the negative of itself
    key = torch.cat([k.repeat_interleave(b.shape[1]) for k, b in zip(keys, blocks, strict=True)])
    real = ids != 0  # histories are mostly padding
    rows, key = rows_of(ids[real], buckets), key[real]
    place = torch.searchsorted(rows_U, rows)
    found = torch.cat([rows_U, rows_U.new_tensor([buckets])])[place] == rows
    return (place * _KEYS + key[:, None])[found]


def _keys(batch: Batch) -> Tensor:
    """(B,) a number of each request that no other one of its table has: its first candidate."""
    none_B = torch.zeros_like(batch.time_B)
    return none_B.scatter_reduce(0, batch.request_of_row, batch.rows, "amin", include_self=False)
