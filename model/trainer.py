"""The training loop: one code path for CPU and GPU, resumable to the bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import TableSpec
from model.bundle import Bundle
from model.checkpoint import Checkpoints
from model.config import Recipe
from model.continual import ExtraLoss
from model.data import Batch, Batcher, hide
from model.loss import label_weights, task_loss
from model.optim import RowAdagrad, dense_optimizer, dense_parameters, finite, rate
from model.ranker import Ranker

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the state that AdamW keeps for a parameter


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Fixed threads, deterministic kernels and a private random state; all put back afterwards."""
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads unwritten memory
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        deterministic.fill_uninitialized_memory = fill


class Trainer:
    """A ranker in training.

    Args:
        spec: What the table's columns mean.
        recipe: Sizes and training configuration.
        seed: Seed of everything random.
        batcher: Cuts the batches.
        champion: The model to continue from; None to start from scratch.
        device: Where to train.

    Attributes:
        extra_losses: Added to the task loss on every step.
        skipped: Steps that were skipped because a loss or gradient was not finite.
    """

    def __init__(
        self,
        spec: TableSpec,
        recipe: Recipe,
        seed: int,
        batcher: Batcher,
        champion: Bundle | None,
        device: torch.device,
    ) -> None:
        self.config, self.seed, self.batcher, self.device = recipe.train, seed, batcher, device
        self.extra_losses: list[ExtraLoss] = []
        self.skipped = 0
        # The rows that no training has touched are drawn here; neither bundle nor checkpoint stores them.
        torch.manual_seed(_mix(seed, 0))
        self.ranker = Ranker(recipe.ranker, spec).to(device)
        self.table_optimizer = RowAdagrad(self.ranker.table.weight)
        self.continued = champion is not None
        self.scale, self.epochs = 1.0, self.config.epochs
        if champion:
            self.ranker.load_state(champion.weights)
            self._load_sums(champion.memory)
            self.scale, self.epochs = self.config.update_lr_scale, self.config.update_epochs
        self.dense_optimizer = dense_optimizer(self.ranker, self.config)
        half = device.type == "cuda" and self.config.precision == "auto"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.matrix = label_weights(spec, self.config).to(device)

    def run(self, checkpoints: Checkpoints, progress: Callable[[int, int, float], None]) -> float:
        """Train to the end, from the last checkpoint if there is one; returns the mean loss of the last epoch.

        Raises:
            EvergreenError: Too many steps were not finite.
        """
        size, config = self.config.requests_per_batch, self.config
        per_epoch = -(-self.batcher.table.requests // size)
        steps = per_epoch * self.epochs
        losses = [0.0] * per_epoch
        done = self._resume(checkpoints, losses, per_epoch)
        for step in range(done, steps):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                self._begin(epoch)
            if place == 0 or step == done:
                order = self.batcher.order(size, self.seed, epoch)
            torch.manual_seed(_mix(self.seed, step + 1))
            batch = self.batcher.of_requests(order[place])
            batch = hide(batch, config, torch.default_generator).to(self.device)
            loss = self._step(batch, self.scale * rate(step, steps, config.warmup))
            losses[place] = loss
            progress(step + 1, steps, loss)
            if (step + 1) % config.checkpoint_steps == 0 and step + 1 < steps:
                counters = {"skipped": self.skipped, "losses": losses, "scaler": self.scaler.state_dict()}
                checkpoints.save(step + 1, self._state(), counters)
        self._finish()
        return float(np.nanmean(losses))

    def _begin(self, epoch: int) -> None:
        """Training from scratch forgets the embeddings, and only them, between epochs.

        A ranker with embeddings of ids overfits from its second epoch on, through the embeddings (Zhang et al. 2022,
        arXiv 2209.06053); drawn anew each epoch they are trained in one pass while the dense part sees the data
        several times, as if it were more data (MEDA, Fan et al. 2023, arXiv 2305.19531).
        """
        if self.continued or epoch == 0:
            return
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, stream=1))
        self.ranker.draw_table(generator)
        self.table_optimizer.sums.zero_()

    def memory(self) -> dict[str, Tensor]:
        """What the next update needs of the optimiser: the accumulators of the seen rows, in the order of the rows.

        With them a well-known row moves little and a new one a lot. (AdamW's moments are started anew.)
        """
        rows = self.ranker.seen.nonzero()[:, 0]
        return {"table.rows": rows.cpu(), "table.sums": self.table_optimizer.sums[rows].cpu()}

    def _step(self, batch: Batch, scale: float) -> float:
        """One step at `scale` times the peak learning rates; returns the loss, finite or not."""
        config, table = self.config, self.ranker.table.weight
        loss = self._loss(batch)
        value = float(loss.detach())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.dense_optimizer)
        gradient: Tensor = table.grad  # type: ignore[assignment]  # every batch has ids
        table.grad = gradient.coalesce() / self.scaler.get_scale()
        norm = torch.nn.utils.clip_grad_norm_(dense_parameters(self.ranker).values(), config.clip)
        if np.isfinite(value) and finite([norm, table.grad.values()]):
            for group in self.dense_optimizer.param_groups:
                group["lr"] = config.lr * scale
            self.scaler.step(self.dense_optimizer)
            self.table_optimizer.step(config.table_lr * scale)
        else:
            self._skip(value)
        self.scaler.update()
        self.dense_optimizer.zero_grad(set_to_none=True)
        table.grad = None
        return value

    def _loss(self, batch: Batch) -> Tensor:
        kind, half = self.device.type, self.config.precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float16
        self.ranker.train()
        with torch.autocast(kind, dtype=dtype, enabled=half or kind == "cuda"):
            logits_NA = self.ranker(batch)
        logits_NA = logits_NA.float()
        loss = task_loss(logits_NA, batch.labels_NA, batch.weight_N, self.matrix)
        for extra in self.extra_losses:
            loss = loss + extra(self.ranker, batch, logits_NA)
        return loss

    def _skip(self, loss: float) -> None:
        # An infinite gradient of a finite loss is how a GradScaler finds its scale: no fault.
        if np.isfinite(loss) and self.scaler.is_enabled():
            return
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise EvergreenError(
                f"training diverged: {self.skipped} steps had a loss or gradient that is not finite",
                "Lower lr and table_lr in the recipe, or look for broken values in the features",
            )

    def _finish(self) -> None:
        self.ranker.seen.copy_(self.table_optimizer.sums > 0)
        self.ranker.eval()
        if not finite(list(self.ranker.state().values())):
            raise EvergreenError(
                "training ended with weights that are not finite", "Lower lr and table_lr in the recipe"
            )

    def _state(self) -> dict[str, Tensor]:
        """Weights and optimisers, of the table only the rows that were touched."""
        rows = (self.table_optimizer.sums > 0).nonzero()[:, 0]
        tensors = {
            "rows": rows,
            "values": self.ranker.table.weight.detach()[rows],
            "sums": self.table_optimizer.sums[rows],
        }
        for name, weight in dense_parameters(self.ranker).items():
            tensors[f"dense.{name}"] = weight.detach()
            moments = self.dense_optimizer.state.get(weight, {})
            tensors |= {f"{moment}.{name}": value for moment, value in moments.items()}
        return {k: v.cpu() for k, v in tensors.items()}

    @torch.no_grad()
    def _resume(self, checkpoints: Checkpoints, losses: list[float], per_epoch: int) -> int:
        """Take up the newest checkpoint; returns the number of steps that it had done."""
        found = checkpoints.latest()
        if found is None:
            return 0
        step, tensors, counters = found
        self._begin((step - 1) // per_epoch)  # the start of the rows that are not in the checkpoint
        tensors = {k: v.to(self.device) for k, v in tensors.items()}
        self.ranker.table.weight[tensors["rows"]] = tensors["values"]
        self.table_optimizer.sums[tensors["rows"]] = tensors["sums"]
        for name, weight in dense_parameters(self.ranker).items():
            weight.copy_(tensors[f"dense.{name}"])
            moments = {m: tensors[f"{m}.{name}"] for m in _MOMENTS if f"{m}.{name}" in tensors}
            if moments:
                # AdamW counts its steps on the CPU.
                self.dense_optimizer.state[weight] = moments | {"step": moments["step"].cpu()}
        self.skipped = counters["skipped"]
        losses[:] = counters["losses"]
        self.scaler.load_state_dict(counters["scaler"])
        return step

    def _load_sums(self, memory: dict[str, Tensor]) -> None:
        self.table_optimizer.sums[memory["table.rows"].to(self.device)] = memory["table.sums"].to(self.device)


def _mix(seed: int, step: int, stream: int = 0) -> int:
    """The seed of everything random in one step, or in one epoch on another stream."""
    return int(np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))
