"""How an update keeps what the champion knew: strategies by name, behind one small interface.

A strategy says three things: whether training starts from the champion's weights, which losses are added to the task
loss, and what the importance of the weights is afterwards. Every bundle carries an importance, whatever made it, so
that any strategy can follow any other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable
from model.bundle import Bundle
from model.config import TrainConfig
from model.data import Batch
from model.distributed import Ranks
from model.fisher import Importance
from model.loss import head_weights, label_weights, row_losses
from model.optim import dense_parameters
from model.predict import score
from model.ranker import Ranker

ExtraLoss = Callable[[Ranker, Batch, Tensor], Tensor]  # (student, batch, its logits (N, A)) -> scalar


@dataclass(frozen=True)
class Window:
    """What a strategy's extra losses are made from: the champion and the new rows."""

    champion: Bundle
    table: RankingTable
    config: TrainConfig
    device: torch.device


@dataclass(frozen=True)
class Strategy:
    """One way to train.

    Attributes:
        name: By which it is asked for.
        continues: Whether it starts from the champion's weights, statistics and table accumulators.
        losses: Makers of the losses that are added on every step of an update.
    """

    name: str
    continues: bool
    losses: tuple[Callable[[Window], ExtraLoss], ...] = ()

    def extra_losses(self, window: Window) -> list[ExtraLoss]:
        """The losses to add to the task loss, ready to be called on batches of the window."""
        return [make(window) for make in self.losses]

    def importance(self, measured: Importance, champion: Bundle | None, decay: float) -> Importance:
        """The importance that goes with the new weights: the champion's counts only where they were continued."""
        old = Importance.from_tensors(champion.memory) if champion and self.continues else None
        return measured.after(old, decay)


def ewc_penalty(window: Window) -> ExtraLoss:
    """Online EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): lambda / 2 * sum_i F_i (theta_i - champion_i)^2.

    Dense weights are held on every step; a row of the table is held on the steps that look it up. No other step
    moves it, and so a step costs what its batch touches, not what the table holds.
    """
    importance = Importance.from_tensors(window.champion.memory)
    if importance is None:
        return lambda ranker, batch, logits_NA: logits_NA.new_zeros(())
    device, half = window.device, window.config.ewc_lambda / 2
    teacher = window.champion.ranker().to(device)
    anchor = {k: p.detach().clone() for k, p in dense_parameters(teacher).items()}
    fisher = {k: v.to(device) for k, v in importance.dense.items()}
    # Slot of every table row in the importance; rows that have none share the last slot, which is all zeros.
    slot = torch.full((teacher.config.buckets,), len(importance.rows), device=device)
    slot[importance.rows.to(device)] = torch.arange(len(importance.rows), device=device)
    fisher_UD = torch.nn.functional.pad(importance.table_UD.to(device), (0, 0, 0, 1))
    anchor_UD = torch.nn.functional.pad(teacher.table.weight.detach()[importance.rows.to(device)], (0, 0, 0, 1))

    def loss(ranker: Ranker, batch: Batch, logits_NA: Tensor) -> Tensor:
        rows = Ranks.current().union(ranker.rows(batch).flatten())  # of the whole batch, in every process
        rows = rows[slot[rows] < len(importance.rows)]
        moved_UD = ranker.table(rows) - anchor_UD[slot[rows]]
        total = (fisher_UD[slot[rows]] * moved_UD.square()).sum()
        for name, weight in dense_parameters(ranker).items():
            total = total + (fisher[name] * (weight - anchor[name]).square()).sum()
        return half * total

    return loss


def distillation(window: Window) -> ExtraLoss:
    """Distillation from the champion: cross-entropy of every head against its probabilities on the same rows.

    The teacher scores the window once, before training, with nothing hidden. What it teaches are its calibrated
    probabilities: the student learns on raw logits, and those had better aim at the rates that were observed.
    """
    config = window.config
    taught = torch.from_numpy(np.ascontiguousarray(score(window.champion, window.table)))
    matrix = label_weights(window.table.spec, config).to(window.device)

    def loss(ranker: Ranker, batch: Batch, logits_NA: Tensor) -> Tensor:
        soft_NA = taught[batch.rows.cpu()].to(logits_NA.device)
        losses_N = row_losses(logits_NA, soft_NA, head_weights(torch.zeros_like(soft_NA), matrix))
        return config.distill_weight * (batch.weight_N * losses_N).mean()

    return loss


STRATEGIES = {
    s.name: s
    for s in (
        Strategy("scratch", continues=False),
        Strategy("finetune", continues=True),
        Strategy("ewc+distill", continues=True, losses=(ewc_penalty, distillation)),
    )
}
