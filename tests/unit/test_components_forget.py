"""Forgetting a user beyond the log: view files, tables of runs, samples, and which models saw the user."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.forget import forget_user
from engagement.files import write_part
from engagement.importers import contract_dir
from engagement.served import read
from engagement.store import EngagementStore
from evergreen.settings import Settings
from feature_repo.repo import FeatureRepo
from monitoring.reference import OLD
from serving.registry import Registry
from tests.served_lab import AT, served, write
from tests.serving_lab import small_table, write_bundle
from tests.synth import START, write_contract_dir

USER = "u3"
AS_OF = datetime(2024, 1, 9, 3, tzinfo=UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A home with data, views, one ranking table where a pipeline leaves it, and nothing published."""
    home = tmp_path_factory.mktemp("forget") / "home"
    store = EngagementStore(home / "data")
    store.append(contract_dir.read(write_contract_dir(home.parent / "feed", users=8, items=40, days=8)))
    snapshot = store.snapshot(AS_OF)
    snapshot.save()
    repo, table = FeatureRepo(home / "features"), home / "pipelines" / "retrain-1" / "build-features" / "table"
    repo.build(snapshot)
    repo.table(snapshot, START, AS_OF, table)
    return home


@pytest.fixture
def home(made, tmp_path) -> Settings:
    shutil.copytree(made, tmp_path / "home")
    return Settings(home=tmp_path / "home")


def views_of(settings, user=USER):
    files = (settings.features / "views").glob("*/*.parquet")
    tables = {f: pq.read_table(f) for f in files}
    return {f for f, t in tables.items() if "user_id" in t.column_names and user in t["user_id"].to_pylist()}


def test_views_and_tables_that_hold_the_user_go_and_are_built_again_without(home):
    held, table = views_of(home), next(home.pipeline_root.rglob("table.json")).parent
    assert held and USER.encode() in np.load(table / "user_id.npy")
    report = forget_user(home, USER)
    assert report["view_files"] >= len(held) and not any(f.exists() for f in held)  # and the partial sums behind them
    assert report["run_directories"] == [table.relative_to(home.root).as_posix()] and not table.exists()
    repo, snapshot = FeatureRepo(home.features), EngagementStore(home.data).snapshot(AS_OF)
    again = repo.table(snapshot, START, AS_OF, table)
    assert {f for f in held if f.exists()} and views_of(home) == set()
    assert USER.encode() not in again.user_id and again.requests
    assert forget_user(home, USER)["view_files"] == 0


def test_samples_in_pipelines_go_and_those_in_sealed_bundles_are_told(home):
    sample = pa.table({"user_id": [USER, "u1"], "score_save": [0.1, 0.2]})
    places = [home.pipeline_root / "retrain-1" / "train-ranker" / "bundle", home.serving / "models" / "1"]
    for place in places:
        place.mkdir(parents=True)
        pq.write_table(sample, place / OLD)
    report = forget_user(home, USER)
    assert not places[0].exists() and places[1].exists()
    assert report["samples"] == ["serving/models/1"]


def test_the_serving_log_forgets_the_user_too(home):
    log = home.serving / "log"
    write(log, served(1, USER), served(2, "u1"), served(3, USER, purpose="shadow"))
    assert forget_user(home, USER)["served_answers"] == 2
    assert read(log, AT, AT + timedelta(days=1))["user_id"].unique().to_list() == ["u1"]
    assert forget_user(home, USER)["served_answers"] == 0


def test_unknown_user_changes_nothing(home):
    before = {p: p.read_bytes() for p in home.root.rglob("*") if p.is_file() and p.name != ".lock"}
    report = forget_user(home, "nobody")
    assert not report["known"] and report["models"] == report["run_directories"] == []
    assert {
        p: p.read_bytes() for p in home.root.rglob("*") if p.is_file() and p.name not in (".lock", "run.lock")
    } == before


def test_models_that_saw_the_user_are_told_by_window_snapshot_and_parent(home):
    """A model before the first action, one over them, a copy of that one trained on, and one from scratch."""
    store = EngagementStore(home.data)
    rows = store.snapshot(AS_OF).engagements()
    times = sorted(
        t for u, t in zip(rows["user_id"].to_pylist(), rows["event_timestamp"].to_pylist(), strict=True) if u == USER
    )
    after, before = times[-1].isoformat(), times[0].isoformat()
    registry, snapshot = Registry(home), store.snapshot(AS_OF).digest
    windows = {
        "before": {"train_start": "2023-12-01T00:00:00+00:00", "train_end": before, "snapshot": "other"},
        "saw": {"train_start": before, "train_end": after, "snapshot": snapshot},
        "child": {"train_start": "2024-02-01T00:00:00+00:00", "train_end": "2024-02-02T00:00:00+00:00",
                  "snapshot": "later", "parent_version": "2", "strategy": "update"},
        "scratch": {"train_start": "2024-02-01T00:00:00+00:00", "train_end": "2024-02-02T00:00:00+00:00",
                    "snapshot": "later", "parent_version": "2", "strategy": "scratch"},
    }  # fmt: skip
    for seed, (key, tags) in enumerate(windows.items()):
        registry.register(write_bundle(home.root / "bundles" / key, small_table(), seed), key, tags=tags)
    models = forget_user(home, USER)["models"]
    assert [(m["version"], m["how"]) for m in models] == [("2", "window"), ("3", "parent")]
    assert models[0]["train_start"] == before and models[0]["snapshot"] == snapshot
    again = forget_user(home, USER)["models"]  # the rows are gone; the record of the snapshot still tells
    assert [(m["version"], m["how"]) for m in again] == [("2", "snapshot"), ("3", "parent")]


def test_records_of_the_user_leave_the_streams_quarantine_and_others_stay(home):
    place = home.features / "quarantine"
    raw = [b'{"user_id": "u3", "item_id": 7}', b'{"user_id": "u4"}', b"not json u3"]
    bad = pa.table({"reason": ["bad_type"] * 3, "position": ["1", "2", "3"], "raw": pa.array(raw, pa.binary())})
    write_part(place, bad, "stream-")
    write_part(place, bad.slice(2), "stream-")
    assert forget_user(home, USER)["quarantined_records"] == 3
    left = [r for f in place.glob("stream-*.parquet") for r in pq.read_table(f).column("raw").to_pylist()]
    assert left == [raw[1]]
    assert forget_user(home, USER)["quarantined_records"] == 0
