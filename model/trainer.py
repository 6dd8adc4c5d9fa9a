"""The training loop: one code path for CPU and GPU, one process or several, resumable to the bit."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import TableSpec
from model.bundle import Bundle
from model.checkpoint import Checkpoints
from model.config import Recipe
from model.continual import ExtraLoss, Step
from model.data import Batcher, hide
from model.distributed import Ranks
from model.loader import Loader, Part, ahead, mix, requests_per_batch
from model.loss import label_weights, task_loss
from model.memory import Peak, choose_batch
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
        ranks: This process among those that train together.

    Attributes:
        extra_losses: Added to the task loss on every step.
        ahead: Batches that a thread of the loader makes ready in advance.
        skipped: Steps that were skipped because a loss or gradient was not finite.
        peak: Memory that the steps took.
        loader_share: Share of the run's time that it waited for batches.
    """

    def __init__(
        self,
        spec: TableSpec,
        recipe: Recipe,
        seed: int,
        batcher: Batcher,
        champion: Bundle | None,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        config = recipe.train
        self.config = replace(config, rows_per_batch=config.update_rows_per_batch) if champion else config
        self.seed, self.batcher, self.device = seed, batcher, device
        self.ranks, self.ahead = ranks, 2 if device.type == "cuda" else 0
        self.extra_losses: list[ExtraLoss] = []
        self.skipped, self.loader_share, self.peak = 0, 0.0, Peak(device)
        self._loss_sum, self._loss_steps = 0.0, 0  # of this epoch
        self._seed(0)
        self.ranker = Ranker(recipe.ranker, spec).to(device)
        self.dense = dense_parameters(self.ranker)
        # The lookup stays outside: its sparse gradient is nothing for a compiler.
        self._logits = torch.compile(self.ranker, dynamic=True) if self.config.compile else self.ranker
        self.table_optimizer = RowAdagrad(self.ranker.table.weight)
        self.continued = champion is not None
        self.scale, self.epochs = 1.0, self.config.epochs
        if champion:
            self.ranker.load_state(champion.weights)
            self.ranker.calibration.reset()  # it was the champion's; new weights are calibrated anew
            self._load_sums(champion.memory)
            self.scale, self.epochs = self.config.update_lr_scale, self.config.update_epochs
        self.dense_optimizer = dense_optimizer(self.ranker, self.config)
        half = self.config.precision == "fp16" or (device.type == "cuda" and self.config.precision == "auto")
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.matrix = label_weights(spec, self.config).to(device)

    def run(self, checkpoints: Checkpoints, progress: Callable[[int, int, float], None]) -> float:
        """Train to the end, from the last checkpoint if there is one; returns the mean loss of the last epoch.

        Raises:
            EvergreenError: Too many steps were not finite, or the processes of the run found different checkpoints.
        """
        config = self.config
        loader = Loader(self.batcher, config, self.seed, self.ranks)
        steps = loader.per_epoch * self.epochs
        done = self._resume(checkpoints, loader.per_epoch)
        self.ranks.agree(done, self.device)
        self.peak.forget()
        started, waited = time.perf_counter(), 0.0
        with closing(ahead(loader.part, range(done, steps), self.ahead)) as parts:
            for step in range(done, steps):
                epoch, place = divmod(step, loader.per_epoch)
                if place == 0:
                    self._begin(epoch)
                    self._loss_sum, self._loss_steps = 0.0, 0
                asked = time.perf_counter()
                part = next(parts)
                waited += time.perf_counter() - asked
                self._seed(step + 1, 2, self.ranks.rank)  # for dropout inside layers
                loss = self._step(part, step, self.scale * rate(step, steps, config.warmup))
                if np.isfinite(loss):
                    self._loss_sum, self._loss_steps = self._loss_sum + loss, self._loss_steps + 1
                progress(step + 1, steps, loss)
                if (step + 1) % config.checkpoint_steps == 0 and step + 1 < steps:
                    self._save(checkpoints, step + 1)
        self.loader_share = waited / max(time.perf_counter() - started, 1e-9)
        self._finish()
        return self._loss_sum / max(1, self._loss_steps)

    def fit_batch(self, total: int) -> int:
        """Candidates in a batch, over all processes, with which a step keeps to its part of a device's memory.

        Args:
            total: Bytes of the device.

        Raises:
            EvergreenError: No number of requests does.
        """
        table = self.batcher.table
        wanted = requests_per_batch(table, self.config)
        each = choose_batch(self.peak_of, total, -(-wanted // self.ranks.size))
        size = min(wanted, self.ranks.least(each, self.device) * self.ranks.size)
        rows = self.config.rows_per_batch if size == wanted else max(1, round(size * table.rows / table.requests))
        self.config = replace(self.config, rows_per_batch=rows)
        return rows

    def peak_of(self, requests: int) -> int:
        """Bytes at the peak of a step with that many requests of this process, the table's largest; trains nothing."""
        sizes = np.diff(self.batcher.table.offsets)
        largest = np.argsort(sizes, kind="stable")[-requests:]
        generator = torch.Generator().manual_seed(self.seed)
        batch = hide(self.batcher.of_requests(largest), self.config, generator).to(self.device)
        self.peak.forget()
        try:
            loss = self._loss(Part(batch, 1.0), 0)
            self.peak.note()
            loss.backward()
            self.peak.note()
        except torch.OutOfMemoryError:
            self.peak.bytes = 2**62
        self._clear()
        return self.peak.bytes + sum(2 * p.nbytes for p in self.dense.values())  # AdamW's moments come later

    def _seed(self, *place: int) -> None:
        # Not `torch.manual_seed`: it formats a stack trace for every kind of device that is not there.
        seed = mix(self.seed, *place)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _begin(self, epoch: int) -> None:
        """Training from scratch forgets the embeddings, and only them, between epochs.

        A ranker with embeddings of ids overfits from its second epoch on, through the embeddings (Zhang et al. 2022,
        arXiv 2209.06053); drawn anew each epoch they are trained in one pass while the dense part sees the data
        several times, as if it were more data (MEDA, Fan et al. 2023, arXiv 2305.19531).
        """
        if self.continued or epoch == 0:
            return
        with torch.no_grad():
            self.ranker.table.weight.zero_()
        self.table_optimizer.sums.zero_()

    def memory(self) -> dict[str, Tensor]:
        """What the next update needs of the optimiser: the accumulators of the seen rows, in the order of the rows.

        With them a well-known row moves little and a new one a lot. (AdamW's moments are started anew.)
        """
        rows = self.ranker.seen.nonzero()[:, 0]
        return {"table.rows": rows.cpu(), "table.sums": self.table_optimizer.sums[rows].cpu()}

    def _step(self, part: Part, number: int, scale: float) -> float:
        """The step of that number at `scale` times the peak learning rates; returns the loss, finite or not.

        Loss and gradients are those of the whole batch, the same in every process, so all of them skip or none.
        """
        config, table = self.config, self.ranker.table.weight
        loss = self._loss(part, number) * part.share
        self.peak.note()
        self.scaler.scale(loss).backward()
        loss = loss.detach().clone()
        self.ranks.sum_([loss, *(p.grad for p in self.dense.values() if p.grad is not None)])
        self.scaler.unscale_(self.dense_optimizer)
        gradient: Tensor = table.grad  # type: ignore[assignment]  # every batch has ids
        table.grad = self.ranks.sum_rows(gradient) / self.scaler.get_scale()
        norm = torch.nn.utils.clip_grad_norm_(self.dense.values(), config.clip)
        sound = torch.isfinite(torch.stack([loss, norm])).all() & torch.isfinite(table.grad.values()).all()
        value, fine = torch.stack([loss, sound.to(loss)]).tolist()  # the one place where a GPU is waited for
        if fine:
            for group in self.dense_optimizer.param_groups:
                group["lr"] = config.lr * scale
            self.scaler.step(self.dense_optimizer)
            self.table_optimizer.step(config.table_lr * scale)
            self.scaler.update()
        else:
            self._skip(value)
        self._clear()
        return value

    def _loss(self, part: Part, number: int) -> Tensor:
        kind, precision = self.device.type, self.config.precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        batch = part.batch.to(self.device)
        self.ranker.train()
        with torch.autocast(kind, dtype=dtype, enabled=precision == "bf16" or self.scaler.is_enabled()):
            logits_NA = self._logits(batch, self.ranker.lookup(batch))
            step = Step(number, self.ranker, batch, logits_NA.float(), part.share)
            loss = task_loss(step.logits_NA, batch.labels_NA, batch.weight_N, self.matrix)
            for extra in self.extra_losses:
                loss = loss + extra(step)
        return loss

    def _clear(self) -> None:
        self.dense_optimizer.zero_grad(set_to_none=True)
        self.ranker.table.weight.grad = None

    def _skip(self, loss: float) -> None:
        scale = self.scaler.get_scale()  # 1 without half precision
        # Half the scale whichever part overflowed: the scaler itself looks at the dense gradients only.
        self.scaler.update(scale / 2)
        # An infinite gradient of a finite loss is how the scale is found: no fault.
        if np.isfinite(loss) and scale > 1:
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

    def _save(self, checkpoints: Checkpoints, step: int) -> None:
        if self.ranks.rank == 0:
            loss = {"sum": self._loss_sum, "steps": self._loss_steps}
            counters = {"skipped": self.skipped, "loss": loss, "scaler": self.scaler.state_dict()}
            checkpoints.save(step, self._state(), counters)

    def _state(self) -> dict[str, Tensor]:
        """Weights and optimisers, of the table only the rows that were touched."""
        rows = (self.table_optimizer.sums > 0).nonzero()[:, 0]
        tensors = {
            "rows": rows,
            "values": self.ranker.table.weight.detach()[rows],
            "sums": self.table_optimizer.sums[rows],
        }
        for name, weight in self.dense.items():
            tensors[f"dense.{name}"] = weight.detach()
            moments = self.dense_optimizer.state.get(weight, {})
            tensors |= {f"{moment}.{name}": value for moment, value in moments.items()}
        return {k: v.cpu() for k, v in tensors.items()}

    @torch.no_grad()
    def _resume(self, checkpoints: Checkpoints, per_epoch: int) -> int:
        """Take up the newest checkpoint; returns the number of steps that it had done."""
        found = checkpoints.latest()
        if found is None:
            return 0
        step, tensors, counters = found
        tensors = {k: v.to(self.device) for k, v in tensors.items()}
        self.ranker.table.weight[tensors["rows"]] = tensors["values"]
        self.table_optimizer.sums[tensors["rows"]] = tensors["sums"]
        for name, weight in self.dense.items():
            weight.copy_(tensors[f"dense.{name}"])
            moments = {m: tensors[f"{m}.{name}"] for m in _MOMENTS if f"{m}.{name}" in tensors}
            if moments:
                self.dense_optimizer.state[weight] = moments
        self.skipped = counters["skipped"]
        self._loss_sum, self._loss_steps = counters["loss"]["sum"], counters["loss"]["steps"]
        self.scaler.load_state_dict(counters["scaler"])
        return step

    def _load_sums(self, memory: dict[str, Tensor]) -> None:
        self.table_optimizer.sums[memory["table.rows"].to(self.device)] = memory["table.sums"].to(self.device)
