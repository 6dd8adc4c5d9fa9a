"""Step 3: the challenger, an update of the champion (or a first model) on the run's training window."""

from pathlib import Path

from kfp import dsl

from components.base import step, tell
from components.plan import Plan
from engagement.errors import EvergreenError
from engagement.table import RankingTable, micros
from evergreen.settings import Settings
from model.bundle import Bundle


def split(plan: Plan, table: RankingTable) -> tuple[RankingTable, RankingTable]:
    """The run's training requests and its evidence requests.

    Raises:
        EvergreenError: One of the two windows is empty.
    """
    train = table.between(micros(plan.train_start), micros(plan.train_end))
    evidence = table.between(micros(plan.train_end), micros(plan.as_of))
    for part, verb, start, end in (
        (train, "train", plan.train_start, plan.train_end),
        (evidence, "judge", plan.train_end, plan.as_of),
    ):
        if not part.requests:
            raise EvergreenError(
                f"there are no requests to {verb} on between {start:%Y-%m-%d %H:%M} and {end:%Y-%m-%d %H:%M}",
                "Choose another --as-of, or import more engagement",
            )
    return train, evidence


def train_challenger(plan: Plan, train_table: RankingTable, champion: Bundle | None, checkpoints: Path) -> Bundle:
    """Train by the plan's strategy; a killed training resumes from `checkpoints`."""
    from model import config
    from model.train import train

    return train(
        train_table,
        config.RECIPES[plan.recipe](),
        strategy=plan.strategy if champion else "scratch",
        parent=champion,
        seed=plan.seed,
        checkpoints=checkpoints,
        progress=lambda done, total, loss: tell(f"loss {loss:.4f}", done, total),
    )


def champion_bundle(settings: Settings, version: str) -> Bundle | None:
    """The champion that a plan names, verified; None for the first run."""
    from serving.registry import Registry

    return Bundle.load(Registry(settings).fetch(version)) if version else None


@step
def train_ranker(plan: str, table: dsl.Input[dsl.Dataset], bundle: dsl.Output[dsl.Model]) -> None:
    """Train the challenger and write it with its reference sample as one bundle."""
    from pathlib import Path

    import pyarrow.parquet as pq

    from components.base import begin
    from components.drift import scored_sample
    from components.plan import Plan
    from components.train import champion_bundle, split, train_challenger
    from engagement.table import RankingTable

    settings, p = begin(), Plan.from_json(plan)
    whole = RankingTable.load(Path(table.path))
    train_table, _ = split(p, whole)
    trained = train_challenger(
        p, train_table, champion_bundle(settings, p.champion), p.directory(settings) / "checkpoints"
    )
    trained.save(Path(bundle.path))
    reference = scored_sample(trained, whole, Path(table.path), p.train_start, p.train_end)
    pq.write_table(reference, Path(bundle.path) / "reference.parquet")
    bundle.metadata.update(run_key=p.run_key, train_rows=train_table.rows)
