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

import torch

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.bundle import Bundle, code_digest
from model.checkpoint import Checkpoints
from model.config import Recipe
from model.content import learn
from model.continual import STRATEGIES, Strategy, Window
from model.data import Batcher, pick_device, table_digest
from model.distributed import Ranks
from model.files import canonical, sha
from model.fisher import Importance, measure, sample_rows
from model.trainer import Trainer, reproducible
from model.weights import row_weights

_CONTENT = "content."  # prefix in a bundle's memory
_VERSIONS = 8  # of the content vectors over a window trained from scratch

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
        trainer = Trainer(table.spec, recipe, seed, batcher, champion, pick_device(), Ranks.current())
        # An update's rows read what the champion knew; the version learned from them is for what comes after.
        known = _content_of(champion) if champion else None
        content, state = learn(table, recipe.ranker.content, 1 if champion else _VERSIONS, seed, known)
        trainer.ranker.content.set(content)
        if champion:
            window = Window(champion, table, recipe.train, trainer.device)
            trainer.extra_losses = chosen.extra_losses(window)
        else:
            trainer.ranker.fit_statistics(table)
        recipe = _fitted(recipe, trainer)
        data = table_digest(table)
        kept = Checkpoints(checkpoints, _run_key(recipe, strategy, champion, seed, data))
        loss = trainer.run(kept, progress or (lambda step, steps, loss: None))
        fitted = time.monotonic()
        measured = _measured(trainer, recipe)
        importance = chosen.importance(measured, champion, recipe.train.fisher_decay)
    start, end = (_instant(int(t)) for t in (table.time.min(), table.time.max()))
    bundle = Bundle(
        spec=table.spec,
        recipe=recipe,
        weights=trainer.ranker.state(),
        memory=trainer.memory() | importance.to_tensors() | {_CONTENT + k: v for k, v in state.items()},
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
            "peak_memory_mb": trainer.peak.megabytes,
            "loader_share": trainer.loader_share,
            "train_seconds": fitted - started,
            "importance_seconds": time.monotonic() - fitted,
        },
    )
    if trainer.ranks.rank == 0:
        kept.clear()
    return bundle


def _fitted(recipe: Recipe, trainer: Trainer) -> Recipe:
    """The recipe with a batch that fits the GPU; on a CPU as it is."""
    if trainer.device.type != "cuda":
        return recipe
    rows = trainer.fit_batch(torch.cuda.get_device_properties(trainer.device).total_memory)
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
    found, slot = torch.unique(ranks.gather(part.rows), return_inverse=True)
    values_UD = ranks.gather(part.table_UD * share)
    table_UD = values_UD.new_zeros(len(found), values_UD.shape[1]).index_add(0, slot, values_UD)
    return Importance(dense, found, table_UD)


def _checked(table: RankingTable, recipe: Recipe, strategy: str, parent: Bundle | None) -> Strategy:
    if strategy not in STRATEGIES:
        raise EvergreenError(f"there is no strategy {strategy!r}", f"Choose one of {', '.join(STRATEGIES)}")
    if not table.rows:
        raise EvergreenError("the training table is empty", "Choose a window with engagement in it")
    if table.labels.max() > 1:
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
        "processes": Ranks.current().size,
        "device": pick_device().type,
    }
    return sha(canonical(inputs).encode())


def _content_of(champion: Bundle) -> dict[str, torch.Tensor]:
    return {k.removeprefix(_CONTENT): v for k, v in champion.memory.items() if k.startswith(_CONTENT)}


def _instant(microseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
