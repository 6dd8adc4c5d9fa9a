"""Monitor step 1: the serving model against the world, in every respect that is watched."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from components.base import step, tell
from engagement.errors import EvergreenError
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from evergreen.settings import Settings
from monitoring.history import stamp
from monitoring.verdict import DataTest, DriftVerdict, Outcome

if TYPE_CHECKING:
    from engagement.table import RankingTable
    from monitoring.drift import Beside
    from monitoring.reference import Reference
    from serving.registry import Served

OUTCOME_REQUESTS = 6000  # matured requests that are scored, evenly spaced
HISTORY_DAYS = 120  # of past checks, from which the age curve is learned


def check_directory(settings: Settings, as_of: datetime) -> Path:
    """Where the check at an instant keeps its page, its verdict and its decision."""
    return settings.monitoring / "checks" / stamp(as_of)


def check_champion(settings: Settings, as_of: datetime, table_dir: Path) -> DriftVerdict:
    """Compare what was shown in the hours before `as_of` with what the champion learned.

    Args:
        settings: The home.
        as_of: Instant of the check.
        table_dir: Where the ranking table of what is looked at may be written.

    Raises:
        EvergreenError: There is no champion, or `as_of` is not later than its training.
    """
    from components.drift import check_window
    from components.features import write_table
    from monitoring.days import volume
    from monitoring.outcome import looked_at
    from monitoring.reference import DIRECTORY, Reference
    from serving.registry import Registry

    champion = Registry(settings).served()
    if champion is None:
        raise EvergreenError("there is no champion to check", "Run `evergreen retrain` first")
    trained_to = datetime.fromisoformat(champion.tags["train_end"])
    if trained_to >= as_of:
        problem = f"the champion was trained on data up to {trained_to:%Y-%m-%d %H:%M}"
        raise EvergreenError(problem, "Choose a later --as-of")
    reference = Reference.load(champion.directory / DIRECTORY)
    newest = as_of - timedelta(hours=reference.hours)
    start = min(newest, looked_at(as_of, trained_to)[0])
    snapshot = EngagementStore(settings.data).snapshot(as_of)
    shown, _ = volume(snapshot, start, as_of)
    if shown:
        write_table(settings, snapshot, start, as_of, table_dir, newest)
    beside = _beside(settings, snapshot, champion, reference, table_dir if shown else None, newest)
    served_by, out = (champion.version, champion.directory), check_directory(settings, as_of)
    return check_window(settings, served_by, table_dir if shown else None, (start, as_of), out, beside, reference)


def _beside(
    settings: Settings,
    snapshot: Snapshot,
    champion: "Served",
    reference: "Reference",
    table_dir: Path | None,
    start: datetime,
) -> "Beside":
    """What is known beside the features and predictions of [start, as_of)."""
    from components.parity import served_parity, skew_of
    from engagement.table import RankingTable
    from monitoring.drift import Beside
    from monitoring.health import answers, health

    as_of = snapshot.as_of
    parity = served_parity(settings, snapshot, as_of)
    serving = health(answers(settings.serving_log, start, as_of))
    skew = skew_of(parity) if parity else None
    if table_dir is None:
        return Beside(serving=serving, skew=skew)
    table = RankingTable.load(table_dir)
    tests, late = _data(snapshot, table, reference, start)
    return Beside(_outcome(settings, champion, table, as_of), serving, tests, late, skew)


def _outcome(settings: Settings, champion: "Served", table: "RankingTable", as_of: datetime) -> Outcome | None:
    """What matured labels say, against models of this one's age."""
    import json

    from components.drift import scored_part
    from model.bundle import Bundle
    from monitoring import history
    from monitoring.outcome import AgeCurve, Baseline, looked_at, outcome

    tell("judging the champion on matured labels")
    trained_to = datetime.fromisoformat(champion.tags["train_end"])
    part, scores = scored_part(Bundle.load(champion.directory), table, *looked_at(as_of, trained_to), OUTCOME_REQUESTS)
    gate = settings.runs / champion.tags["run_key"] / "gate.json"
    baseline = Baseline.of(json.loads(gate.read_text())) if gate.exists() else None
    past = history.verdicts(settings.monitoring / "checks", as_of - timedelta(days=HISTORY_DAYS))
    curve = AgeCurve.of([v for v in past if v.model_version != champion.version], table.spec.primary_action)
    return outcome(part, scores, as_of, trained_to, baseline, curve)


def _data(
    snapshot: Snapshot, table: "RankingTable", reference: "Reference", start: datetime
) -> tuple[tuple[DataTest, ...], float]:
    """The tests of the window's data, and the share of its rows that became known late."""
    from monitoring.data_tests import HISTORY, test_window
    from monitoring.days import read_log, volume
    from monitoring.looks import looks_of

    log = read_log(snapshot, table, start, snapshot.as_of, HISTORY)
    shown, late = volume(snapshot, start, snapshot.as_of)
    tests = test_window(table, log, (start, snapshot.as_of), looks_of(reference.spec, reference.cells), reference.spec)
    return tests, late / max(1, shown)


@step
def check_serving(as_of: str, verdict: dsl.Output[dsl.Artifact], page: dsl.Output[dsl.HTML]) -> None:
    """Drift, quality, serving and data of the hours before `as_of`."""
    import shutil
    import tempfile
    from datetime import datetime
    from pathlib import Path

    from components.base import begin
    from components.check import check_champion, check_directory

    settings, at = begin(), datetime.fromisoformat(as_of)
    with tempfile.TemporaryDirectory() as room:
        found = check_champion(settings, at, Path(room) / "table")
    Path(verdict.path).write_text(found.to_json())  # the file beside the page may be another monitor's by now
    shutil.copyfile(check_directory(settings, at) / "drift.html", page.path)
