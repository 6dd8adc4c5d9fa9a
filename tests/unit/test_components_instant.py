"""A scheduled run finds its instant itself, and a slot that is done is not done again."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from components.instant import NONE, find_hour, result_at, settle_slot, why_not
from engagement.store import EngagementStore
from evergreen.settings import Settings
from tests.synth import START, write_contract_dir

SLOT = datetime(2024, 1, 15, 3, tzinfo=UTC)  # a Monday, 15 days into the feed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from engagement.importers import contract_dir

    root = tmp_path_factory.mktemp("instant")
    EngagementStore(root / "home" / "data").append(contract_dir.read(write_contract_dir(root / "feed", days=16)))
    return root / "home"


def at(home, now: datetime) -> Settings:
    return Settings(home=home, now=now)


@pytest.fixture
def no_champion(monkeypatch):
    monkeypatch.setattr("serving.registry.Registry.champion", lambda registry: None)


def champion_trained_to(monkeypatch, instant: datetime) -> None:
    found = type("Version", (), {"tags": {"train_end": instant.isoformat()}})
    monkeypatch.setattr("serving.registry.Registry.champion", lambda registry: found)


@pytest.mark.parametrize("after", [timedelta(0), timedelta(minutes=5), timedelta(days=3) - timedelta(microseconds=1)])
def test_empty_as_of_is_the_newest_slot_up_to_now(home, no_champion, after):
    assert settle_slot(at(home, SLOT + after), "") == SLOT.isoformat()


def test_given_as_of_is_kept(home, no_champion):
    other = "2024-01-14T10:00:00+00:00"
    assert settle_slot(at(home, SLOT), other) == other


@pytest.mark.parametrize("now, hour", [("2024-01-09T12:00:00+00:00", 12), ("2024-01-09T14:59:59+02:00", 12)])
def test_empty_as_of_is_the_newest_full_hour_in_utc(home, monkeypatch, now, hour):
    monkeypatch.setenv("EVERGREEN_HOME", str(home))
    monkeypatch.setenv("EVERGREEN_NOW", now)
    assert find_hour.python_func("") == f"2024-01-09T{hour}:00:00+00:00"
    assert find_hour.python_func("2024-01-01T00:30:00+00:00") == "2024-01-01T00:30:00+00:00"


@pytest.mark.parametrize("outcome", ["champion", "held", "rolled_back"])
def test_slot_whose_retrain_ended_is_done_whatever_came_of_it(home, no_champion, outcome):
    result = home / "runs" / "20240115T0300-0123456789" / "result.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"outcome": outcome, "version": "3", "finished_at": "2024-01-15T04:00:00+00:00"}))
    try:
        assert settle_slot(at(home, SLOT), "") == NONE
        assert why_not(at(home, SLOT), SLOT) == "the slot of 2024-01-15 03:00 is done"
        # What a retrain of an older slot could learn, this one has learned; an early retrain is another matter.
        older = "2024-01-11T03:00:00+00:00"
        assert settle_slot(at(home, SLOT), older) == NONE and settle_slot(at(home, SLOT), older, "drift") == older
        assert why_not(at(home, SLOT), SLOT - timedelta(days=4)).endswith("the retrain of 2024-01-15 03:00 has ended")
        # A clock that ran ahead and was set right: its retrain says nothing of the slots until then.
        assert settle_slot(at(home, SLOT - timedelta(hours=1)), older) == older
        result.rename(result.with_name("plan.json"))  # planned and killed: to be taken up again
        assert result_at(at(home, SLOT), SLOT) is None and settle_slot(at(home, SLOT), "") == SLOT.isoformat()
    finally:
        result.with_name("plan.json").unlink(missing_ok=True)


def test_slot_that_bad_data_held_looks_at_the_data_again(home, no_champion):
    result = home / "runs" / "20240115T0300-0123456789" / "result.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"outcome": "held", "version": "", "finished_at": "2024-01-15T04:00:00+00:00"}))
    assert settle_slot(at(home, SLOT), "") == SLOT.isoformat()
    result.unlink()


def test_slot_without_engagement_that_the_champion_has_not_learned_trains_nothing(home, monkeypatch):
    champion_trained_to(monkeypatch, START + timedelta(days=20))
    later = datetime(2026, 11, 19, 3, tzinfo=UTC)
    assert settle_slot(at(home, later), "") == NONE
    assert "no requests with more than three candidates since" in why_not(at(home, later), later)
    assert "already learned everything" in why_not(at(home, SLOT), SLOT)


def test_slot_with_new_engagement_is_to_be_trained_for(home, monkeypatch):
    champion_trained_to(monkeypatch, START + timedelta(days=8))
    assert why_not(at(home, SLOT), SLOT) == ""


@pytest.mark.slow
def test_slot_that_is_done_trains_nothing_where_the_compiled_pipeline_runs_too(home, tmp_path, monkeypatch):
    """The same YAML as on Kubeflow, where no command looks for the result first."""
    from pipelines import local
    from pipelines.slot import slot

    result = home / "runs" / "20240115T0300-0123456789" / "result.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"outcome": "champion", "version": "3", "finished_at": "2024-01-15T04:00:00+00:00"}))
    monkeypatch.setenv("EVERGREEN_NOW", (SLOT + timedelta(hours=2)).isoformat())
    ran = local.run(slot, Settings(home=home), as_of="")
    assert list(ran.seconds) == ["find-slot"]
