"""Rollouts with harmful challengers, and rollouts killed with -9 before every single transition.

Each run is a process of its own, forked from a server that has done the imports. Predictors are light stand-ins
(`serving_light`); processes, Envoy, MLflow, judge and state machine are the real ones.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from evergreen.settings import Settings
from tests.serving_lab import left_over

BEHAVIOURS = {
    "1": {},
    "2": {},
    "fails": {"fails": "model yields non-finite scores"},
    "lies": {"answers_as": "other"},
    "constant": {"constant": True},
    "forgets": {"drops_last": True},
    "dead": {"refuses_to_start": True},
}
VERSION = {name: str(i + 1) for i, name in enumerate(BEHAVIOURS)}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "serving.rollout", __name__])


def requests() -> list:
    from serving.rollout import ReplayRequest

    at = datetime(2024, 1, 1, tzinfo=UTC)
    items = [tuple(f"i{(r * 7 + c) % 50}" for c in range(5)) for r in range(20)]
    return [ReplayRequest(f"r{i}", f"u{i % 12}", row, {}, at) for i, row in enumerate(items)]


def in_child(work: Any, *arguments: Any) -> tuple[int, Any]:
    """Run a function in a fresh process: its exit code, and what it returned or how it failed."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(there, work, *arguments))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        result = None
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, result


