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


def train_challenger(
    plan: Plan, train_table: RankingTable, evidence: RankingTable, champion: Bundle | None, checkpoints: Path
) -> Bundle:
    """Train by the plan's strategy, then calibrate; a killed training resumes from `checkpoints`."""
    from model import config
    from model.calibration import calibrated
    from model.train import train

    trained = train(
        train_table,
        config.RECIPES[plan.recipe](),
        strategy=plan.strategy if champion else "scratch",
        parent=champion,
        seed=plan.seed,
        checkpoints=checkpoints,
        progress=lambda done, total, loss: tell(f"loss {loss:.4f}", done, total),
    )
    # The requests that the gate will judge on are the only ones later than the training window. To calibrate on them
    # gives the challenger no advantage: the order of candidates, all that HIT@3 sees, cannot change.
    return calibrated(trained, evidence)


def champion_directory(settings: Settings, plan: Plan) -> Path | None:
    """The unpacked bundle of the champion that a plan names, intact; None for the first run.

    The plan's step has unpacked it, so the registry (4 s of imports) is asked only where that copy is gone.
    """
    from serving.files import directory_digest
    from serving.registry import Registry

    if not plan.champion:
        return None
    copy = settings.serving / "models" / plan.champion
    intact = copy.is_dir() and directory_digest(copy) == plan.champion_digest
    return copy if intact else Registry(settings).fetch(plan.champion)


def champion_bundle(settings: Settings, plan: Plan) -> Bundle | None:
    """The champion that a plan names; None for the first run."""
    directory = champion_directory(settings, plan)
    return Bundle.load(directory) if directory else None


@step
def train_ranker(plan: str, table: dsl.Input[dsl.Dataset], bundle: dsl.Output[dsl.Model]) -> None:
    """Train the challenger and write it, with a sample of its training window, as one bundle."""
    import json
    from pathlib import Path

    import pyarrow.parquet as pq

    from components.base import begin
    from components.drift import REFERENCE, scored_sample
    from components.plan import Plan
    from components.train import champion_bundle, split, train_challenger
    from engagement.files import write_text
    from engagement.table import RankingTable

    settings, p = begin(), Plan.from_json(plan)
    run, out = p.directory(settings), Path(bundle.path)
    whole = RankingTable.load(Path(table.path))
    train_table, evidence = split(p, whole)
    trained = train_challenger(p, train_table, evidence, champion_bundle(settings, p), run / "checkpoints")
    trained.save(out)
    sample, _ = scored_sample(trained, whole, Path(table.path), p.train_start, p.train_end)
    pq.write_table(sample, out / REFERENCE)
    told = {"rows": train_table.rows, "requests": train_table.requests, "digest": trained.digest, **trained.metrics}
    write_text(run / "train.json", json.dumps(told, indent=1))
    bundle.metadata.update(run_key=p.run_key, digest=trained.digest)
