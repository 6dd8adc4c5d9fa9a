"""Train a ranker, from scratch or as an update of the champion.

A run is a function of its inputs: batches come from (seed, epoch), everything random in a step from (seed, step). So
a killed run that starts again from a checkpoint, which holds no generator state, ends in the same bits.
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
from model.config import Recipe
from model.continual import STRATEGIES, Strategy, Window
from model.data import Batcher, pick_device, row_weights, table_digest
from model.files import canonical, sha
from model.fisher import measure, sample_rows
from model.trainer import Trainer, reproducible

Progress = Callable[[int, int, float], None]  # (step, steps, loss)


def train(
    table: RankingTable,
    recipe: Recipe,
    strategy: str,
    parent: Bundle | None,
    seed: int,
    checkpoints: Path,
    progress: Progress | None = None,
) -> Bundle:
    """Train on all requests of the table.

    Args:
        table: The training window: everything for a run from scratch, the new requests for an update.
        recipe: Sizes and training configuration; an update must have the champion's sizes.
        strategy: Name in `STRATEGIES`. One that continues a champion trains from scratch where there is none.
        parent: The champion.
        seed: Seed of everything random. On a CPU, equal inputs give equal bits.
        checkpoints: Directory for this run's checkpoints; a killed run continues from it, a finished one empties it.
        progress: Called after every step.

    Raises:
        EvergreenError: The strategy is unknown, the table is empty or has nothing to learn from, it does not fit the
            champion, or training diverged.
    """
    chosen = _checked(table, recipe, strategy, parent)
    champion = parent if chosen.continues else None
    started = time.monotonic()
    with reproducible(recipe.train.threads):
        batcher = Batcher(table, recipe.ranker, row_weights(table, recipe.train))
        trainer = Trainer(table.spec, recipe, seed, batcher, champion, pick_device())
        if champion:
            window = Window(champion, table, recipe.train, trainer.device)
            trainer.extra_losses = chosen.extra_losses(window)
        else:
            trainer.ranker.fit_statistics(table)
        data = table_digest(table)
        kept = Checkpoints(checkpoints, _run_key(recipe, strategy, champion, seed, data))
        loss = trainer.run(kept, progress or (lambda step, steps, loss: None))
        fitted = time.monotonic()
        measured = measure(trainer.ranker, batcher, sample_rows(table, recipe.train.fisher_rows, seed), recipe.train)
        importance = chosen.importance(measured, champion, recipe.train.fisher_decay)
    start, end = (_instant(t) for t in (table.time.min(), table.time.max()))
    bundle = Bundle(
        spec=table.spec,
        recipe=recipe,
        weights=trainer.ranker.state(),
        memory=trainer.memory() | importance.to_tensors(),
        strategy=strategy,
        seed=seed,
        parent=champion.digest if champion else "",
        data=data,
        train_start=start,
        train_end=end,
        train_rows=table.rows,
        code=code_digest(),
        metrics={
            "loss": loss,
            "skipped_steps": trainer.skipped,
            "train_seconds": fitted - started,
            "importance_seconds": time.monotonic() - fitted,
        },
    )
    kept.clear()
    return bundle


def _checked(table: RankingTable, recipe: Recipe, strategy: str, parent: Bundle | None) -> Strategy:
    if strategy not in STRATEGIES:
        raise EvergreenError(f"there is no strategy {strategy!r}", f"Choose one of {', '.join(STRATEGIES)}")
    if not table.rows:
        raise EvergreenError("the training table is empty", "Choose a window with engagement in it")
    if not np.isin(table.labels, (0, 1)).all():
        raise EvergreenError("the training table has labels other than 0 and 1", "Build the table again")
    chosen = STRATEGIES[strategy]
    if parent is None or not chosen.continues:
        primary = table.spec.primary_action
        if not table.labels[:, table.spec.actions.index(primary)].any():
            raise EvergreenError(f"no training row has the action {primary!r}", "Choose a longer window")
        return chosen
    if parent.spec != table.spec:
        raise EvergreenError(
            "the champion was trained on other features or actions than this table has",
            "Train with --strategy scratch",
        )
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
        "device": pick_device().type,
    }
    return sha(canonical(inputs).encode())


def _instant(microseconds: np.int64) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(microseconds))
