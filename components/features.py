"""Step 2: point-in-time features of the run's requests, and the online store as of the same instant."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfp import dsl

from components.base import step, tell
from engagement.snapshot import Snapshot
from engagement.table import RankingTable
from evergreen.settings import Settings

if TYPE_CHECKING:
    from feature_repo.parity import Parity

LAST_PARITY = "parity.json"  # under the features' root: what the newest materialisation was compared to


def write_table(
    settings: Settings,
    snapshot: Snapshot,
    start: datetime,
    end: datetime,
    out: Path,
    sample_from: datetime | None = None,
) -> RankingTable:
    """Build the views up to the snapshot and write the ranking table of requests in [start, end) to `out`.

    The sample for drift beside it is of requests from `sample_from` on: a long history would leave it few new ones.
    """
    from feature_repo.repo import FeatureRepo

    repo = FeatureRepo.of(settings)
    tell("building feature views")
    repo.build(snapshot)
    tell("joining features point-in-time")
    return repo.table(snapshot, start, end, out, sample_from)


def publish(settings: Settings, snapshot: Snapshot) -> "Parity | None":
    """Bring the online store up to the snapshot, and hold it against the offline store."""
    from components.parity import served_parity, write
    from feature_repo.repo import FeatureRepo

    tell("materialising the online store")
    FeatureRepo.of(settings).materialize(snapshot)
    tell("comparing what serving reads with what training reads")
    parity = served_parity(settings, snapshot, snapshot.as_of)
    write(parity, settings.features / LAST_PARITY)
    return parity


def refreshed_at(settings: Settings) -> dict[str, Any]:
    """What is served since the last materialisation."""
    from feature_repo.repo import FeatureRepo

    as_of = FeatureRepo.of(settings).online().as_of
    parity = json.loads((settings.features / LAST_PARITY).read_text())
    return {"online_as_of": as_of.isoformat(), "parity": parity}


@step
def build_features(plan: str, table: dsl.Output[dsl.Dataset], parity: dsl.Output[dsl.Artifact]) -> None:
    """Write the ranking table of the training and evidence windows; materialise the online store."""
    from pathlib import Path

    from components.base import begin
    from components.features import publish, write_table
    from components.parity import write
    from components.plan import Plan
    from engagement.snapshot import Snapshot

    settings, p = begin(), Plan.from_json(plan)
    snapshot = Snapshot.load(settings.data, p.snapshot)
    written = write_table(settings, snapshot, p.train_start, p.as_of, Path(table.path), p.update_start)
    write(publish(settings, snapshot), Path(parity.path))
    table.metadata.update(requests=written.requests, rows=written.rows, snapshot=p.snapshot, run_key=p.run_key)


@step
def refresh_features(as_of: str, parity: dsl.Output[dsl.Artifact]) -> None:
    """Between two retrains: bring the served statistics up to the log as it was known at `as_of`."""
    from datetime import datetime
    from pathlib import Path

    from components.base import begin
    from components.features import publish
    from components.parity import write
    from engagement.store import EngagementStore

    settings, at = begin(), datetime.fromisoformat(as_of)
    write(publish(settings, EngagementStore(settings.data).snapshot(at)), Path(parity.path))
