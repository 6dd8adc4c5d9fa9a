"""Replay as a user runs it, on data of every shape that the contract allows."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.config import DEFAULT_STRATEGY
from tests.commands import evergreen, kill_when, left_over
from tests.synth import write_contract_dir

SHAPES = {
    "other actions, no features": {"actions": ("like", "skip"), "user_features": False, "item_features": False},
    "positives only": {"exposure": "positives"},
}
COMMAND = ["replay", "--from", "2024-01-03", "--to", "2024-01-12"]


@pytest.fixture(scope="module", params=SHAPES)
def replayed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("replay")
    write_contract_dir(root / "feed", users=10, items=40, days=12, **SHAPES[request.param])
    evergreen(root / "home", "data", "import", str(root / "feed"))
    files = ["--json", str(root / "out.json"), "--report", str(root / "out.html")]
    told = evergreen(root / "home", *COMMAND, "--jobs", "1", *files)
    result = json.loads((root / "out.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert ("completed by sampling" in told) == (result["exposure"] == "positives")
    return root, result


def test_every_slot_is_tested_then_trained(replayed):
    _, result = replayed
    assert [t[:16] for t in result["slots"]] == ["2024-01-04T03:00", "2024-01-08T03:00", "2024-01-11T03:00"]
    found = result["strategies"][DEFAULT_STRATEGY]
    assert len(found["by_window"]) == 2 and all(h > 0 for h in found["by_window"])
    assert found["cost"]["updates"] == 2 and found["cost"]["rows"] > 0 and found["cost"]["cpu_seconds"] > 0
    (said,) = found["gate"]["verdicts"]  # at the first test there is no model to compare with
    assert said["verdict"] in ("promote", "hold") and said["reason"]
    assert set(found["hit3"]) == {"like"} if result["primary_action"] == "like" else {"save", "hide"}


def test_page_is_written(replayed):
    root, _ = replayed
    assert DEFAULT_STRATEGY in (root / "out.html").read_text()


def test_same_replay_again_is_read_and_a_killed_one_goes_on(replayed):
    root, result = replayed
    if result["exposure"] == "positives":
        pytest.skip("one data set is enough")
    evergreen(root / "home", *COMMAND, "--json", str(root / "again.json"))
    assert json.loads((root / "again.json").read_text()) == result  # training seconds included

    more, models = [*COMMAND, "--jobs", "2", "--strategy", "finetune", *_DEFAULT], root / "home" / "replay" / "models"
    assert kill_when(root / "home", more, lambda line: _appeared(models, "*-finetune-*/record.json"), 0.0, False)
    assert _within_seconds(20, lambda: not left_over(root / "home"))  # the replay had no time to tell its workers
    before = {p: p.stat().st_mtime_ns for p in models.glob("*/record.json")}
    evergreen(root / "home", *more, "--json", str(root / "more.json"))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    found = json.loads((root / "more.json").read_text())["strategies"]
    assert found[DEFAULT_STRATEGY]["hit3"] == result["strategies"][DEFAULT_STRATEGY]["hit3"]
    assert found["finetune"]["cost"]["updates"] == 2


_DEFAULT = ["--strategy", DEFAULT_STRATEGY]


def _appeared(directory: Path, pattern: str) -> bool:
    return _within_seconds(120, lambda: any(directory.glob(pattern)))


def _within_seconds(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()
