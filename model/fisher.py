"""Importance of every weight: the exact per-sample diagonal Fisher, and its online form.

Definition. A sample is one candidate row with its request. F_i = mean over samples of (d loss_sample / d theta_i)^2,
where loss_sample is the row's weighted multi-head loss on the observed labels (the empirical Fisher). The square is
taken before the mean, so F does not depend on any batch size (squaring the gradient of a mini-batch's mean, as is
common, shrinks F by about the batch size). Dense weights: `torch.func` (vmap of grad). Embedding rows: the gradient
of a row is the sum of the gradients of the vectors that a sample looked up in it, so only touched rows exist.

Online EWC (Schwarz et al. 2018, arXiv 1805.06370): F_t = decay * F_{t-1} + F_new, around the newest weights.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable
from model.config import TrainConfig
from model.data import Batch, Batcher
from model.hashing import MISSING_ROW
from model.interest import Interest
from model.loss import label_weights, task_loss
from model.optim import dense_parameters
from model.ranker import Ranker, Vectors

_CHUNK = 64  # samples whose gradients are held at once; bounds memory, changes nothing else


@dataclass(frozen=True)
class Importance:
    """A diagonal Fisher.

    Attributes:
        dense: By name of the dense parameter, in its shape.
        rows: (U,) int64, ascending: the rows of the embedding table that have any importance.
        table_UD: Importance of those rows.
    """

    dense: dict[str, Tensor]
    rows: Tensor
    table_UD: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat form that `from_tensors` reads back."""
        dense = {f"fisher.dense.{k}": v for k, v in self.dense.items()}
        flat = dense | {"fisher.rows": self.rows, "fisher.table": self.table_UD}
        return {k: v.cpu().contiguous() for k, v in flat.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Importance | None":
        """The inverse of `to_tensors`; None where there is no importance among the tensors."""
        if "fisher.rows" not in tensors:
            return None
        prefix = "fisher.dense."
        dense = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return cls(dense, tensors["fisher.rows"], tensors["fisher.table"])

    def after(self, old: "Importance | None", decay: float) -> "Importance":
        """Online EWC: this importance, measured now, on top of the decayed old one."""
        if old is None:
            return self
        dense = {k: decay * old.dense[k].to(v) + v for k, v in self.dense.items()}
        both = torch.cat([old.rows.to(self.rows), self.rows])
        rows, slot = torch.unique(both, return_inverse=True)
        values = torch.cat([decay * old.table_UD.to(self.table_UD), self.table_UD])
        table_UD = torch.zeros(len(rows), values.shape[1], device=values.device).index_add(0, slot, values)
        return Importance(dense, rows, table_UD)


def sample_rows(table: RankingTable, most: int, seed: int) -> np.ndarray:
    """Candidate rows to measure on: all of them, or `most` drawn without replacement; ascending."""
    if table.rows <= most:
        return np.arange(table.rows)
    return np.sort(np.random.default_rng([seed, table.rows]).choice(table.rows, most, replace=False))


def measure(ranker: Ranker, batcher: Batcher, rows: np.ndarray, config: TrainConfig) -> Importance:
    """The Fisher over the given candidate rows, without dropout and with nothing hidden.

    Args:
        ranker: In evaluation mode.
        batcher: Of the table that the rows belong to, with the row weights of training.
        rows: Indices of candidate rows.
        config: For the label-weight matrix.
    """
    device = ranker.table.weight.device
    matrix = label_weights(ranker.spec, config).to(device)
    dense = {k: p.detach() for k, p in dense_parameters(ranker).items()}
    only_request = torch.zeros(1, dtype=torch.long, device=device)

    def loss(
        weights: dict[str, Tensor], vectors: dict[str, Tensor], known: dict[str, Tensor], columns: dict[str, Tensor]
    ) -> Tensor:
        # A sample is a batch of one request with one candidate.
        batch = Batch(**{k: v[None] for k, v in columns.items() if k != "request_of_row"}, request_of_row=only_request)
        looked_up = Vectors(**{k: v[None] for k, v in vectors.items()})
        interest = Interest(**{k: v[None] for k, v in known.items()})
        logits_NA = torch.func.functional_call(ranker, weights, (batch, looked_up, interest))
        return task_loss(logits_NA, batch.labels_NA, batch.weight_N, matrix)

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0, 0))
    total = {k: torch.zeros_like(p) for k, p in dense.items()}
    touched, squares = [], []
    for start in range(0, len(rows), _CHUNK):
        batch = batcher.of_rows(rows[start : start + _CHUNK]).to(device)
        with torch.no_grad():
            vectors = ranker.lookup(batch)
        by_weight, by_vector = gradients(dense, _tensors(vectors), _tensors(ranker.content(batch)), _tensors(batch))
        for name, gradient in by_weight.items():
            total[name] += gradient.square().sum(0)
        row_ids, square_UD = _square_by_row(ranker, batch, Vectors(**by_vector))
        touched.append(row_ids)
        squares.append(square_UD)
    found, slot = torch.unique(torch.cat(touched), return_inverse=True)
    squares_PD = torch.cat(squares)
    table_UD = squares_PD.new_zeros(len(found), squares_PD.shape[1]).index_add(0, slot, squares_PD)
    return Importance({k: v / len(rows) for k, v in total.items()}, found, table_UD / len(rows))


def _square_by_row(ranker: Ranker, batch: Batch, gradient: Vectors) -> tuple[Tensor, Tensor]:
    """Squared gradient of every (sample, embedding row) pair: the row's id and (D,) squares, one entry a pair."""
    buckets, half = ranker.config.buckets, gradient.item_NWD.shape[-1] // 2
    owners, halves = [], []
    for gradient_SWD in (gradient.request_BWD, gradient.item_NWD, gradient.history_BLD):
        samples, width = gradient_SWD.shape[:2]
        owners.append(torch.arange(samples, device=gradient_SWD.device).repeat_interleave(width))
        halves.append(gradient_SWD.reshape(samples * width, 2, half))
    # Two ids of a sample can share a row, as an item does that is a candidate and in the history: their gradients add
    # up before the square.
    rows_I2 = ranker.rows(batch)
    pair_I2 = torch.cat(owners)[:, None] * buckets + rows_I2
    real = rows_I2 != MISSING_ROW
    pairs, slot = torch.unique(pair_I2[real], return_inverse=True)
    halves_PD = torch.cat(halves)[real]
    sums_UD = halves_PD.new_zeros(len(pairs), half).index_add(0, slot, halves_PD)
    return pairs % buckets, sums_UD.square()


def _tensors(record: Batch | Vectors | Interest) -> dict[str, Tensor]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
