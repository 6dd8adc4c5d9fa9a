"""`kill -9` in the middle of every stage, then the same command: the same end, nothing registered or promoted twice."""

import json
from pathlib import Path

import pytest

from tests.commands import evergreen, kill_when, left_over
from tests.synth import write_contract_dir

STAGES = [
    "make-plan",
    "build-features",
    "train-ranker",
    "judge-challenger",
    "check-drift",
    "register-model",
    "run-canary",
]
COMMAND = ["retrain", "--last", "1"]


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("feed")
    write_contract_dir(directory, users=30, items=80, days=14)
    return directory


def finish(home: Path) -> dict:
    return json.loads(evergreen(home, *COMMAND, "--json", code=None))[0]


@pytest.mark.slow
def test_run_killed_in_every_stage_ends_as_if_never_killed(feed: Path, tmp_path: Path):
    from evergreen.settings import Settings
    from serving.registry import Registry

    homes = {name: tmp_path / name for name in ("killed", "whole")}
    for home in homes.values():
        evergreen(home, "data", "import", str(feed))

    killed = []
    for i, stage in enumerate(STAGES):
        # Every other time the children die too, as when the machine goes down; else they must notice by themselves.
        if kill_when(homes["killed"], COMMAND, lambda line, s=stage: s in line, after=0.8, whole_group=bool(i % 2)):
            killed.append(stage)
    assert len(killed) >= len(STAGES) - 1, killed  # a stage may be quicker than the kill

    ends = {name: finish(home) for name, home in homes.items()}
    for key in ("run_key", "snapshot", "train_start", "train_end", "version", "outcome"):
        assert ends["killed"][key] == ends["whole"][key], key
    assert ends["killed"]["gate"]["metrics"] == ends["whole"]["gate"]["metrics"]
    assert ends["killed"]["train"]["digest"] == ends["whole"]["train"]["digest"]  # bitwise the same weights

    registry = Registry(Settings(home=homes["killed"]))
    assert [v.version for v in registry.versions()] == ["1"]
    assert registry.aliases()["champion"] == "1"
    assert finish(homes["killed"])["repeated"] is True
    assert left_over(homes["killed"]) == []
