"""The whole loop, run as a user runs it, on a small synthetic feed; outputs are checked, not just success."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from tests.commands import evergreen, evergreen_json, left_over
from tests.synth import write_contract_dir


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which two slots ran."""
    root = tmp_path_factory.mktemp("loop")
    write_contract_dir(root / "feed")
    evergreen(root / "home", "data", "import", str(root / "feed"))
    return root / "home"


@pytest.fixture(scope="module")
def ran(home: Path) -> list[dict]:
    return json.loads(evergreen(home, "retrain", "--last", "2", "--json", code=None))


def registry(home: Path):
    from evergreen.settings import Settings
    from serving.registry import Registry

    return Registry(Settings(home=home))


def test_first_slot_trains_from_scratch_and_goes_live(ran):
    first = ran[0]
    assert first["champion"] == "" and first["version"] == "1"
    assert first["gate"]["metrics"]["champion"] is None
    assert first["outcome"] == "champion"


def test_second_slot_updates_the_first_on_new_rows_only(ran):
    first, second = ran
    assert second["champion"] == "1" and second["version"] == "2"
    assert second["train_start"] == first["train_end"]
    assert second["train_end"] > first["train_end"]
    assert second["train"]["rows"] < first["train"]["rows"]


def test_evidence_is_later_than_anything_either_model_saw(ran):
    for result in ran:
        assert datetime.fromisoformat(result["train_end"]) < datetime.fromisoformat(result["as_of"])
        assert result["gate"]["requests"] > 0


def test_outcome_follows_the_gate(ran):
    for result in ran:
        if result["gate"]["verdict"] == "hold":
            assert result["outcome"] == "held" and result["rollout"] is None
        else:
            assert result["outcome"] == "champion"
            assert [s["percent"] for s in result["rollout"]["steps"]][-1] == 100
            assert all(s["errors"] == 0 and s["requests"] > 0 for s in result["rollout"]["steps"])


def test_registry_serves_what_the_results_say(home, ran):
    aliases = registry(home).aliases()
    live = [r["version"] for r in ran if r["outcome"] == "champion"]
    assert aliases["champion"] == live[-1]
    assert aliases.get("previous") == (live[-2] if len(live) > 1 else None)
    assert {v.version for v in registry(home).versions()} == {"1", "2"}


def test_lineage_names_data_code_parent_and_verdict(home, ran):
    for version in registry(home).versions():
        result = next(r for r in ran if r["version"] == version.version)
        tags = version.tags
        assert tags["run_key"] == result["run_key"]
        assert tags["snapshot"] == result["snapshot"]
        assert tags["code_version"] == result["code"]
        assert tags["parent_version"] == result["champion"]
        assert tags["gate"] == result["gate"]["verdict"]


def test_asking_again_does_nothing_twice(home, ran):
    again = json.loads(evergreen(home, "retrain", "--last", "2", "--json", code=None))
    assert [r["repeated"] for r in again] == [True, True]
    assert [r["finished_at"] for r in again] == [r["finished_at"] for r in ran]
    assert len(registry(home).versions()) == 2
    assert "Nothing to do" in evergreen(home, "retrain", "--last", "2", code=None)


def test_status_tells_the_same_story(home, ran):
    status = evergreen_json(home, "status")
    assert [r["version"] for r in status["runs"]] == [r["version"] for r in ran]
    assert status["champion"] == registry(home).aliases()["champion"]
    assert status["drift"]["reason"] == ran[-1]["drift"]["reason"]
    assert datetime.fromisoformat(status["next_slot"]).weekday() in (0, 3)


def test_drift_page_is_in_the_evidently_workspace(home, ran):
    pages = list((home / "evidently").rglob("*.json"))
    assert len(pages) >= len(ran)


def test_nothing_is_left_running(home, ran):
    assert left_over(home) == []


def test_champion_loads_from_mlflow_without_pickle(home, ran, monkeypatch):
    import mlflow

    from evergreen.settings import Settings

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    settings = Settings(home=home)
    mlflow.set_tracking_uri(settings.tracking_uri)
    assert mlflow.pyfunc.load_model(f"models:/{settings.model_name}@champion").metadata.signature is not None
    assert not list((home / "mlflow").rglob("*.pkl"))


def test_early_monitor_decides_once(home, ran):
    as_of = ran[-1]["as_of"]
    first = evergreen_json(home, "monitor", "--as-of", as_of)
    second = evergreen_json(home, "monitor", "--as-of", as_of)
    assert first["decision"]["action"] in ("retrain", "none")
    assert second["decision"] == first["decision"]
    assert len(registry(home).versions()) == 2  # the slot's run at this instant is done already
