"""Train a ranker, from scratch or as an update of the champion.

A run is a function of its inputs: batches come from (seed, epoch), everything random in a step from (seed, step). So
a killed run that starts again from a checkpoint, which holds no generator state, ends in the same bits.

Under `torchrun` every process calls `train` with the same arguments (inside `model.distributed.joined`) and gets the
same bundle; only the first one writes checkpoints.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.bundle import Bundle, code_digest
from model.checkpoint import Checkpoints
from model.columns import changes
from model.config import Recipe
from model.content import CONTENT, content_of, learn
from model.continual import STRATEGIES, Rehearsal, Strategy, Window
from model.data import Batcher, pick_device, table_digest
from model.distributed import Ranks
from model.exam import held_out
from model.files import canonical, sha
from model.fisher import Importance, measure, sample_rows, sum_by_row
from model.grow import grown
from model.reservoir import EXAM, RESERVOIR, Reservoir, Seen, choose, without_users
from model.trainer import Trainer, reproducible
from model.weights import row_weights

_VERSIONS = 8  # of the content vectors over a window trained from scratch

Progress = Callable[[int, int, float], None]  # (step, steps, loss)
Forgotten = Callable[[np.ndarray], np.ndarray]


def train(
    table: RankingTable,
    recipe: Recipe,
    strategy: str,
    parent: Bundle | None,
    seed: int,
    checkpoints: Path,
    progress: Progress | None = None,
    forgotten: Forgotten | None = None,
) -> Bundle:
    """Train on the requests of the table, but for those that are kept for exams (`model.exam`).

    Args:
        table: The training window: everything for a run from scratch, the new requests for an update.
        recipe: Sizes and training configuration; an update must have the champion's sizes.
        strategy: Name in `STRATEGIES`. One that continues a champion trains from scratch where there is none.
        parent: The champion. The strategy `frozen` gives it back as it is.
        seed: Seed of everything random. On a CPU, equal inputs give equal bits.
        checkpoints: Directory for this run's checkpoints; a killed run continues from it, a finished one empties it.
        progress: Called after every step.
        forgotten: Tells which user ids (bytes) must not be learned from again: their past requests are let go.

    Raises:
        EvergreenError: The strategy is unknown, the table is empty or has nothing to learn from, it does not fit the
            champion, or training diverged.
    """
    chosen = _checked(table, recipe, strategy, parent)
    if parent and not chosen.trains:
        return parent
    champion = grown(parent, table) if parent and chosen.continues else None
    if champion and forgotten:
        champion = replace(champion, memory=without_users(champion.memory, champion.spec, forgotten))
    started, cpu = time.monotonic(), time.process_time()
    kept_for_exam = held_out(table)
    exam, table = table.select(np.flatnonzero(kept_for_exam)), table.select(np.flatnonzero(~kept_for_exam))
    with reproducible(recipe.train.threads):
        batcher = Batcher(table, recipe.ranker, row_weights(table, recipe.train))
        trainer = Trainer(table.spec, recipe, seed, batcher, champion, pick_device(), Ranks.current())
        # An update's rows read what the champion knew; the version learned from them is for what comes after.
        known = content_of(champion.memory) if champion else None
        content, state = learn(table, recipe.ranker.content, 1 if champion else _VERSIONS, seed, known)
        trainer.ranker.content.set(content)
        if champion:
            trainer.extra_losses = chosen.extra_losses(Window(champion, table, trainer.config, trainer.device, seed))
        else:
            trainer.ranker.fit_statistics(table)
        recipe = _fitted(recipe, trainer)
        data = table_digest(table)
        kept = Checkpoints(checkpoints, _run_key(recipe, strategy, champion, seed, data))
        loss = trainer.run(kept, progress or (lambda step, steps, loss: None))
        fitted = time.monotonic()
        importance = _measured(trainer, recipe)
        if champion:
            importance = importance.after(Importance.from_tensors(champion.memory), recipe.train.fisher_decay)
        measured = time.monotonic()
        past = _remembered(trainer, recipe, champion, exam)
    replayed = sum(loss.weight for loss in trainer.extra_losses if isinstance(loss, Rehearsal))
    start, end = (_instant(int(t)) for t in (table.time.min(), table.time.max()))
    bundle = Bundle(
        spec=table.spec,
        recipe=recipe,
        weights=trainer.ranker.state(),
        memory=trainer.memory() | importance.to_tensors() | {CONTENT + k: v for k, v in state.items()} | past,
        strategy=strategy,
        seed=seed,
        parent=parent.digest if parent and champion else "",
        updates=champion.updates + 1 if champion else 0,
        data=data,
        train_start=start,
        train_end=end,
        train_rows=table.rows,
        code=code_digest(),
        metrics={
            "loss": loss,
            "skipped_steps": trainer.skipped,
            "peak_memory_mb": trainer.peak.megabytes,
            "loader_share": trainer.loader_share,
            "rows_read": table.rows * trainer.epochs * (1 + replayed),
            "train_seconds": fitted - started,
            "importance_seconds": measured - fitted,
            "cpu_seconds": time.process_time() - cpu,
        },
    )
    if trainer.ranks.rank == 0:
        kept.clear()
    return bundle


def _remembered(
    trainer: Trainer, recipe: Recipe, champion: Bundle | None, exam: RankingTable
) -> dict[str, torch.Tensor]:
    """What travels of the requests themselves: a reservoir of those trained on, and an exam of those held out."""
    config, table, history = recipe.train, trainer.batcher.table, recipe.ranker.history
    trainer.ranker.eval()
    new = table.select(choose(table.request_id, table.user_id, config.reservoir_requests, trainer.seed))
    found = {
        RESERVOIR: (Reservoir(new, Seen.by(trainer.ranker, new)), config.reservoir_requests),
        EXAM: (Reservoir(exam), config.exam_requests),
    }
    tensors: dict[str, torch.Tensor] = {}
    for prefix, (reservoir, capacity) in found.items():
        old = Reservoir.from_tensors(champion.memory, prefix, champion.spec) if champion else None
        tensors |= reservoir.joined(old, capacity, trainer.seed, history).to_tensors(prefix)
    return tensors


def _fitted(recipe: Recipe, trainer: Trainer) -> Recipe:
    """The recipe with a batch that fits the GPU; on a CPU as it is."""
    if trainer.device.type != "cuda":
        return recipe
    rows = trainer.fit_batch(torch.cuda.get_device_properties(trainer.device).total_memory)
    if trainer.continued:
        return replace(recipe, train=replace(recipe.train, update_rows_per_batch=rows))
    return replace(recipe, train=replace(recipe.train, rows_per_batch=rows))


def _measured(trainer: Trainer, recipe: Recipe) -> Importance:
    """The Fisher; each process measures its share of the rows, and a mean of shares is the mean over all."""
    ranks, batcher = trainer.ranks, trainer.batcher
    rows = sample_rows(batcher.table, recipe.train.fisher_rows, trainer.seed)
    first, last, counts = ranks.span(len(rows))
    part = measure(trainer.ranker, batcher, rows[first:last], recipe.train)
    if ranks.size == 1:
        return part
    share = (last - first) / len(rows) if counts else 0.0
    dense = {k: v * share for k, v in part.dense.items()}
    ranks.sum_(list(dense.values()))
    return Importance(dense, *sum_by_row(ranks.gather(part.rows), ranks.gather(part.table_UD * share)))


def _checked(table: RankingTable, recipe: Recipe, strategy: str, parent: Bundle | None) -> Strategy:
    if strategy not in STRATEGIES:
        raise EvergreenError(f"there is no strategy {strategy!r}", f"Choose one of {', '.join(STRATEGIES)}")
    if held_out(table).all():
        raise EvergreenError("the training table is empty", "Choose a window with engagement in it")
    if table.labels.max() > 1:
        raise EvergreenError("the training table has labels other than 0 and 1", "Build the table again")
    chosen = STRATEGIES[strategy]
    if parent is None or not chosen.continues:
        primary = table.spec.primary_action
        if not table.labels[:, table.spec.actions.index(primary)].any():
            raise EvergreenError(f"no training row has the action {primary!r}", "Choose a longer window")
        return chosen
    changes(parent.spec, table.spec)
    if parent.recipe.ranker != recipe.ranker:
        raise EvergreenError("the champion has other sizes than this recipe", "Train with --strategy scratch")
    return chosen


def _run_key(recipe: Recipe, strategy: str, champion: Bundle | None, seed: int, data: str) -> str:
    inputs = {
        "recipe": replace(recipe, train=replace(recipe.train, checkpoint_steps=0)).to_json(),
        "strategy": strategy,
        "champion": champion.digest if champion else "",
        "seed": seed,
        "data": data,
        "code": code_digest(),
        "torch": torch.__version__,
        "processes": Ranks.current().size,
        "device": pick_device().type,
    }
    return sha(canonical(inputs).encode())


def _instant(microseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
