"""What the trigger is told of the world, and that a retrain which was killed is taken up again, once."""

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest

from components import decide as module
from components.decide import RUNNING_FOR, situation_at
from components.watch import PARENT_PID
from evergreen.settings import Settings

SLOT = datetime(2026, 3, 2, 3, tzinfo=UTC)  # a Monday
HOUR = timedelta(hours=1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cluster's home in which every slot has something new."""
    monkeypatch.delenv(PARENT_PID, raising=False)
    monkeypatch.setattr("serving.registry.Registry.champion", lambda registry: None)
    monkeypatch.setattr("components.instant.evidence_start", lambda *given: SLOT)
    monkeypatch.setattr("engagement.store.EngagementStore.snapshot", lambda store, at: None)
    return Settings(home=tmp_path, now=SLOT + 30 * HOUR)


def run(home, at, outcome="champion", version="1", planned=0.0, ended=True):
    """A retrain, planned so many seconds ago."""
    directory = home.runs / f"{at:%Y%m%dT%H%M}-0123456789"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text("{}")
    os.utime(directory / "plan.json", (time.time() - planned,) * 2)
    result = {"as_of": at.isoformat(), "outcome": outcome, "version": version, "finished_at": at.isoformat()}
    if ended:
        (directory / "result.json").write_text(json.dumps(result))
    return directory


def missed(home, hours):
    return situation_at(home, SLOT + hours * HOUR).missed_slot


def test_slot_is_missed_from_three_hours_on_unless_a_retrain_of_it_or_a_later_one_ended(home):
    assert missed(home, 3 - 1 / 3600) is None
    assert missed(home, 3) == SLOT
    run(home, SLOT - 96 * HOUR)
    assert missed(home, 3) == SLOT
    run(home, SLOT, outcome="held", version="")  # bad data: the slot is still to be done
    assert missed(home, 3) == SLOT
    run(home, SLOT + 2 * HOUR, outcome="held", version="2")
    assert missed(home, 3) is None


def test_retrain_by_a_clock_that_ran_ahead_does_not_hide_missed_slots(home):
    run(home, SLOT + 999 * HOUR)
    situation = situation_at(home, SLOT + 4 * HOUR)
    assert situation.missed_slot == SLOT and situation.last_retrain is None


def test_run_that_was_planned_and_has_not_ended_runs_until_it_is_taken_for_dead(home):
    directory = run(home, SLOT, planned=RUNNING_FOR.total_seconds() - 60, ended=False)
    assert situation_at(home, SLOT + 4 * HOUR).running == directory.name
    run(home, SLOT, planned=RUNNING_FOR.total_seconds() + 1, ended=False)
    assert situation_at(home, SLOT + 4 * HOUR).running == ""


def test_run_that_is_repeated_runs_though_it_was_planned_long_ago_or_held_before(home):
    """A retry, or a slot whose bad data was repaired: `make_plan` finds its plan and touches it."""
    directory = run(home, SLOT, outcome="held", version="", planned=9 * 3600)
    assert situation_at(home, SLOT + 4 * HOUR).running == ""
    os.utime(directory / "result.json", (time.time() - 8 * 3600,) * 2)
    (directory / "plan.json").touch()
    assert situation_at(home, SLOT + 4 * HOUR).running == directory.name


def test_on_a_laptop_no_retrain_runs_beside_the_check(home, monkeypatch):
    run(home, SLOT, ended=False)
    monkeypatch.setenv(PARENT_PID, "1")
    assert situation_at(home, SLOT + 4 * HOUR).running == ""


@pytest.mark.parametrize(
    ("outcomes", "held"),
    [
        (["champion"], 0),
        (["champion", "held"], 1),
        (["champion", "held", "held"], 2),
        (["champion", "held", "champion"], 0),
        # It came back from its canary: what was held before it is an old story.
        (["champion", "held", "held", "rolled_back"], 0),
        (["champion", "held", "held", "rolled_back", "held"], 1),
        (["held", "held"], 2),
        ([], 0),
    ],
)
def test_held_are_the_last_ones_in_a_row(home, outcomes, held):
    for i, outcome in enumerate(outcomes):
        run(home, SLOT - 84 * (len(outcomes) - i) * HOUR, outcome, version=str(i + 1))
    assert situation_at(home, SLOT + HOUR).held == held


def test_run_held_for_bad_data_is_no_retrain_that_learned_and_not_held_by_the_gate(home):
    run(home, SLOT - 96 * HOUR)
    run(home, SLOT, outcome="held", version="")
    situation = situation_at(home, SLOT + HOUR)
    assert situation.last_retrain == SLOT - 96 * HOUR and situation.held == 0


# The whole step, as a laptop and a cluster run it.


@pytest.fixture
def decided(home, monkeypatch):
    """Run the step on a check; returns its outputs."""
    from tests.verdicts import AS_OF, verdict

    monkeypatch.setattr("serving.registry.Registry.__init__", lambda registry, settings: None)
    monkeypatch.setattr("components.decide.why_not", lambda *given: "done")
    monkeypatch.setenv("EVERGREEN_HOME", str(home.root))

    def step(hours, who="run 1", drifted=("age",), **changes):
        at = AS_OF + timedelta(hours=hours)
        monkeypatch.setenv("EVERGREEN_NOW", at.isoformat())
        found = verdict(hours, drifted, **changes)
        path = module.check_directory(home, at) / "drift.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_json())
        artifact = type("Artifact", (), {"path": str(path)})
        return tuple(module.decide_retrain.python_func(at.isoformat(), artifact, who))

    step(-1)  # drift that is to persist
    return step


def test_early_retrain_that_was_killed_with_its_laptop_goes_on_with_the_next_check(decided, home, monkeypatch):
    from monitoring.trigger import history, take
    from tests.verdicts import AS_OF

    monkeypatch.setenv(PARENT_PID, "1")
    assert decided(0) == ("retrain", AS_OF.isoformat(), "drift")  # and killed (-9)
    assert decided(0) == ("retrain", AS_OF.isoformat(), "drift")  # up again within the hour
    assert decided(3) == (
        "retrain",
        AS_OF.isoformat(),
        "drift",
    )  # or hours later: the same run
    assert decided(4, drifted=())[0] == "none"  # nothing asks for it any more
    assert decided(5, broken={"genre": "is gone"})[0] == "none"  # and never over broken data
    assert [decided(6)[0], decided(7)[0]] == ["none", "retrain"]  # it persists again
    assert take(home.monitoring) is not None  # it ended, by whatever outcome
    assert decided(8)[0] == "none"
    assert [d.action for d in history(home.monitoring)].count("retrain") == 1  # of the budget it spent one


def test_early_retrain_of_another_run_on_the_cluster_is_left_alone(decided, home):
    assert decided(0, "run 1")[0] == "retrain"
    assert decided(0, "run 1")[0] == "retrain"  # its pod was started again
    assert decided(1, "run 2")[0] == "none"
    assert decided(41, "run 3")[0] == "retrain"  # run 1 is dead: its request lapsed


def test_early_retrain_that_nobody_began_is_taken_up_by_one_later_check(decided, home, monkeypatch):
    from monitoring.decisions import DecisionLog

    with monkeypatch.context() as killed:  # between the decision and the claim

        def die(*given):
            raise KeyboardInterrupt

        killed.setattr(DecisionLog, "claim", die)
        with pytest.raises(KeyboardInterrupt):
            decided(0, "run 1")
    assert decided(1, "run 2")[0] == "retrain"
    assert decided(0, "run 1")[0] == decided(2, "run 3")[0] == "none"
