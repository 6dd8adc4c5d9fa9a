"""Rollouts with harmful challengers, and rollouts killed with -9 before every single transition.

Each run is a process of its own, forked from a server that has done the imports. Predictors are light stand-ins
(`serving_light`); processes, Envoy, MLflow, judge and state machine are the real ones.
"""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from evergreen.settings import Settings
from tests.fault.kills_lab import (
    VERSION,
    child,
    finish,
    in_child,
    look,
    make_home,
    open_home,
    requests,
    roll,
    stop,
)
from tests.fault.serving_light import light_rollout
from tests.serving_lab import left_over


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("template") / "home"
    child(make_home, home)
    return home


@pytest.fixture
def home(template, tmp_path):
    shutil.copytree(template, tmp_path / "home")
    yield tmp_path / "home"
    child(stop, tmp_path / "home")
    assert left_over(tmp_path / "home") == []


HARMFUL = {
    "fails": "model yields non-finite scores",
    "lies": "wrong scores",
    "constant": "wrong scores",
    "forgets": "predictions for 4 of 5 candidates",
    "dead": "the model does not load",
    "hangs": "timed out",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_challenger_comes_back_out_of_the_dark_and_no_user_ever_had_it(home, name):
    version = VERSION[name]
    result = child(roll_impatient, home, version)
    assert result["outcome"] == "rolled_back" and result["serving_version"] == "1"
    assert HARMFUL[name] in result["reason"]
    assert [(s["percent"], s["requests"]) for s in result["steps"]] == ([] if name == "dead" else [(0, 0)])
    seen = child(look, home)
    assert seen["aliases"] == {"champion": "1"}
    assert seen["tags"][version] == f"rolled_back: {result['reason']}"
    assert left_over(home) == []


def roll_impatient(home: Path, version: str) -> dict:
    """A rollout by a client who calls half a second slow."""
    from serving import client, replay

    client.SLOW = replay.SLOW = 0.5
    return roll(home, version)


def test_challenger_killed_at_half_comes_back_and_its_users_are_answered(home):
    result = child(roll_and_kill, home, "2")
    assert result["outcome"] == "rolled_back" and "no answer" in result["reason"]
    assert [(s["percent"], s["verdict"]) for s in result["steps"]][:4] == [
        *((p, "pass") for p in (0, 1, 10)),
        (50, "fail"),
    ]
    assert result["statuses"] == [200]
    assert child(look, home)["aliases"] == {"champion": "1"}
    assert left_over(home) == []


def roll_and_kill(home: Path, version: str) -> dict:
    """A rollout whose challenger is killed at 50 %; with the statuses that users got."""
    from serving.client import Client
    from serving.processes import Processes

    settings, registry = open_home(home)
    statuses, real = set(), Client.ask

    def remember(client, call):
        answer = real(client, call)
        if call.headers["x-purpose"] == "replay":
            statuses.add(answer.status)
        return answer

    def kill(line: str) -> None:
        if "at 50 %: gathering" in line:
            os.kill(Processes(settings).get(f"predictor-{version}").pid, signal.SIGKILL)

    Client.ask = remember
    result = light_rollout(settings, registry).run(version, requests(), kill)
    return {**json.loads(result.to_json()), "statuses": sorted(statuses)}


STAGES = (0, 1, 10, 50, 100)


@pytest.mark.parametrize("at", STAGES)
def test_challenger_that_is_no_longer_wanted_comes_back_from_any_stage(home, at):
    result = child(roll_unwanted, home, at)
    assert (result["outcome"], result["reason"], result["serving_version"]) == (
        "rolled_back",
        "no longer wanted",
        "1",
    )
    passed = STAGES[: STAGES.index(at)]
    assert [(s["percent"], s["verdict"]) for s in result["steps"]] == [*((p, "pass") for p in passed), (at, "stopped")]
    assert child(look, home)["ends"] == ["rolled_back"] and left_over(home) == []


def roll_unwanted(home: Path, at: int) -> dict:
    settings, registry = open_home(home)
    seen: list[str] = []
    result = light_rollout(settings, registry).run(
        "2",
        requests(),
        seen.append,
        wanted=lambda: (
            not any("gathering" in line and f" {at} %" in line.replace("in the dark", "at 0 %") for line in seen)
        ),
    )
    return json.loads(result.to_json())


def test_challenger_about_which_nothing_is_learnt_comes_back_after_the_last_look(home):
    result = child(roll_blind, home)
    assert result["outcome"] == "rolled_back" and result["looks"] == result["steps"][-1]["looks"] > 1
    assert result["reason"].startswith(f"not shown within {result['looks']} looks: ")
    assert "0 requests, 5 are needed" in result["reason"]
    assert [s["percent"] for s in result["steps"]] == [0, 1, 10] and result["steps"][-1]["verdict"] == "fail"


def roll_blind(home: Path) -> dict:
    """A rollout in which nobody looks from 10 % on."""
    from serving.evidence import Evidence
    from serving.judge import laptop
    from serving.replay import ReplayTraffic
    from serving.traffic import Portion
    from tests.fault.serving_light import LightScorer, no_features

    class Blind(ReplayTraffic):
        def look(self, stage, mark):
            return super().look(stage, mark) if stage.percent < 10 else Portion(Evidence(stage.percent), mark)

    settings, registry = open_home(home)
    rollout = light_rollout(settings, registry, lambda *known: Blind(*known, no_features, LightScorer))
    return {**json.loads(rollout.run("2", requests()).to_json()), "looks": laptop().looks}


def test_rolled_back_version_is_not_tried_again_unless_asked(home):
    first = child(roll, home, VERSION["fails"])
    second = child(roll, home, VERSION["fails"])
    assert all(second[k] == first[k] for k in ("outcome", "reason", "steps"))
    assert child(look, home)["ends"] == ["rolled_back"]
    assert child(roll, home, VERSION["fails"], False, 0, True)["outcome"] == "rolled_back"
    assert child(look, home)["ends"] == ["rolled_back", "rolled_back"]


def test_champion_is_rolled_out_once(home):
    first = child(roll, home, "2")
    assert [(s["percent"], s["verdict"]) for s in first["steps"]] == [(p, "pass") for p in STAGES]
    again = child(roll, home, "2")
    assert again["outcome"] == "champion" and again["steps"] == first["steps"]
    assert child(look, home) == {
        "aliases": {"champion": "2", "previous": "1"},
        "tags": {v: {"2": "champion"}.get(v, "") for v in VERSION.values()},
        "ends": ["champion"],
    }


def test_version_that_was_rolled_back_by_hand_is_not_promoted_by_the_same_run_again(home):
    child(roll, home, "2")
    child(rollback, home)
    result = child(roll, home, "2")
    assert (result["outcome"], result["serving_version"]) == ("rolled_back", "1")
    assert child(look, home)["aliases"] == {"champion": "1"}


def rollback(home: Path) -> dict:
    from serving.rollback import rollback as back

    return back(Settings(home=home))


def test_rollout_that_was_killed_is_given_up_when_another_version_comes(home):
    code, _ = in_child(roll, home, "2", False, 12)
    assert code == -signal.SIGKILL
    assert child(roll, home, VERSION["lies"])["outcome"] == "rolled_back"
    seen = child(look, home)
    assert seen["aliases"] == {"champion": "1"} and "given up" in seen["tags"]["2"]


def test_rollout_killed_right_after_its_promotion_stays_promoted_when_another_version_comes(template, home, tmp_path):
    shutil.copytree(template, tmp_path / "whole")
    names = child(roll, tmp_path / "whole", "2")["names"]
    after = names.index("Registry.promote") + 2  # the next trace that it leaves; counted from one
    assert in_child(roll, home, "2", False, after)[0] == -signal.SIGKILL
    result = child(roll, home, VERSION["lies"])
    assert (result["outcome"], result["serving_version"]) == ("rolled_back", "2")
    seen = child(look, home)
    assert seen["aliases"] == {"champion": "2", "previous": "1"} and seen["ends"] == ["champion", "rolled_back"]
    assert seen["tags"]["2"] == "champion"


def test_missing_features_are_nobodys_fault_and_decide_nothing(home):
    code, said = in_child(roll_without_features, home, "2")
    assert code == 1 and "no features were materialised" in said and left_over(home) == []
    seen = child(look, home)
    assert seen["ends"] == [] and seen["tags"]["2"] == ""
    assert child(roll, home, "2")["outcome"] == "champion"


def roll_without_features(home: Path, version: str) -> None:
    from engagement.errors import EvergreenError
    from serving.replay import ReplayTraffic
    from tests.fault.serving_light import LightScorer

    def nothing(settings):
        raise EvergreenError("no features were materialised")

    settings, registry = open_home(home)
    light_rollout(settings, registry, lambda *known: ReplayTraffic(*known, nothing, LightScorer)).run(
        version, requests()
    )


def test_two_rollouts_at_once_are_refused(home):
    from filelock import FileLock

    (home / "serving").mkdir(parents=True, exist_ok=True)
    with FileLock(home / "serving" / ".lock"):
        code, said = in_child(roll, home, "2")
    assert code == 1 and "another command is changing what serves" in said
    assert child(look, home)["aliases"]["champion"] == "1"


@pytest.mark.parametrize("at", ["in the dark", "at 50 %"])
def test_controller_whose_rollout_was_taken_up_by_another_stops_and_touches_nothing(home, at):
    """The lock cannot be trusted where two machines share a home; the fencing number then tells them apart."""
    before, after, said = child(roll_and_be_overtaken, home, at)
    assert said == "another controller has taken up the rollout of version 2. This one has touched nothing since."
    assert before == after


def roll_and_be_overtaken(home: Path, at: str) -> tuple[Any, Any, str]:
    """What was there when another controller took over, what is there in the end, and the error."""
    from engagement.errors import EvergreenError
    from serving.gateway import Gateway
    from serving.processes import Processes
    from serving.rollout_state import Journal

    settings, registry = open_home(home, permanent=True)
    seen: list[Any] = []

    def snapshot() -> tuple:
        journal, processes = Journal(settings.serving), Processes(settings)
        runs = sorted(p.name for p in processes.running())
        return journal.load(), journal.transitions(), registry.aliases(), Gateway(settings, processes).routing, runs

    def overtake(line: str) -> None:
        if f"{at}: gathering" in line:
            journal = Journal(settings.serving)
            journal.take_up(journal.load())
            seen.append(snapshot())

    try:
        light_rollout(settings, registry).run("2", requests(), overtake)
    except EvergreenError as error:
        return repr(seen[0]), repr(snapshot()), str(error)
    return None, None, "went on"


def test_rollout_without_requests_or_of_an_unknown_version_is_refused(home):
    for version, says in (("2", "no requests to replay"), ("99", "version 99 is not registered")):
        code, said = in_child(roll_nothing, home, version)
        assert code == 1 and says in said
    assert child(look, home)["ends"] == []


def roll_nothing(home: Path, version: str) -> None:
    light_rollout(*open_home(home)).run(version, [])


# Traces that last: state, ledger, registry, routing. In the temporary case all else dies with the rollout, and what
# is left to differ is small; a sample of its points will do.
LASTING = ("Journal.", "Registry.", "Gateway.", "Processes.keep")
# The same lines at every stage, between two transitions that are all tried: the first stages' will do.
ALIKE = ("Journal.save", "Gateway._publish_routes")
# Up to the end of the first replay a harmful rollout leaves the traces of a good one: it is killed only after that.
SCHEDULES = {
    "good-under-up": ("2", True, "", 1),
    "harmful-under-up": (VERSION["lies"], True, "ReplayTraffic.look", 1),
    "good-alone": ("2", False, "", 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rollout_killed_before_any_transition_ends_as_if_never_killed(template, tmp_path, schedule):
    version, permanent, after, stride = SCHEDULES[schedule]
    whole = tmp_path / "whole"
    shutil.copytree(template, whole)
    names = child(roll, whole, version, permanent)["names"]
    wanted = child(finish, whole, version, permanent)
    champion = wanted["aliases"]["champion"]
    assert wanted["serves"] == ((champion, "") if permanent else ("", ""))
    warm = sorted({f"predictor-{champion}", "predictor-1"})  # the champion before stands by
    assert wanted["runs"] == (["gateway", *warm] if permanent else [])
    first = names.index(after) + 1 if after else 0
    points = [
        i + 1
        for i, name in enumerate(names)
        if i >= first and name.startswith(LASTING) and (name not in ALIKE or names[:i].count(name) < 3)
    ][::stride]

    def killed_at(point: int) -> str:
        home = tmp_path / f"killed-{point}"
        shutil.copytree(template, home)
        code, said = in_child(roll, home, version, permanent, point)
        problems = [] if code == -signal.SIGKILL else [f"was not killed: {said}"]
        if not permanent and left_over(home):
            problems.append(f"left {left_over(home)}")
        found = child(finish, home, version, permanent)
        if found != wanted:
            problems.append(f"ended as {found}, not as {wanted}")
        if left_over(home):
            problems.append(f"left {left_over(home)}")
        return f"before {names[point - 1]} ({point}): {problems}" if problems else ""

    with ThreadPoolExecutor(2) as pool:
        assert [p for p in pool.map(killed_at, points) if p] == []
