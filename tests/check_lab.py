"""A home with a champion that nobody trained, to check it in this process: weights are random, all else is real."""

import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engagement.importers import contract_dir
from engagement.store import EngagementStore
from engagement.table import micros
from evergreen.settings import Settings
from monitoring.compare import Window
from monitoring.reference import DIRECTORY
from monitoring.verdict import DriftVerdict
from tests.serving_lab import service_port, write_bundle
from tests.synth import START, write_contract_dir

FEED = {"users": 60, "items": 60, "item_features": False, "context_features": True}
LEARNED = 9  # days
TRAINED = START + timedelta(days=LEARNED)
CALM = START + timedelta(days=13)  # an instant after ordinary days


def champion_home(root: Path, **feed) -> Settings:
    """A home whose champion learned the first days; the days to be checked are not imported yet."""
    from components.drift import reference_of, scored_part
    from feature_repo.repo import FeatureRepo
    from model.bundle import Bundle
    from serving.registry import Registry

    ports = {f"{name}_port": service_port() for name in ("gateway", "mlflow", "evidently", "promoter", "scheduler")}
    settings = Settings(home=root / "home", **ports)
    deliver(settings, root / "learned", 0, LEARNED, **feed)
    snapshot, repo = EngagementStore(settings.data).snapshot(TRAINED), FeatureRepo.of(settings)
    repo.build(snapshot)
    table = repo.table(snapshot, START + timedelta(days=1), TRAINED, root / "table")
    directory = write_bundle(root / "bundle", table, exported=False)
    start = START + timedelta(days=1)
    part, scores = scored_part(Bundle.load(directory), table, start, TRAINED)
    window = Window(start, TRAINED, table.between(micros(start), micros(TRAINED)), part, scores, {})
    reference_of(settings, window, TRAINED, None).save(directory / DIRECTORY)
    registry = Registry(settings)
    tags = {"train_start": start.isoformat(), "train_end": TRAINED.isoformat(), "gate": "promote"}
    registry.promote(registry.register(directory, "first", tags=tags))
    return settings


def deliver(settings: Settings, at: Path, first: int, last: int, change: Callable | None = None, **feed) -> None:
    """Import days [first, last) of the feed, each day's rows changed, if wanted."""
    write_contract_dir(at, **{**FEED, **feed}, first=first, days=last)
    for file in (at / "engagements").glob("*.parquet") if change else ():
        pq.write_table(change(pq.read_table(file)), file)
    EngagementStore(settings.data).append(contract_dir.read(at))


def put(name: str, value: str | None) -> Callable[[pa.Table], pa.Table]:
    """A change that gives every row the same value of a column."""

    def change(table: pa.Table) -> pa.Table:
        same = pa.array([value] * table.num_rows, table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), name, same)

    return change


def check(settings: Settings, as_of: datetime) -> DriftVerdict:
    """What the first step of the monitor does."""
    from components.check import check_champion

    with tempfile.TemporaryDirectory() as room:
        return check_champion(settings, as_of, Path(room) / "table")