def _work(pipe: Any, work: Any, *arguments: Any) -> None:
    try:
        pipe.send(work(*arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
        sys.exit(1)


def child(work: Any, *arguments: Any) -> Any:
    code, result = in_child(work, *arguments)
    assert code == 0, result
    return result


# --- what runs in children ---------------------------------------------------------------------------------------


def make_home(home: Path) -> None:
    """A registry with all versions, the first one champion."""
    from serving import mlflow_runs
    from serving.registry import Registry

    mlflow_runs._signature = lambda bundle: None  # it would read a bundle, which these are not
    registry = Registry(Settings(home=home))
    for name, behaviour in BEHAVIOURS.items():
        directory = home / "made" / name
        directory.mkdir(parents=True)
        (directory / "behaviour.json").write_text(json.dumps(behaviour))
        assert registry.register(directory, f"key-{name}") == VERSION[name]
    registry.promote("1")


def roll(home: Path, version: str, permanent: bool = False, die_at: int = 0, again: bool = False) -> dict:
    """One rollout, in a process that kills itself before its `die_at`-th transition (0: never)."""
    from serving.registry import Registry
    from serving.rollout import Rollout
    from tests.fault.serving_light import LightScorer, light_stack

    settings = Settings(home=home)
    registry = Registry(settings)
    stack = light_stack(settings, registry)
    if permanent and not stack.permanent:
        settings = settings.model_copy(update={"gateway_port": _free()})
        stack = light_stack(settings, registry)
        stack.serve_champion()
    elif stack.permanent:
        settings = settings.model_copy(update={"gateway_port": stack.gateway.process.ports["http"]})
        stack = light_stack(settings, registry)
    points = count_transitions(die_at)
    result = Rollout(settings, registry, stack, no_features, LightScorer).run(version, requests(), again=again)
    return {**json.loads(result.to_json()), "points": len(points), "names": points}


def no_features(settings: Settings) -> None:
    """The light model needs none."""


def count_transitions(die_at: int) -> list[str]:
    """Make everything that leaves a trace count itself, and die before the given one."""
    from serving.gateway import Gateway
    from serving.processes import Processes
    from serving.registry import Registry
    from serving.replay import Client
    from serving.rollout_state import Journal

    seen: list[str] = []
    traces = [
        (Journal, "move"),
        (Journal, "record"),
        (Registry, "promote"),
        (Registry, "reject"),
        (Registry, "tag"),
        (Gateway, "_publish_routes"),
        (Processes, "start"),
        (Processes, "keep"),
        (Processes, "stop"),
        (Client, "replay"),
    ]
    for owner, name in traces:
        real = getattr(owner, name)

        def counted(*args, real=real, label=f"{owner.__name__}.{name}", **kwargs):
            seen.append(label)
            if len(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counted)
    return seen


def look(home: Path) -> dict:
    """What registry and ledger say."""
    from serving.registry import Registry
    from serving.rollout_state import Journal

    registry = Registry(Settings(home=home))
    ledger = Journal(Settings(home=home).serving).ledger()
    return {
        "aliases": registry.aliases(),
        "tags": {v.version: v.tags.get("rollout", "") for v in registry.versions()},
        "ends": [line["to"] for line in ledger if line["to"] in ("champion", "rolled_back")],
    }


def finish(home: Path, version: str, permanent: bool) -> dict:
    """Run the rollout again, tell all there is to tell afterwards, and stop everything."""
    from serving.stack import serving_state

    result = roll(home, version, permanent)
    state = serving_state(Settings(home=home))
    runs = sorted(state["processes"])
    stop(home)
    ended = {k: result[k] for k in ("outcome", "serving_version")}
    return look(home) | ended | {"serves": (state["champion"], state["challenger"]), "runs": runs}


def stop(home: Path) -> list[str]:
    from serving.processes import Processes

    return Processes(Settings(home=home)).stop_all()


def _free() -> int:
    from serving.processes import free_port

    return free_port()


# --- tests ---------------------------------------------------------------------------------------------------------


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
    "fails": ("errors", "model yields non-finite scores"),
    "lies": ("wrong", "wrong scores"),
    "constant": ("wrong", "wrong scores"),
    "forgets": ("missing", "predictions for 4 of 5 candidates"),
    "dead": ("", "the model does not load"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_challenger_comes_back_at_the_first_step_and_the_champion_stays(home, name):
    version, (_, says) = VERSION[name], HARMFUL[name]
    result = child(roll, home, version)
    assert result["outcome"] == "rolled_back" and result["serving_version"] == "1"
    assert says in result["reason"]
    assert [s["percent"] for s in result["steps"]] == ([] if name == "dead" else [10])
    seen = child(look, home)
    assert seen["aliases"] == {"champion": "1"}
    assert seen["tags"][version] == f"rolled_back: {result['reason']}"
    assert left_over(home) == []


def test_challenger_killed_in_mid_canary_comes_back_and_its_users_are_answered(home):
    result = child(roll_and_kill, home, "2")
    assert (
        result["outcome"] == "rolled_back" and "no answer" in result["reason"] and "v1 stepped in" in result["reason"]
    )
    assert [(s["percent"], s["verdict"]) for s in result["steps"]] == [(10, "pass"), (50, "fail")]
    assert result["statuses"] == [200]
    assert child(look, home)["aliases"] == {"champion": "1"}
    assert left_over(home) == []


def roll_and_kill(home: Path, version: str) -> dict:
    """A rollout whose challenger is killed at 50 %; with the statuses that clients got."""
    from serving.processes import Processes
    from serving.registry import Registry
    from serving.replay import Client
    from serving.rollout import Rollout
    from tests.fault.serving_light import LightScorer, light_stack

    settings, statuses, real = Settings(home=home), set(), Client.replay

    def remember(client, *arguments):
        answers = real(client, *arguments)
        statuses.update(a.status for a in answers)
        return answers

    def kill(line: str) -> None:
        if "at 50 %: replaying" in line:
            os.kill(Processes(settings).get(f"predictor-{version}").pid, signal.SIGKILL)

    Client.replay = remember
    registry = Registry(settings)
    result = Rollout(settings, registry, light_stack(settings, registry), no_features, LightScorer).run(
        version, requests(), kill
    )
    return {**json.loads(result.to_json()), "statuses": sorted(statuses)}


def test_rolled_back_version_is_not_tried_again_unless_asked(home):
    first = child(roll, home, VERSION["fails"])
    second = child(roll, home, VERSION["fails"])
    assert all(second[k] == first[k] for k in ("outcome", "reason", "steps"))
    assert child(look, home)["ends"] == ["rolled_back"]
    assert child(roll, home, VERSION["fails"], False, 0, True)["outcome"] == "rolled_back"
    assert child(look, home)["ends"] == ["rolled_back", "rolled_back"]


def test_champion_is_rolled_out_once(home):
    first = child(roll, home, "2")
    assert [(s["percent"], s["verdict"]) for s in first["steps"]] == [(10, "pass"), (50, "pass"), (100, "pass")]
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
    from serving.stack import rollback as back

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
    from serving.registry import Registry
    from serving.rollout import Rollout
    from tests.fault.serving_light import LightScorer, light_stack

    def nothing(settings):
        raise EvergreenError("no features were materialised")

    settings = Settings(home=home)
    registry = Registry(settings)
    Rollout(settings, registry, light_stack(settings, registry), nothing, LightScorer).run(version, requests())


def test_two_rollouts_at_once_are_refused(home):
    from filelock import FileLock

    (home / "serving").mkdir(parents=True, exist_ok=True)
    with FileLock(home / "serving" / ".lock"):
        code, said = in_child(roll, home, "2")
    assert code == 1 and "another command is changing what serves" in said
    assert child(look, home)["aliases"]["champion"] == "1"


def test_rollout_without_requests_or_of_an_unknown_version_is_refused(home):
    for version, says in (("2", "no requests to replay"), ("99", "version 99 is not registered")):
        code, said = in_child(roll_nothing, home, version)
        assert code == 1 and says in said
    assert child(look, home)["ends"] == []


def roll_nothing(home: Path, version: str) -> None:
    from serving.registry import Registry
    from serving.rollout import Rollout

    settings = Settings(home=home)
    Rollout(settings, Registry(settings)).run(version, [])


# Traces that last: state, ledger, registry, routing. In the temporary case all else dies with the rollout, and what
# is left to differ is small; a sample of its points will do.
LASTING = ("Journal.", "Registry.", "Gateway.", "Processes.keep")
# Up to the end of the first replay a harmful rollout leaves the traces of a good one: it is killed only after that.
SCHEDULES = {
    "good-under-up": ("2", True, "", 1),
    "harmful-under-up": (VERSION["lies"], True, "Client.replay", 1),
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
    assert wanted["runs"] == (["gateway", f"predictor-{champion}"] if permanent else [])
    first = names.index(after) + 1 if after else 0
    points = [i + 1 for i, name in enumerate(names) if i >= first and name.startswith(LASTING)][::stride]

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
