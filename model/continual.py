"""How an update keeps what the champion knew: strategies by name, behind one small interface.

A strategy says two things: whether training starts from the champion's weights, and which losses are added to the task
loss on every step of an update. Whatever trained a bundle, it carries an importance, a reservoir and an exam, so that
any strategy can follow any other. What each of them costs and protects is measured: docs/continual.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable
from model.bundle import Bundle
from model.config import TrainConfig
from model.data import Batch, Batcher, Share, hide
from model.distributed import Ranks
from model.fisher import Importance
from model.loader import mix, requests_per_batch
from model.loss import head_weights, label_weights, row_losses, task_loss
from model.penalty import penalty
from model.predict import score
from model.ranker import Ranker
from model.reservoir import RESERVOIR, Reservoir, Seen
from model.weights import row_weights

_STREAM = 3  # of random numbers in a step; others are the loader's and the trainer's


@dataclass(frozen=True)
class Step:
    """One step of an update, as a loss sees it.

    Attributes:
        number: From 0, over all epochs.
        ranker: In training.
        batch: This process's part of the new requests, with what training hides hidden.
        logits_NA: What the ranker gave for it.
        share: Its share of the whole batch's rows; the sum over processes of share * loss is the loss of the step.
    """

    number: int
    ranker: Ranker
    batch: Batch
    logits_NA: Tensor
    share: float


class ExtraLoss(Protocol):
    """A loss beside the task's: a scalar."""

    def __call__(self, step: Step) -> Tensor:
        """The loss of this step."""


@dataclass(frozen=True)
class Window:
    """What a strategy's extra losses are made from: the champion and the new rows."""

    champion: Bundle
    table: RankingTable
    config: TrainConfig
    device: torch.device
    seed: int

    def label_weights(self) -> Tensor:
        """The label-weight matrix on the device."""
        return label_weights(self.table.spec, self.config).to(self.device)


@dataclass(frozen=True)
class Strategy:
    """One way to train.

    Attributes:
        name: By which it is asked for.
        continues: Whether it starts from the champion's weights, statistics and table accumulators.
        trains: Whether it trains at all where there is a champion.
        losses: Makers of the losses that are added on every step of an update.
    """

    name: str
    continues: bool = True
    trains: bool = True
    losses: tuple[Callable[[Window], ExtraLoss], ...] = field(default=())

    def extra_losses(self, window: Window) -> list[ExtraLoss]:
        """The losses to add to the task loss, ready to be called on steps of the window."""
        return [make(window) for make in self.losses]


def _nothing(step: Step) -> Tensor:
    return step.logits_NA.new_zeros(())


def _pull(window: Window, importance: Importance) -> ExtraLoss:
    held = penalty(window.champion, importance, window.table, window.device)
    half = window.config.ewc_lambda / 2
    return lambda step: half * held(step.ranker, step.batch)


def ewc(window: Window) -> ExtraLoss:
    """Online EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): lambda / 2 * sum_i F_i (theta_i - champion_i)^2."""
    importance = Importance.from_tensors(window.champion.memory)
    return _pull(window, importance) if importance else _nothing


def l2(window: Window) -> ExtraLoss:
    """The control of EWC: as much pull to the champion in all, the same on every weight whatever its importance."""
    importance = Importance.from_tensors(window.champion.memory)
    return _pull(window, importance.even(window.champion.weights["table.rows"])) if importance else _nothing


def distillation(window: Window) -> ExtraLoss:
    """Distillation from the champion: cross-entropy of every head against its probabilities on the same rows.

    The teacher scores the window once, before training, with nothing hidden. What it teaches are its calibrated
    probabilities: the student learns on raw logits, and those had better aim at the rates that were observed.
    """
    taught = torch.from_numpy(np.ascontiguousarray(score(window.champion, window.table)))
    matrix, weight = window.label_weights(), window.config.distill_weight

    def loss(step: Step) -> Tensor:
        soft_NA = taught[step.batch.rows.cpu()].to(window.device)
        return weight * _imitation(step.logits_NA, soft_NA, step.batch.weight_N, matrix)

    return loss


