"""Forgetting a user beyond the log: served features, the serving log, view files, training tables, and which models saw
the user.

No pipeline step: a person asks for it (`evergreen data forget USER`). It can be repeated; what an earlier call removed
counts as nothing the second time, but the snapshots and models that saw the user are told again.
"""

import bisect
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engagement import served
from engagement.files import write_part
from engagement.index import to_us
from engagement.report import ForgetReport
from engagement.store import EngagementStore
from evergreen.settings import Settings
from monitoring.reference import OLD

# Places of a home where runs leave ranking tables, and bundles with a sample of their training window.
LEFT_BY_RUNS = ("runs", "pipelines", "replay", "monitoring")


def forget_user(settings: Settings, user_id: str) -> dict[str, Any]:
    """Remove a user from the home; the next build and the next run work without the user.

    Returns:
        The store's report (see `ForgetReport`), `online_rows`, `served_answers` (of the serving log), `view_files`,
        `quarantined_records` (of the stream), `run_directories`, `models` (see `models_that_saw`), and `samples`:
        registered bundles whose sample of the training window still shows the user. A bundle is sealed by its digest,
        so those go only with the version.

    Raises:
        EvergreenError: There is no data, or a file cannot be searched.
    """
    from feature_repo.repo import FeatureRepo

    report = EngagementStore(settings.data).forget(user_id)
    repo = FeatureRepo.of(settings) if settings.features.exists() else None
    online = repo.forget_user(user_id) if repo else 0
    views = [f for f in settings.features.rglob("*.parquet") if _in_parquet(f, user_id)]
    for file in views:
        file.unlink()  # the next build writes it again
    quarantined = _from_quarantine(settings.features / "quarantine", user_id)
    directories = [d for place in LEFT_BY_RUNS for d in _left_by_runs(settings.root / place, user_id)]
    for directory in directories:
        shutil.rmtree(directory)
    places = (settings.serving / "models", settings.mlflow_artifacts)
    samples = [f for place in places for f in place.rglob(OLD) if _in_parquet(f, user_id)]
    return {
        "user": user_id,
        **report.to_json(),
        "online_rows": online,
        "served_answers": served.forget(settings.serving_log, user_id),
        "view_files": len(views),
        "quarantined_records": quarantined,
        "run_directories": [d.relative_to(settings.root).as_posix() for d in directories],
        "models": models_that_saw(settings, report),
        "samples": sorted(f.parent.relative_to(settings.root).as_posix() for f in samples),
    }


def models_that_saw(settings: Settings, report: ForgetReport) -> list[dict[str, Any]]:
    """The registered versions that learned from the user, oldest first.

    A version did if the user has an engagement in its training window (`how` = `window`); where that is not known
    any more, because an earlier call removed the rows, if its snapshot showed the user (`snapshot`); or if it began
    as a copy of a version that did (`parent`).
    """
    from serving.registry import Registry

    if not report.known or not (settings.mlflow_tracking_uri or (settings.root / "mlflow").exists()):
        return []
    held, saw = {digest for digest, _ in report.snapshots}, dict[str, dict[str, Any]]()
    for version in sorted(Registry(settings).versions(), key=lambda v: int(v.version)):
        tags = version.tags
        how = _how(tags.get("train_start"), tags.get("train_end"), tags.get("snapshot", "") in held, report.times)
        if not how and tags.get("parent_version") in saw and tags.get("strategy") != "scratch":
            how = "parent"
        if how:
            window = {k: tags.get(k, "") for k in ("train_start", "train_end", "snapshot")}
            saw[version.version] = {"version": version.version, "how": how, **window, "aliases": [*version.aliases]}
    return list(saw.values())


def _how(start: str | None, end: str | None, in_snapshot: bool, times: tuple[int, ...]) -> str:
    if not (start and end and times):
        return "snapshot" if in_snapshot else ""
    low, high = (bisect.bisect_left(times, to_us(datetime.fromisoformat(t))) for t in (start, end))
    return "window" if high > low else ""


def _left_by_runs(place: Path, user_id: str) -> Iterator[Path]:
    """Directories of ranking tables and of bundles that hold the user."""
    for file in [*place.rglob("user_id.npy")]:
        users = np.load(file, mmap_mode="r", allow_pickle=False)
        if (users == user_id.encode()).any():
            yield file.parent
    for file in [*place.rglob(OLD)]:
        if _in_parquet(file, user_id):
            yield file.parent


def _from_quarantine(place: Path, user_id: str) -> int:
    """Take records that name the user out of the stream's quarantine; returns how many there were.

    The records there could not be read as they should, so the id is looked for anywhere in their bytes.
    """
    gone = 0
    for file in sorted(place.glob("stream-*.parquet")):
        table = pq.read_table(file)
        raw = table.column("raw").to_pylist()
        kept = pa.array([user_id.encode() not in record for record in raw])
        if pc.all(kept).as_py():
            continue
        gone += len(raw) - pc.sum(kept).as_py()
        if pc.any(kept).as_py():
            write_part(place, table.filter(kept), "stream-")
        file.unlink()
    return gone


def _in_parquet(file: Path, user_id: str) -> bool:
    """Whether a Parquet file names the user; one that cannot be read may, and everything searched can be rebuilt."""
    try:
        with pq.ParquetFile(file) as opened:
            if "user_id" not in opened.schema_arrow.names:
                return False
            users = opened.read(columns=["user_id"]).column("user_id")
        return bool(pc.any(pc.equal(users, user_id)).as_py())
    except (OSError, pa.ArrowException):
        return True
