"""Which requests a run is judged on: whole slots, or after drift the newest hours that hold enough."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from components.plan import MIN_EVIDENCE_REQUESTS, evidence_start
from engagement.importers import contract_dir
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.synth import write_contract_dir

AS_OF = datetime(2024, 1, 20, 12, tzinfo=UTC)  # a Saturday; the last slot is Thursday 03:00
SLOT = datetime(2024, 1, 18, 3, tzinfo=UTC)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    root: Path = tmp_path_factory.mktemp("plan")
    store = EngagementStore(root / "data")
    store.append(contract_dir.read(write_contract_dir(root / "feed", users=300, days=21)), AS_OF + timedelta(days=30))
    return store.snapshot(AS_OF)


def requests_since(snapshot: Snapshot, start: datetime) -> int:
    return len(set(snapshot.engagements(start)["request_id"].to_pylist()))


def test_a_slot_is_judged_on_whole_slots(snapshot):
    assert evidence_start(snapshot, None, "slot") == SLOT


def test_after_drift_the_days_since_the_slot_are_learned_not_kept_as_evidence(snapshot):
    start = evidence_start(snapshot, None, "drift")
    assert SLOT < start < AS_OF
    assert requests_since(snapshot, start) >= MIN_EVIDENCE_REQUESTS


def test_after_drift_a_sparse_log_falls_back_to_slots(snapshot, monkeypatch):
    monkeypatch.setattr("components.plan.MIN_EVIDENCE_REQUESTS", 10**9)
    assert evidence_start(snapshot, None, "drift") == evidence_start(snapshot, None, "slot")


def test_what_the_champion_learned_is_no_evidence(snapshot):
    after = AS_OF - timedelta(hours=30)
    assert evidence_start(snapshot, after, "drift") > after
