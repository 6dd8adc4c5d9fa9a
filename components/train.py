"""Step 3: the challenger, an update of the champion (or a first model) on the run's training window.

Where the plan asks for it a rival is trained from scratch as well, and the gate sees both.
"""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfp import dsl

from components.base import step, tell
from components.plan import Plan
from engagement.errors import EvergreenError
from engagement.table import RankingTable, micros
from evergreen.settings import Settings
from monitoring import rules

if TYPE_CHECKING:
    from model.bundle import Bundle
    from model.train import Forgotten

UPDATE, SCRATCH = "update", "scratch"
FAILED = "failed"  # in the numbers: why the update could not be trained


def origin(bundle: "Bundle") -> str:
    """How a bundle came to be: `update` of a champion, or from `scratch`."""
    return UPDATE if bundle.parent else SCRATCH


def split(plan: Plan, table: RankingTable) -> tuple[RankingTable, RankingTable]:
    """The run's training requests, from `train_start` on, and its evidence requests.

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
    plan: Plan,
    train_table: RankingTable,
    evidence: RankingTable,
    champion: "Bundle | None",
    checkpoints: Path,
    forgotten: "Forgotten",
) -> "Bundle":
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
        forgotten=forgotten,
    )
    # The requests that the gate will judge on are the only ones later than the training window. To calibrate on them
    # gives the challenger no advantage: the order of candidates, all that HIT@3 sees, cannot change.
    return calibrated(trained, evidence)


def train_contenders(
    plan: Plan, table: RankingTable, champion: "Bundle | None", checkpoints: Path, forgotten: "Forgotten"
) -> "tuple[list[Bundle], dict[str, Any]]":
    """Train what the plan asks for: the challenger, and a rival from scratch where one is wanted.

    The update comes first: killed in the second training, only the cheap one is repeated. An update that cannot be
    trained (a champion may be so bad that training diverges) leaves the field to the one from scratch.

    Args:
        plan: The run.
        table: Ranking table of both windows.
        champion: The champion.
        checkpoints: Directory under which each training keeps its checkpoints.
        forgotten: Tells which user ids (bytes) must not be learned from again.

    Returns:
        One bundle or two, the update first, each calibrated; and numbers for people by `origin`.

    Raises:
        EvergreenError: A window is empty, or nothing could be trained.
    """
    window, evidence = split(plan, table)
    wanted = [(champion, plan.update_start), *([(None, plan.train_start)] if plan.also_scratch else [])]
    trained: list[Bundle] = []
    told: dict[str, Any] = {}
    for parent, start in wanted:
        part = window.between(micros(start), micros(plan.train_end))
        try:
            place = checkpoints / (UPDATE if parent else SCRATCH)
            bundle = train_challenger(plan, part, evidence, parent, place, forgotten)
        except EvergreenError as error:
            if not (parent and plan.also_scratch):
                raise
            told[FAILED] = str(error)
            tell(f"the update could not be trained: {error}")
            continue
        trained.append(bundle)
        numbers = {"rows": part.rows, "requests": part.requests, "digest": bundle.digest}
        told[origin(bundle)] = numbers | bundle.metrics
    return trained, told


def save_contender(
    settings: Settings, plan: Plan, bundle: "Bundle", table: RankingTable, directory: Path, out: Path
) -> None:
    """Write a bundle with its reference for drift: what it learned, and what it predicts up to the run's instant.

    An update's reference holds what its champion knew as well. Predictions are of the evidence requests too: of what a
    model did not learn from it predicts as it will predict of what a check sees.

    Args:
        settings: The home.
        plan: The run.
        bundle: What was trained.
        table: Ranking table of both windows.
        directory: Where it was saved.
        out: Directory of the bundle.
    """
    from components.drift import REFERENCE_REQUESTS, names_beside, reference_of, scored_part
    from monitoring.compare import Window
    from monitoring.reference import DIRECTORY

    bundle.save(out)
    start, champion = (
        (plan.update_start, champion_directory(settings, plan)) if bundle.parent else (plan.train_start, None)
    )
    newest = max(start, plan.train_end - timedelta(days=rules.PAST_MOST))
    part, scores = scored_part(bundle, table, newest, plan.as_of, REFERENCE_REQUESTS)
    learned = table.between(micros(start), micros(plan.train_end))
    window = Window(start, plan.train_end, learned, part, scores, names_beside(directory))
    reference_of(settings, window, plan.as_of, champion).save(out / DIRECTORY)


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


def champion_bundle(settings: Settings, plan: Plan) -> "Bundle | None":
    """The champion that a plan names; None for the first run."""
    from model.bundle import Bundle

    directory = champion_directory(settings, plan)
    return Bundle.load(directory) if directory else None


@step
def train_ranker(
    plan: str, table: dsl.Input[dsl.Dataset], bundle: dsl.Output[dsl.Model], rival: dsl.Output[dsl.Model]
) -> None:
    """Train the challenger and write it with its reference for drift.

    `rival` is the model from scratch where the plan asks for one as well, and else stays an empty directory. Where the
    update could not be trained, the one from scratch is the challenger.
    """
    import json
    from pathlib import Path

    from components.base import begin
    from components.plan import TRAINED, Plan
    from components.train import champion_bundle, origin, save_contender, train_contenders
    from engagement.files import write_text
    from engagement.store import EngagementStore
    from engagement.table import RankingTable

    settings, p, directory = begin(), Plan.from_json(plan), Path(table.path)
    whole, run = RankingTable.load(directory), p.directory(settings)
    champion, forgotten = champion_bundle(settings, p), EngagementStore(settings.data).forgotten
    trained, told = train_contenders(p, whole, champion, run / "checkpoints", forgotten)
    Path(rival.path).mkdir(parents=True, exist_ok=True)
    for contender, out in zip(trained, (bundle, rival), strict=False):
        save_contender(settings, p, contender, whole, directory, Path(out.path))
        out.metadata.update(run_key=p.run_key, digest=contender.digest, origin=origin(contender))
    write_text(run / TRAINED, json.dumps(told, indent=1))
