"""Importance of every weight: the exact per-sample diagonal Fisher, and its online form.

Definition. A sample is one candidate row with its request. F_i = mean over samples of (d loss_sample / d theta_i)^2,
where loss_sample is the row's weighted multi-head loss on the observed labels (the empirical Fisher). The square is
taken before the mean, so F does not depend on any batch size (squaring the gradient of a mini-batch's mean, as is
common, shrinks F by about the batch size). Dense weights: see `model/fisher_layers.py`. Embedding rows: the
gradient of a row is the sum of the gradients of the vectors that a sample looked up in it, so only touched rows exist.

Online EWC (Schwarz et al. 2018, arXiv 1805.06370): F_t = decay * F_{t-1} + F_new, around the newest weights.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable
from model.config import TrainConfig
from model.data import Batch, Batcher
from model.fisher_layers import Loss, SquaredGradients, Tensors
from model.hashing import MISSING_ROW
from model.interest import Interest
from model.loss import label_weights, task_loss
from model.optim import dense_parameters
from model.ranker import Ranker, Vectors

_CHUNK = 512  # samples that are computed at once; bounds memory, changes nothing else


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

    def even(self, rows: Tensor) -> "Importance":
        """As much importance in all, the same for every dense weight, and the same for every weight of these rows.

        Args:
            rows: (V,) int64, ascending: all rows of the table that were trained, touched by this importance or not.
        """
        weights = sum(v.numel() for v in self.dense.values())
        mean = sum(float(v.sum()) for v in self.dense.values()) / max(1, weights)
        width = self.table_UD.shape[1]
        of_table = float(self.table_UD.sum()) / max(1, len(rows) * width)
        dense = {k: torch.full_like(v, mean) for k, v in self.dense.items()}
        return Importance(dense, rows, torch.full((len(rows), width), of_table))

    def after(self, old: "Importance | None", decay: float) -> "Importance":
        """Online EWC: this importance, measured now, on top of the decayed old one."""
        if old is None:
            return self
        dense = {k: decay * old.dense[k].to(v) + v for k, v in self.dense.items()}
        both = torch.cat([old.rows.to(self.rows), self.rows])
        rows, table_UD = sum_by_row(both, torch.cat([decay * old.table_UD.to(self.table_UD), self.table_UD]))
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
    example = _samples(ranker, batcher.of_rows(rows[:1]).to(device))
    dense = SquaredGradients(_sample_loss(ranker, config), dict(dense_parameters(ranker)), *example)
    found = torch.zeros(0, dtype=torch.long, device=device)
    table_UD = ranker.table.weight.new_zeros(0, ranker.table.embedding_dim)
    rows = rows[np.argsort(batcher.actions(rows), kind="stable")]  # a chunk pads to its longest history
    for start in range(0, len(rows), _CHUNK):
        batch = batcher.of_rows(rows[start : start + _CHUNK]).to(device)
        vectors, *others = _samples(ranker, batch)
        vectors = {k: v.requires_grad_() for k, v in vectors.items()}
        dense.add(vectors, *others)
        new, new_PD = _square_by_row(
            ranker, batch, Vectors(**{k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in vectors.items()})
        )
        found, table_UD = sum_by_row(torch.cat([found, new]), torch.cat([table_UD, new_PD]))
    return Importance({k: v / len(rows) for k, v in dense.total.items()}, found, table_UD / len(rows))


def _sample_loss(ranker: Ranker, config: TrainConfig) -> Loss:
    """The loss of one sample as a function of weights, looked up vectors, interest and columns."""
    device = ranker.table.weight.device
    matrix = label_weights(ranker.spec, config).to(device)
    only_request = torch.zeros(1, dtype=torch.long, device=device)

    def loss(weights: Tensors, vectors: Tensors, known: Tensors, columns: Tensors) -> Tensor:
        # A sample is a batch of one request with one candidate.
        batch = Batch(**{k: v[None] for k, v in columns.items() if k != "request_of_row"}, request_of_row=only_request)
        looked_up = Vectors(**{k: v[None] for k, v in vectors.items()})
        interest = Interest(**{k: v[None] for k, v in known.items()})
        logits_NA = torch.func.functional_call(ranker, weights, (batch, looked_up, interest))
        return task_loss(logits_NA, batch.labels_NA, batch.weight_N, matrix)

    return loss


@torch.no_grad()
def _samples(ranker: Ranker, batch: Batch) -> tuple[Tensors, Tensors, Tensors]:
    """Vectors, interest and columns of a batch whose requests have one candidate each."""
    return _tensors(ranker.lookup(batch)), _tensors(ranker.content(batch)), _tensors(batch)


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


def sum_by_row(rows: Tensor, values_PD: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows, ascending, and the sums of their values."""
    found, slot = torch.unique(rows, return_inverse=True)
    return found, values_PD.new_zeros(len(found), values_PD.shape[1]).index_add(0, slot, values_PD)


def _tensors(record: Batch | Vectors | Interest) -> dict[str, Tensor]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
