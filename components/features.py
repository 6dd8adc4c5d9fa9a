"""Step 2: point-in-time features of the run's requests, and the online store as of the same instant."""

from datetime import datetime
from pathlib import Path

from kfp import dsl

from components.base import step, tell
from engagement.snapshot import Snapshot
from engagement.table import RankingTable
from evergreen.settings import Settings


def write_table(settings: Settings, snapshot: Snapshot, start: datetime, end: datetime, out: Path) -> RankingTable:
    """Build the views up to the snapshot and write the ranking table of requests in [start, end) to `out`."""
    from feature_repo.repo import FeatureRepo

    repo = FeatureRepo(settings.features)
    tell("building feature views")
    repo.build(snapshot)
    tell("joining features point-in-time")
    return repo.table(snapshot, start, end, out)


@step
def build_features(plan: str, table: dsl.Output[dsl.Dataset]) -> None:
    """Write the ranking table of the training and evidence windows; materialise the online store."""
    from pathlib import Path

    from components.base import begin, tell
    from components.features import write_table
    from components.plan import Plan
    from engagement.snapshot import Snapshot
    from feature_repo.repo import FeatureRepo

    settings, p = begin(), Plan.from_json(plan)
    snapshot = Snapshot.load(settings.data, p.snapshot)
    written = write_table(settings, snapshot, p.train_start, p.as_of, Path(table.path))
    tell("materialising the online store")
    FeatureRepo(settings.features).materialize(snapshot)
    table.metadata.update(requests=written.requests, rows=written.rows, snapshot=p.snapshot, run_key=p.run_key)
