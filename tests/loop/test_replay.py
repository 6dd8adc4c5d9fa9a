"""Replay on data of every shape that the contract allows."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from tests.commands import evergreen, kill_when
from tests.synth import write_contract_dir

SHAPES = {
    "other actions, no features": {"actions": ("like", "skip"), "user_features": False, "item_features": False},
    "positives only": {"exposure": "positives"},
}


@pytest.fixture(scope="module", params=SHAPES)
def replayed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("replay")
    write_contract_dir(root / "feed", users=40, items=100, days=12, **SHAPES[request.param])
    evergreen(root / "home", "data", "import", str(root / "feed"))
    command = ["replay", "--from", "2024-01-05", "--to", "2024-01-12", "--json", str(root / "out.json")]
    # Killed in the middle first: the second call goes on where it was.
    kill_when(root / "home", command, lambda line: "ewc+distill" in line, after=6.0, whole_group=True)
    evergreen(root / "home", *command)
    return root, json.loads((root / "out.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_file_holds_what_each_slot_did(replayed):
    _, result = replayed
    assert [datetime.fromisoformat(s["as_of"]).isoformat() for s in result["slots"]] == [
        "2024-01-08T03:00:00+00:00",
        "2024-01-11T03:00:00+00:00",
    ]
    for slot in result["slots"]:
        assert slot["strategy"] == "ewc+distill"
        assert slot["train_rows"] > 0 and slot["train_seconds"] > 0 and slot["requests"] > 0
        assert slot["gate"]["verdict"] in ("promote", "hold") and slot["gate"]["reason"]
        assert set(slot["metrics"]["challenger"]["hit3"]) == set(actions_of(result))
    assert result["slots"][0]["metrics"]["champion"] is None
    if result["slots"][0]["gate"]["verdict"] == "promote":
        assert set(result["slots"][1]["metrics"]["champion"]["hit3"]) == set(actions_of(result))
        assert result["slots"][1]["train_start"] == result["slots"][0]["train_end"]  # an update reads the new rows only


def actions_of(result: dict) -> list[str]:
    return list(result["slots"][0]["metrics"]["challenger"]["hit3"])


def test_summary_adds_the_slots_up(replayed):
    _, result = replayed
    summary, slots = result["summary"]["ewc+distill"], result["slots"]
    assert summary["slots"] == len(slots) == summary["promoted"] + summary["held"]
    assert summary["train_rows"] == sum(s["train_rows"] for s in slots)
    total = sum(s["requests"] for s in slots)
    primary = result["primary_action"]
    mean = sum(s["metrics"]["challenger"]["hit3"][primary] * s["requests"] for s in slots) / total
    assert summary[f"hit3_{primary}_challenger"] == pytest.approx(mean, abs=1e-6)


def test_same_replay_again_is_read_not_computed(replayed):
    root, result = replayed
    evergreen(root / "home", "replay", "--from", "2024-01-05", "--to", "2024-01-12", "--json", str(root / "again.json"))
    assert json.loads((root / "again.json").read_text()) == result  # training seconds included


def test_sampled_candidates_are_reported(replayed):
    root, result = replayed
    told = evergreen(root / "home", "replay", "--from", "2024-01-05", "--to", "2024-01-12")
    assert ("completed by sampling" in told) == (result["exposure"] == "positives")
