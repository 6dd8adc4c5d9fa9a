"""The Evidently workspace on disk: one project a model, one run a check.

Evidently writes its files in place, answers 500 to everything over one half-written snapshot, and gives a run
a new random id each time. Here every file is renamed into place from a directory beside the workspace (so
that a running UI, which watches the workspace, sees whole files only), and every id follows from what it names:
recording a check twice, or by two monitors at once, gives one run.

    <workspace>/<project id>/metadata.json, dashboard.json, snapshots/<run id>.json, broken/
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import TELEMETRY_OFF
from monitoring import panels
from monitoring.verdict import DriftVerdict

_NAMESPACE = uuid.UUID("6f0e3c52-8a3d-5b0e-9d55-0e2f6c1b7a11")  # of the project ids
_FULL_BYTES = 300_000  # a snapshot above this holds plots; the numbers and tables of 100 columns are below
_KEPT_WIDGETS = ("counter", "table")  # small: the sentence, the columns and their scores


@dataclass(frozen=True)
class Recorded:
    """What `record` did.

    Attributes:
        project_id: The model's project.
        run_id: The run, or None where the check had nothing to record.
        added: False if the same check was recorded before.
        notes: One line for each thing that was repaired.
    """

    project_id: uuid.UUID
    run_id: uuid.UUID | None
    added: bool
    notes: tuple[str, ...]


def record(workspace: Path, project: str, check: Path) -> Recorded:
    """Store a finished check in the workspace; the same check twice is one run.

    The newest run keeps its plots; older ones keep numbers, tables and tests (2.6 MB become 0.1 MB, and the
    UI holds every run in memory). The full page of an older check is the `drift.html` of its own directory.

    Args:
        workspace: Directory of the workspace; created if it is missing or was lost.
        project: The model's name.
        check: Directory that `drift.check` wrote.

    Raises:
        EvergreenError: The check did not finish, or the workspace cannot be written.
    """
    verdict = DriftVerdict.load(check / "drift.json")
    project_id = project_id_of(project)
    with _locked(workspace) as staging:
        notes = _repair(workspace)
        _ensure_project(workspace, staging, project, project_id)
        home = workspace / str(project_id)
        if not (check / "snapshot.json").exists():
            return Recorded(project_id, None, False, (*notes, verdict.reason))
        run_id = run_id_of(project, verdict)
        path = home / "snapshots" / f"{run_id}.json"
        added = not path.exists()
        newest = max((p.stem for p in path.parent.glob("*.json")), default="")
        text = (check / "snapshot.json").read_text()
        _place(staging, path, text if str(run_id) >= newest else _trim(text))
        for other in path.parent.glob("*.json"):
            if other.stem < max(newest, str(run_id)) and other.stat().st_size > _FULL_BYTES:
                _place(staging, other, _trim(other.read_text()))
        if not (home / "dashboard.json").exists():
            _place(staging, home / "dashboard.json", panels.dashboard(project_id, verdict))
    return Recorded(project_id, run_id, added, tuple(notes))


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


def _ensure_project(workspace: Path, staging: Path, project: str, project_id: uuid.UUID) -> None:
    home = workspace / str(project_id)
    if (home / "metadata.json").exists() and (home / "snapshots").is_dir():
        return
    os.environ.update(TELEMETRY_OFF)
    from evidently.legacy.utils import NumpyEncoder
    from evidently.sdk.models import ProjectModel

    model = ProjectModel(id=project_id, name=project, description="Drift of the serving model, one run a check")
    text = json.dumps(model.dict(), cls=NumpyEncoder, indent=2)
    if home.exists():
        (home / "snapshots").mkdir(exist_ok=True)
        _place(staging, home / "metadata.json", text)
        return
    fresh = staging / str(project_id)
    (fresh / "snapshots").mkdir(parents=True)
    (fresh / "metadata.json").write_text(text)
    fresh.rename(home)


def _repair(workspace: Path) -> list[str]:
    notes = []
    files = [*workspace.glob("*/metadata.json"), *workspace.glob("*/dashboard.json")]
    for path in sorted([*files, *workspace.glob("*/snapshots/*.json")]):
        problem = _problem(path)
        if problem:
            home = path.parents[1] if path.parent.name == "snapshots" else path.parent
            (home / "broken").mkdir(exist_ok=True)
            path.replace(home / "broken" / path.name)
            again = "; record the check again to have it back" if path.parent.name == "snapshots" else ""
            notes.append(f"{path} was {problem} and is set aside in {home / 'broken'}{again}")
    return notes


def _problem(path: Path) -> str | None:
    needed = {"metadata.json": ("id", "name"), "dashboard.json": ("tabs", "panels")}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return "half-written"
    keys = needed.get(path.name, ("timestamp", "metric_results", "widgets"))
    return None if isinstance(data, dict) and all(k in data for k in keys) else "not what its name says"


def _trim(text: str) -> str:
    """A snapshot without its plots."""
    data = json.loads(text)
    for result in data["metric_results"].values():
        result["widget"] = []
    data["widgets"] = [w for w in data["widgets"] if w["type"] in _KEPT_WIDGETS]
    return json.dumps(data)
