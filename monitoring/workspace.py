"""The Evidently workspace on disk: one project a model, one run a check.

Evidently writes its files in place, answers 500 to everything over one half-written snapshot, and gives a run
a new random id each time. Here every file is renamed into place from a directory beside the workspace (so
that a running UI, which watches the workspace, sees whole files only), and every id follows from what it names:
recording a check twice, or by two monitors at once, gives one run. How many runs are kept, `keep.py` says.

    <workspace>/<project id>/metadata.json, dashboard.json, snapshots/<run id>.json, broken/
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import TELEMETRY_OFF
from monitoring import keep, page, panels
from monitoring.history import stamp
from monitoring.verdict import DriftVerdict

_NAMESPACE = uuid.UUID("6f0e3c52-8a3d-5b0e-9d55-0e2f6c1b7a11")  # of the project ids
_FOLLOWED = 48  # newest checks whose worst features the dashboard shows


@dataclass(frozen=True)
class Recorded:
    """What `record` did.

    Attributes:
        project_id: The model's project.
        run_id: The run.
        added: False if the same check was recorded before.
        notes: One line for each thing that was repaired.
    """

    project_id: uuid.UUID
    run_id: uuid.UUID
    added: bool
    notes: tuple[str, ...]


def record(workspace: Path, project: str, check: Path, checks: Path | None = None) -> Recorded:
    """Store a finished check in the workspace, the same check twice is one run; then thin out by `keep.py`.

    The newest runs keep their plots; older ones keep numbers, tables and tests, and the UI holds every run in memory.
    A project that vanished, or a run that was set aside, is built again from the kept checks.

    Args:
        workspace: Directory of the workspace; created if it is missing or was lost.
        project: The model's name.
        check: Directory that `drift.check` wrote.
        checks: Directory of all checks; by default the one that `check` lies in.

    Raises:
        EvergreenError: The check did not finish, or the workspace cannot be written.
    """
    verdict, checks = DriftVerdict.load(check / "drift.json"), checks or check.parent
    project_id, run_id = project_id_of(project), run_id_of(project, verdict)
    with _locked(workspace) as staging:
        text = _finished(check / "snapshot.json")
        home = workspace / str(project_id)
        notes = _repair(workspace, written_since_last=True)
        if not (home / "snapshots").is_dir():
            notes += _rebuild(workspace, staging, project, checks, but=stamp(datetime.fromisoformat(verdict.as_of)))
        _ensure_project(staging, home, project, project_id)
        path = home / "snapshots" / f"{run_id}.json"
        added = not path.exists()
        _place(staging, path, text)
        _restore(staging, home, project, checks, {_stamp(torn) for torn in (home / "broken").glob("*-*.json")})
        _thin(staging, home, checks, spared=_stamp(path))
        _place_dashboard(staging, home, project_id, [*_newest(checks), verdict])
    return Recorded(project_id, run_id, added, tuple(notes))


def rebuild(workspace: Path, project: str, checks: Path) -> list[str]:
    """Build a model's project anew from the kept checks, at the same address; returns one line that says so.

    Raises:
        EvergreenError: The workspace cannot be written.
    """
    with _locked(workspace) as staging:
        return _repair(workspace) + _rebuild(workspace, staging, project, checks)


def repair(workspace: Path) -> list[str]:
    """Set aside every file that the UI would stumble over; returns one line for each."""
    with _locked(workspace):
        return _repair(workspace)


def project_id_of(project: str) -> uuid.UUID:
    """The id of a model's project; a lost workspace that is written anew keeps its addresses."""
    return uuid.uuid5(_NAMESPACE, project)


def run_id_of(project: str, verdict: DriftVerdict) -> uuid.UUID:
    """The id of a check: milliseconds of as_of (48 bits: ids sort by time), then a hash of what it names."""
    as_of = datetime.fromisoformat(verdict.as_of)
    digest = hashlib.sha256(f"{project}\n{verdict.as_of}\n{verdict.model_version}".encode()).digest()
    value = (int(as_of.timestamp() * 1000) << 80) | int.from_bytes(digest[:10], "big")
    value = (value & ~(0xF << 76)) | (7 << 76)  # version 7
    value = (value & ~(0x3 << 62)) | (0x2 << 62)  # variant of RFC 9562
    return uuid.UUID(int=value)


def _stamp(run: Path) -> str:
    """The stamp of the check that a run is of, from its id."""
    return stamp(datetime.fromtimestamp((uuid.UUID(run.stem).int >> 80) / 1000, UTC))


@contextmanager
def _locked(workspace: Path) -> Iterator[Path]:
    """Hold the workspace's lock; gives a fresh directory beside it to write in."""
    staging = workspace.with_name(f".{workspace.name}-staging")
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        with FileLock(workspace / ".lock"):
            shutil.rmtree(staging, ignore_errors=True)  # what a killed writer left
            staging.mkdir()
            yield staging
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise EvergreenError(
            f"the Evidently workspace {workspace} cannot be written ({error})",
            "Free the disk or set another home",
        ) from error


def _place(staging: Path, path: Path, text: str) -> None:
    """Write a file whole. A rename from outside the watched tree is what a running UI sees as a new file."""
    temporary = staging / path.name
    temporary.write_text(text)
    temporary.replace(path)


def _finished(snapshot: Path) -> str:
    problem = _problem(snapshot)
    if problem:
        raise EvergreenError(f"{snapshot} is {problem}", "Run the drift check again")
    return snapshot.read_text()


def _ensure_project(staging: Path, home: Path, project: str, project_id: uuid.UUID) -> None:
    if (home / "metadata.json").exists() and (home / "snapshots").is_dir():
        return
    if home.exists():
        (home / "snapshots").mkdir(exist_ok=True)
        _place(staging, home / "metadata.json", _metadata(project, project_id))
    else:
        _fresh_project(staging, project, project_id).rename(home)


