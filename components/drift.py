"""Step 5: has the world moved away from what the serving model was trained on?"""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from kfp import dsl

from components.base import step, tell
from engagement.errors import EvergreenError
from engagement.table import RankingTable, micros
from evergreen.settings import Settings
from monitoring.verdict import DriftVerdict

if TYPE_CHECKING:
    from model.bundle import Bundle
    from monitoring.compare import Names, Window
    from monitoring.drift import Beside
    from monitoring.reference import Reference

SAMPLE_REQUESTS = 1500  # enough rows for a distribution, few enough to score in a second
REFERENCE_REQUESTS = 6000  # of the training window: a day of it must hold enough as well
HOLIDAYS_AFTER = timedelta(days=60)  # a model serves no longer than that


def scored_part(
    bundle: "Bundle", table: RankingTable, start: datetime, end: datetime, requests: int = SAMPLE_REQUESTS
) -> tuple[RankingTable, np.ndarray]:
    """Requests of [start, end), evenly spaced, at most so many; and what a model predicts, (rows, A).

    None of a table that lacks a feature which the model reads: the rest of it can still be looked at.
    """
    from model.predict import score
    from monitoring.compare import declared

    inside, (unreadable, _) = table.between(micros(start), micros(end)), declared(bundle.spec, table.spec)
    some = np.arange(0, 0 if unreadable else inside.requests, max(1, -(-inside.requests // requests)))
    part = inside.select(some)
    scores = score(bundle, part) if part.rows else np.zeros((0, len(table.spec.actions)))
    return part, scores


def names_beside(table_dir: Path) -> "Names":
    """Names of categories, from the raw sample beside a table."""
    import pyarrow.parquet as pq

    from monitoring.frame import names_of

    return names_of(pq.read_table(table_dir / "sample.parquet"), RankingTable.load(table_dir).spec)


def window_of(bundle: "Bundle", table_dir: Path, start: datetime, end: datetime) -> "Window":
    """A window of a saved table, a sample of it scored by a model."""
    from monitoring.compare import Window

    table = RankingTable.load(table_dir)
    part, scores = scored_part(bundle, table, start, end)
    return Window(start, end, table.between(micros(start), micros(end)), part, scores, names_beside(table_dir))


def reference_of(settings: Settings, window: "Window", slot: datetime, champion: Path | None) -> "Reference":
    """The reference of a model that was trained on a window; of an update, with its parent's.

    Args:
        settings: The home; names the countries whose holidays count.
        window: What was learned. Its part may be of later requests too.
        slot: Instant of the retrain that made the model.
        champion: Bundle directory of the champion that was updated; one of an earlier release brings nothing along.
    """
    from monitoring import rules
    from monitoring.like import holiday_days
    from monitoring.reference import DIRECTORY, Reference

    since = window.end - timedelta(days=rules.PAST_MOST + rules.KEEP_DAYS)
    days = holiday_days(settings.holidays, since, window.end + HOLIDAYS_AFTER)
    try:
        parent = Reference.load(champion / DIRECTORY) if champion else None
    except EvergreenError as error:
        tell(f"{error.problem}: this model's begins anew")
        parent = None
    return replace(Reference.of(window, parent, days), slot=slot.isoformat())


def check_window(
    settings: Settings,
    served_by: tuple[str, Path],
    table_dir: Path | None,
    covered: tuple[datetime, datetime],
    out: Path,
    beside: "Beside | None" = None,
    reference: "Reference | None" = None,
) -> DriftVerdict:
    """Compare a window with the reference of the model that served it; record the check in the workspace.

    Args:
        settings: The home.
        served_by: The model's version (`first` for one that is not registered yet) and its bundle directory, which
            holds its reference.
        table_dir: Directory of a ranking table; None where nothing was shown in the time that is covered.
        covered: Start and end of that table. The last `Reference.hours` of it are the window, or all of it if it is
            shorter; the check is dated at its end.
        out: Directory for the page and the verdict.
        beside: What else is known: the outcome, the serving log, the parity of features.
        reference: That model's, if it is read already.
    """
    from components.plan import code_version
    from model.bundle import Bundle
    from monitoring.compare import Window
    from monitoring.drift import check
    from monitoring.reference import DIRECTORY, Reference
    from monitoring.workspace import record

    (version, directory), end = served_by, covered[1]
    reference = reference or Reference.load(directory / DIRECTORY)
    start = max(covered[0], end - timedelta(hours=reference.hours))
    if table_dir is None:
        window = Window.empty(reference.spec, start, end)
    else:
        window = window_of(Bundle.load(directory), table_dir, start, end)
    tell(f"comparing {window.table.rows} rows of the last {reference.hours} h with what model {version} learned")
    verdict = check(reference, window, end, (version, reference.slot), out, beside, code_version())
    if not _monitored(settings, verdict, end, out):
        record(settings.evidently, settings.model_name, out, settings.monitoring / "checks")
    return verdict


def _monitored(settings: Settings, verdict: DriftVerdict, as_of: datetime, out: Path) -> bool:
    """Whether the workspace has the monitor's check of the same model and instant: it knows more than a retrain's."""
    from components.check import check_directory

    other = check_directory(settings, as_of)
    if other == out or not (other / "drift.json").exists():
        return False
    return DriftVerdict.load(other / "drift.json").model_version == verdict.model_version


def whose_reference(version: str, champion: Path | None, challenger: Path) -> tuple[str, Path]:
    """What a retrain's window is compared with: the champion's reference.

    The challenger's own, as `first`, without a champion, and for one whose reference cannot be read: a retrain is what
    helps then, so it must not fail on it.
    """
    from monitoring.reference import DIRECTORY, Reference

    try:
        if champion:
            Reference.load(champion / DIRECTORY)
            return version, champion
    except EvergreenError as error:
        tell(f"{error.problem}: compared with what the challenger learned")
    return "first", challenger


@step
def check_drift(
    plan: str,
    table: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    parity: dsl.Input[dsl.Artifact],
    verdict: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Compare the slot's later requests with the training window of the model that served them."""
    import shutil
    from pathlib import Path

    from components.base import begin
    from components.drift import check_window, whose_reference
    from components.parity import read_skew
    from components.plan import Plan
    from components.train import champion_directory
    from monitoring.drift import Beside

    settings, p = begin(), Plan.from_json(plan)
    served_by = whose_reference(p.champion, champion_directory(settings, p), Path(bundle.path))
    out, covered = p.directory(settings) / "drift", (p.train_start, p.as_of)
    check_window(settings, served_by, Path(table.path), covered, out, Beside(skew=read_skew(Path(parity.path))))
    shutil.copyfile(out / "drift.json", verdict.path)
    shutil.copyfile(out / "drift.html", page.path)