def rehearsal(window: Window) -> ExtraLoss:
    """Experience replay (Chaudhry et al. 2019, arXiv 1902.10486): the task loss on requests of the reservoir."""
    memory = Reservoir.from_tensors(window.champion.memory, RESERVOIR, window.champion.spec)
    return (
        Rehearsal(window, memory.table, memory.seen) if memory and memory.table.requests and memory.seen else _nothing
    )


def taught_rehearsal(window: Window) -> ExtraLoss:
    """Replay with labels and with the champion's probabilities, in the manner of DER++ (Buzzega et al. 2020)."""
    made = rehearsal(window)
    if isinstance(made, Rehearsal):
        made.teacher = window.champion.ranker().to(window.device)
    return made


class Rehearsal:
    """The loss on requests of the reservoir, `replay_share` of them for every new request; each counts like a new one.

    The reservoir is gone through in a seeded order, so that none comes again before all have come, and at most once for
    each pass over the new requests: a large window would else learn a small reservoir by heart. What the content
    vectors say of a request is what they said when it was new; see `model.reservoir`.

    Attributes:
        teacher: The champion's ranker, whose probabilities are imitated too; None without distillation.
    """

    def __init__(self, window: Window, table: RankingTable, seen: Seen) -> None:
        self.window, self.table, self.seen = window, table, seen
        self.batcher = Batcher(table, window.champion.recipe.ranker, row_weights(table, window.config))
        self.matrix = window.label_weights()
        self.teacher: Ranker | None = None
        new = requests_per_batch(window.table, window.config)
        steps = -(-window.table.requests // new)
        self.size = max(1, min(round(window.config.replay_share * new), table.requests // steps))
        self.weight = self.size / new
        self.order = np.random.default_rng([window.seed, table.requests]).permutation(table.requests)

    def requests(self, number: int) -> np.ndarray:
        """The requests of a step, over all processes."""
        return self.order[np.arange(number * self.size, (number + 1) * self.size) % len(self.order)]

    def __call__(self, step: Step) -> Tensor:
        """The loss of this process's part, so weighted that the step's loss is the mean over all replayed rows."""
        whole = self.requests(step.number)
        first, last, counts = Ranks.current().span(len(whole))
        mine, starts = whole[first:last], np.concatenate([[0], np.cumsum(self.batcher.sizes(whole))])
        plain = self.batcher.of_requests(mine)
        share = Share(len(whole), first, int(starts[-1]), int(starts[first]))
        generator = torch.Generator().manual_seed(mix(self.window.seed, step.number + 1, _STREAM))
        batch = hide(plain, self.window.config, generator, share).to(self.window.device)
        logits_NA = self._logits(step.ranker, batch, mine)
        loss = task_loss(logits_NA, batch.labels_NA, batch.weight_N, self.matrix)
        if self.teacher:
            with torch.no_grad():
                soft_NA = self.teacher.calibration(self._logits(self.teacher, plain.to(self.window.device), mine))
            weight = self.window.config.distill_weight
            loss = loss + weight * _imitation(logits_NA, soft_NA, batch.weight_N, self.matrix)
        part = len(batch.rows) / share.rows if counts and step.share else 0.0
        return self.weight * part / max(step.share, 1e-9) * loss

    def _logits(self, ranker: Ranker, batch: Batch, requests: np.ndarray) -> Tensor:
        interest = self.seen.in_place_of(ranker.content(batch), batch, requests)
        return ranker(batch, ranker.lookup(batch), interest)


def _imitation(logits_NA: Tensor, soft_NA: Tensor, weight_N: Tensor, matrix: Tensor) -> Tensor:
    losses_N = row_losses(logits_NA, soft_NA, head_weights(torch.zeros_like(soft_NA), matrix))
    return (weight_N * losses_N).mean()


STRATEGIES = {
    s.name: s
    for s in (
        Strategy("frozen", trains=False),
        Strategy("scratch", continues=False),
        Strategy("finetune"),
        Strategy("l2", losses=(l2,)),
        Strategy("ewc", losses=(ewc,)),
        Strategy("distill", losses=(distillation,)),
        Strategy("replay", losses=(rehearsal,)),
        Strategy("ewc+distill", losses=(ewc, distillation)),
        Strategy("distill+replay", losses=(distillation, taught_rehearsal)),
        Strategy("ewc+distill+replay", losses=(ewc, distillation, taught_rehearsal)),
    )
}