def _fresh_project(staging: Path, project: str, project_id: uuid.UUID) -> Path:
    fresh = staging / str(project_id)
    (fresh / "snapshots").mkdir(parents=True)
    (fresh / "metadata.json").write_text(_metadata(project, project_id))
    return fresh


def _metadata(project: str, project_id: uuid.UUID) -> str:
    os.environ.update(TELEMETRY_OFF)
    from evidently.legacy.utils import NumpyEncoder
    from evidently.sdk.models import ProjectModel

    model = ProjectModel(id=project_id, name=project, description="Drift of the serving model, one run a check")
    return json.dumps(model.dict(), cls=NumpyEncoder, indent=2)


def _rebuild(workspace: Path, staging: Path, project: str, checks: Path, but: str = "") -> list[str]:
    """Add each kept check, but one, that has no run. A project that is not there appears whole, by one rename."""
    project_id = project_id_of(project)
    home = workspace / str(project_id)
    fresh = home if home.exists() else _fresh_project(staging, project, project_id)
    _ensure_project(staging, fresh, project, project_id)
    runs = _restore(staging, fresh, project, checks, [name for name in keep.events(checks) if name != but])
    if runs:
        _thin(staging, fresh, checks)
        _place_dashboard(staging, fresh, project_id, _newest(checks))
    if fresh != home and runs:
        fresh.rename(home)
    elif fresh != home:
        shutil.rmtree(fresh)
    return [f"the project {project} was not in {workspace}; {runs} runs were built again from {checks}"] if runs else []


def _restore(staging: Path, home: Path, project: str, checks: Path, wanted: Iterable[str]) -> int:
    """Place the runs of kept checks, by stamp, that are not there; returns how many."""
    there, placed = {_stamp(run) for run in _runs(home)}, 0
    for name in wanted:
        snapshot = checks / name / "snapshot.json"
        if name in there or not snapshot.exists() or _problem(snapshot):
            continue
        try:
            run_id = run_id_of(project, DriftVerdict.load(checks / name / "drift.json"))
        except EvergreenError:
            continue  # a check that did not finish
        _place(staging, home / "snapshots" / f"{run_id}.json", snapshot.read_text())
        placed += 1
    return placed


def _thin(staging: Path, home: Path, checks: Path, spared: str = "") -> None:
    """Bring runs and checks to what `keep.plan` says: the runs first, as what a check lost cannot be asked again."""
    runs = _runs(home)
    known = keep.events(checks)
    thinned = set(keep.stamps(checks)) - set(known)
    alone = [run for run in runs if _stamp(run) not in thinned and _stamp(run) not in known]
    levels = keep.plan({**_happened(alone), **known}, spared)
    for run in runs:
        level = levels.get(_stamp(run), keep.Level.THIN)
        if level <= keep.Level.THIN:
            run.unlink()
        elif level < keep.Level.PLOTS and page.has_plots(text := run.read_text()):
            _place(staging, run, page.trimmed(text))
    keep.thin(checks, levels)


def _happened(runs: Iterable[Path]) -> Mapping[str, bool]:
    """For runs whose check is not among the kept ones, whether something happened: by what the run itself says."""
    found, before = {}, ("none", "not drifted")
    for run in runs:
        about = json.loads(run.read_text())["metadata"]
        now = (about.get("kind", "none"), about.get("drift", "not drifted"))
        found[_stamp(run)], before = now != before, now
    return found


def _runs(home: Path) -> list[Path]:
    """Every run, oldest first."""
    return sorted((home / "snapshots").glob("*.json"))


def _newest(checks: Path) -> list[DriftVerdict]:
    """The verdicts of the newest checks, as far as they can be read."""
    found = []
    for name in keep.stamps(checks)[-_FOLLOWED:]:
        try:
            found.append(DriftVerdict.load(checks / name / "drift.json"))
        except EvergreenError:
            continue
    return found


def _place_dashboard(staging: Path, home: Path, project_id: uuid.UUID, verdicts: list[DriftVerdict]) -> None:
    """Write the dashboard, unless a person made it theirs."""
    path = home / "dashboard.json"
    text = panels.dashboard(project_id, verdicts)
    old = path.read_text() if path.exists() else ""
    if text != old and (not old or panels.is_ours(project_id, old)):
        _place(staging, path, text)


def _repair(workspace: Path, written_since_last: bool = False) -> list[str]:
    """Set aside what is broken; returns one line for each file.

    Reading a year of runs takes a second, so a check reads those alone that were written since the last one looked.
    """
    notes, mark = [], workspace / ".repaired"
    looked = mark.stat().st_mtime_ns if written_since_last and mark.exists() else 0
    mark.touch()
    files = [*workspace.glob("*/metadata.json"), *workspace.glob("*/dashboard.json")]
    for path in sorted([*files, *workspace.glob("*/snapshots/*.json")]):
        if path.stat().st_mtime_ns < looked:
            continue
        if problem := _problem(path):
            run = path.parent.name == "snapshots"
            home = path.parents[1] if run else path.parent
            (home / "broken").mkdir(exist_ok=True)
            path.replace(home / "broken" / path.name)
            again = "; the next check that is recorded brings it back" if run else ""
            notes.append(f"{path} was {problem} and is set aside in {home / 'broken'}{again}")
    return notes


def _problem(path: Path) -> str | None:
    needed = {"metadata.json": ("id", "name"), "dashboard.json": ("tabs", "panels")}
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError):
        return "half-written"
    keys = needed.get(path.name, ("timestamp", "metric_results", "widgets"))
    return None if isinstance(data, dict) and all(k in data for k in keys) else "not what its name says"
