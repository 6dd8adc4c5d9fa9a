"""The policy: what starts a retrain, what does not, and exactly where each rule ends."""

import itertools
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monitoring import trigger
from monitoring.trigger import Situation, claim, decide, history, pending, persistent, take
from tests.verdicts import AS_OF, data_test, outcome, verdict

CALM = Situation(next_slot=AS_OF + timedelta(days=400))
HOUR = timedelta(hours=1)
AGE = ("age",)


def at(hours):
    return AS_OF + timedelta(hours=hours)


def ask(state, hours=0.0, situation=CALM, version="7", **changes):
    """Decide on a drift that persists."""
    return decide(verdict(hours, AGE, version, **changes), [verdict(hours - 1, AGE, version)], situation, state)


def test_no_drift_is_logged_with_its_reason_and_asks_for_nothing(tmp_path):
    decision = decide(verdict(), [], CALM, tmp_path)
    assert (decision.action, decision.cause, decision.reason) == ("none", "", "0 of 3 columns drifted")
    assert history(tmp_path) == [decision]
    assert take(tmp_path) is None


def test_drift_that_persists_asks_once_and_is_taken_once(tmp_path):
    decision = ask(tmp_path)
    assert (decision.action, decision.cause, decision.key) == ("retrain", "drift", "7@2026-03-03")
    assert decision.reason == "Drift persists (population): age"
    assert decision.retrain_as_of == decision.as_of == AS_OF.isoformat()
    assert pending(tmp_path) == decision
    assert take(tmp_path) == decision
    assert take(tmp_path) is None
    assert pending(tmp_path) is None


# Persistence: this check and at least one of the two before it, column by column.


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ([], ()),
        ([verdict(-1)], ()),
        ([verdict(-1, AGE)], AGE),
        ([verdict(-1), verdict(-2, AGE)], AGE),
        ([verdict(-2, AGE), verdict(-1)], AGE),  # in any order
        ([verdict(-1), verdict(-2), verdict(-3, AGE)], ()),  # the fourth is too long ago
        ([verdict(-1, ("genre",)), verdict(-2, ("genre",))], ()),  # another column
        ([verdict(-1, AGE, version="6")], ()),  # another model
        ([verdict(-1, version="6"), verdict(-2, AGE)], AGE),
        ([verdict(0, AGE)], ()),  # the same instant is the same check
        ([verdict(1, AGE)], ()),
        ([verdict(-1, AGE), verdict(-1, AGE)], AGE),
        ([verdict(-1), verdict(-1), verdict(-2, AGE)], AGE),  # one check an instant
        ([replace(verdict(-1, AGE), drifted=False)], ()),  # a window that was too small to tell
        ([verdict(-1, AGE, broken={"genre": "is gone"})], ()),  # broken data confirms nothing
        ([verdict(-1, broken={"genre": "is gone"}), verdict(-2), verdict(-3, AGE)], ()),  # but takes its place
    ],
)
def test_drift_persists_in_two_of_the_last_three_checks_of_the_model(before, found):
    assert persistent(verdict(0, AGE), before) == found


def test_drift_that_is_over_does_not_persist(tmp_path):
    assert persistent(verdict(0), [verdict(-1, AGE), verdict(-2, AGE)]) == ()


def test_first_drift_waits_until_it_persists(tmp_path):
    decision = decide(verdict(0, AGE), [verdict(-1)], CALM, tmp_path)
    assert (decision.action, decision.cause) == ("none", "")
    assert "in one of the last 3 checks only" in decision.reason


def test_lost_quality_that_persists_asks_for_a_retrain(tmp_path):
    lost, kept = outcome(lost=True), outcome(lost=False)
    first = decide(verdict(0, outcome=lost), [verdict(-1, outcome=kept), verdict(-2)], CALM, tmp_path)
    assert first.action == "none" and "before it persists" in first.reason
    again = decide(verdict(2, outcome=lost), [verdict(1, outcome=kept), verdict(0, outcome=lost)], CALM, tmp_path)
    assert (again.action, again.cause) == ("retrain", "quality")
    assert again.reason == "Lost quality persists: HIT@3/save is 0.31, 0.40 is expected"


# Broken data.

BROKEN = {
    "a broken column": {"broken": {"age": "is missing in 100 % of the rows"}},
    "a kind": {"kind": "broken"},
    "a failed data test": {"data": (data_test(True), data_test(False))},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("missed", [None, at(-5)])
def test_broken_data_never_starts_a_retrain(tmp_path, changes, missed):
    decision = ask(tmp_path, situation=replace(CALM, missed_slot=missed), outcome=outcome(lost=True), **changes)
    assert decision.action == "none"
    assert decision.reason.startswith("Broken data is repaired, not trained on: ")
    assert ask(tmp_path).action == "retrain"  # the same instant, once the data is whole


# One at a time, and not too often.


def test_retrain_that_runs_holds_all_others(tmp_path):
    busy = replace(CALM, running="2026-03-03T110000-drift", held=5)
    assert ask(tmp_path, situation=busy).action == "none"
    missed = ask(tmp_path, 1, replace(busy, missed_slot=at(-5)))
    assert (missed.action, missed.cause) == ("none", "slot")
    assert all("a retrain runs (2026-03-03T110000-drift)" in d.reason for d in history(tmp_path))


def test_request_that_waits_is_not_made_again(tmp_path):
    ask(tmp_path)
    later = ask(tmp_path, 35)
    assert (later.action, later.cause) == ("none", "drift")
    assert "already asked for (by the check of 2026-03-03 12:00 UTC)" in later.reason


def test_cooldown_holds_until_its_last_second(tmp_path):
    ask(tmp_path)
    take(tmp_path)
    early = ask(tmp_path, 36 - 1 / 3600, version="8")
    assert early.action == "none"
    assert "less than 36 h ago" in early.reason
    assert ask(tmp_path, 36, version="8").action == "retrain"


def test_cooldown_holds_though_a_wrong_clock_put_the_request_into_the_future(tmp_path):
    ask(tmp_path, 30)
    take(tmp_path)
    set_right = replace(CALM, now=at(0))
    assert "less than 36 h ago" in ask(tmp_path, 0, set_right).reason


def test_budget_of_two_early_retrains_in_seven_days(tmp_path):
    for hours in (0, 60):
        assert ask(tmp_path, hours).action == "retrain"
        take(tmp_path)
    third = ask(tmp_path, 7 * 24 - 1 / 3600)
    assert third.action == "none"
    assert "the budget of 2 early retrains in 7 days is spent" in third.reason
    assert ask(tmp_path, 7 * 24).action == "retrain"


def test_slots_do_not_spend_the_budget(tmp_path):
    for days in (-6, -5, -4):
        ask(tmp_path, days * 24, replace(CALM, missed_slot=at(days * 24 - 1)))
    assert [d.cause for d in history(tmp_path) if d.action == "retrain"] == ["slot"] * 3
    assert ask(tmp_path).action == "retrain"


def test_slot_that_is_near_makes_an_early_retrain_pointless(tmp_path):
    decision = ask(tmp_path / "near", situation=Situation(at(6)))
    assert decision.action == "none"
    assert "the slot of 2026-03-03 18:00 UTC is at most 6 h away" in decision.reason
    assert ask(tmp_path / "far", situation=Situation(at(6) + timedelta(seconds=1))).action == "retrain"


def test_retrain_that_just_ended_makes_another_pointless(tmp_path):
    after = replace(CALM, last_retrain=at(-6) + timedelta(seconds=1))
    assert "learned up to less than 6 h ago" in ask(tmp_path / "just", situation=after).reason
    assert ask(tmp_path / "before", situation=replace(CALM, last_retrain=at(-6))).action == "retrain"


def test_retrain_held_twice_goes_to_a_person_instead_of_asking_again(tmp_path):
    assert ask(tmp_path / "once", situation=replace(CALM, held=1)).action == "retrain"
    twice = ask(tmp_path / "twice", situation=replace(CALM, held=2))
    assert (twice.action, twice.cause, twice.retrain_as_of) == ("escalate", "drift", "")
    assert "the gate held the last 2 retrains: a person must look" in twice.reason
    assert take(tmp_path / "twice") is None
    assert decide(verdict(1), [], replace(CALM, held=2), tmp_path / "twice").action == "none"  # nothing to ask for


# Requests that nobody will do any more.


def test_request_lapses_when_nobody_did_it_in_36_hours(tmp_path):
    first = ask(tmp_path)
    assert "already asked for" in ask(tmp_path, 36 - 1 / 3600).reason
    second = ask(tmp_path, 36)
    assert (second.action, second.key) == ("retrain", "7@2026-03-05")
    assert pending(tmp_path) == second != first


def test_requests_by_a_clock_that_ran_a_month_ahead_block_nothing_once_it_is_right(tmp_path):
    assert ask(tmp_path, 720).action == "retrain"
    assert decide(verdict(800), [], replace(CALM, missed_slot=at(0)), tmp_path).cause == "slot"
    now = replace(CALM, now=at(2))
    assert ask(tmp_path, 2, now).action == "retrain"  # nor does one of that month spend this week's budget
    assert decide(verdict(3), [], replace(now, missed_slot=at(0), now=at(3)), tmp_path).action == "retrain"


def test_budget_counts_the_requests_of_every_champion(tmp_path):
    for day, version in enumerate("789"):
        asked = ask(tmp_path, 48 * day, version=version)
        take(tmp_path)
    assert asked.action == "none" and "the budget of 2 early retrains in 7 days is spent" in asked.reason
    assert ask(tmp_path, 7 * 24, version="9").action == "retrain"


def test_later_check_that_sees_the_need_takes_up_the_request_that_nobody_began(tmp_path):
    first = ask(tmp_path)
    later, calm, broken = (
        ask(tmp_path, 1),
        decide(verdict(2), [], CALM, tmp_path),
        ask(tmp_path, 3, broken={"a": "is gone"}),
    )
    assert (later.action, later.cause) == ("none", "drift")
    assert claim(calm, CALM, tmp_path, "run 2") is None and claim(broken, CALM, tmp_path, "run 2") is None
    assert claim(later, replace(CALM, running="a run"), tmp_path, "run 2") is None
    assert claim(later, CALM, tmp_path, "run 2") == first
    assert claim(first, CALM, tmp_path, "run 1") is None
    assert claim(ask(tmp_path, 4), CALM, tmp_path, "run 3") is None
    take(tmp_path)
    assert claim(later, CALM, tmp_path, "run 2") is None


def test_request_for_a_model_that_serves_no_longer_lapses(tmp_path):
    ask(tmp_path)
    decide(verdict(1, version="8"), [], replace(CALM, running="a run"), tmp_path)
    assert pending(tmp_path)  # it may be this run
    decide(verdict(2, version="8"), [], CALM, tmp_path)
    assert pending(tmp_path) is None


@pytest.mark.parametrize(("ended", "waits"), [(at(0), True), (at(0) + timedelta(seconds=1), False)])
def test_request_lapses_when_a_later_retrain_has_ended(tmp_path, ended, waits):
    ask(tmp_path)
    decide(verdict(2), [], replace(CALM, last_retrain=ended), tmp_path)
    assert bool(pending(tmp_path)) is waits


def test_request_is_started_by_who_came_first_until_it_is_done(tmp_path):
    early = ask(tmp_path)
    assert not claim(early, replace(CALM, running="a run"), tmp_path, "run 1")
    assert claim(early, CALM, tmp_path, "run 1")
    assert not claim(early, CALM, tmp_path, "run 2")
    assert claim(early, CALM, tmp_path, "run 1")  # killed, and started again
    take(tmp_path)
    assert not claim(early, CALM, tmp_path, "run 1")
    assert not claim(decide(verdict(3), [], CALM, tmp_path), CALM, tmp_path, "run 1")
    assert len(history(tmp_path)) == 2


def test_missed_slot_is_started_by_who_came_first_while_it_is_missed(tmp_path):
    missed = replace(CALM, missed_slot=at(1))
    slot = ask(tmp_path, 2, missed)
    assert claim(slot, missed, tmp_path, "run 1")
    assert not claim(slot, missed, tmp_path, "run 2")
    assert not claim(slot, CALM, tmp_path, "run 1")
    again = ask(tmp_path, 2 + 36, missed)  # run 1 never ended
    assert again.key == slot.key
    assert claim(again, missed, tmp_path, "run 2")


def test_request_that_lapsed_is_not_started_late(tmp_path):
    first, second = ask(tmp_path), ask(tmp_path, 36)
    assert not claim(first, CALM, tmp_path, "run 1")
    assert claim(second, CALM, tmp_path, "run 2")


# Slots.


def test_missed_slot_is_caught_up_once_as_of_the_slot(tmp_path):
    missed = replace(CALM, missed_slot=at(-9), held=3)
    first = decide(verdict(0), [], missed, tmp_path)
    assert (first.action, first.cause, first.key) == ("retrain", "slot", "slot@2026-03-03T03:00")
    assert first.retrain_as_of == at(-9).isoformat()
    assert pending(tmp_path) is None  # an early retrain is another matter
    again = decide(verdict(1), [], missed, tmp_path)
    assert (again.action, again.cause) == ("none", "slot")
    assert "was asked for by the check of 2026-03-03 12:00 UTC" in again.reason
    assert decide(verdict(2), [], replace(missed, missed_slot=at(1)), tmp_path).action == "retrain"  # the next slot


def test_slot_that_is_still_missed_is_asked_for_again_after_36_hours(tmp_path):
    missed = replace(CALM, missed_slot=at(-9))
    decide(verdict(0), [], missed, tmp_path)
    assert decide(verdict(36 - 1 / 3600), [], missed, tmp_path).action == "none"
    assert decide(verdict(36), [], missed, tmp_path).action == "retrain"


def test_missed_slot_goes_before_drift(tmp_path):
    missed = replace(CALM, missed_slot=at(-9))
    assert ask(tmp_path, 0, missed).cause == "slot"
    assert ask(tmp_path, 1, missed).cause == "slot"  # while it is caught up, nothing else starts
    assert ask(tmp_path, 2).cause == "drift"


# Clocks.


def test_check_far_ahead_of_the_clock_decides_nothing(tmp_path):
    now = replace(CALM, now=at(0))
    ahead = ask(tmp_path, 1 + 1 / 3600, now)
    assert (ahead.action, ahead.skewed) == ("none", True)
    assert ahead.reason == (
        "2026-03-03 13:00 UTC is more than 1 h ahead of the clock (2026-03-03 12:00 UTC): this check decides nothing"
    )
    assert ask(tmp_path, 1, now).action == "retrain"  # at the bound, and not measured by the one that was ahead


def test_check_before_the_last_decision_decides_nothing(tmp_path):
    decide(verdict(0), [], CALM, tmp_path)
    before = ask(tmp_path, -1 / 3600, replace(CALM, missed_slot=at(-9)))
    assert (before.action, before.skewed) == ("none", True)
    assert "is before the check that was decided on last (2026-03-03 12:00 UTC)" in before.reason
    assert ask(tmp_path).action == "retrain"  # the same instant


def test_clock_that_ran_ahead_and_was_set_right_does_not_stop_the_trigger(tmp_path):
    decide(verdict(24 * 30), [], replace(CALM, now=at(24 * 30)), tmp_path)
    assert ask(tmp_path, 0, replace(CALM, now=at(0))).action == "retrain"


def test_decisions_that_were_skewed_are_not_what_later_checks_are_measured_by(tmp_path):
    decide(verdict(0), [], CALM, tmp_path)
    decide(verdict(-48), [], CALM, tmp_path)
    assert decide(verdict(-24), [], CALM, tmp_path).skewed


# Whatever comes.

checks = st.lists(
    st.tuples(
        st.sampled_from([-30, -1, 0, 0.5, 1, 1, 1, 2, 7, 40]),  # hours since the check before
        st.sampled_from(["calm", "drift", "drift", "drift", "lost", "broken", "test"]),
        st.sampled_from(["7", "7", "7", "8"]),  # the model that serves
        st.sampled_from([0, 0, 0, 1, 2]),  # held
        st.sampled_from(["", "", "", "a run"]),
        st.booleans(),  # whether a slot is missed
        st.booleans(),  # whether the request is taken
    ),
    max_size=60,
)
FOUND = {
    "calm": {},
    "drift": {"drifted": AGE},
    "lost": {"outcome": outcome(lost=True)},
    "broken": {"drifted": AGE, "broken": {"age": "is gone"}},
    "test": {"drifted": AGE, "data": (data_test(False),)},
}


def check_of(hours, kind, version):
    changes = dict(FOUND[kind])
    return verdict(hours, changes.pop("drifted", ()), version, **changes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checks)
def test_no_sequence_of_checks_passes_the_budget_the_cooldown_or_broken_data(tmp_path_factory, sequence):
    state, hours, past, made = tmp_path_factory.mktemp("state"), 0.0, [], []
    for step, kind, version, held, running, missed, taken in sequence:
        hours += step
        slot = at(hours - 2).replace(minute=0) if missed else None
        check = check_of(hours, kind, version)
        situation = Situation(at(hours + 12), slot, held, running)
        decision = decide(check, past, situation, state)
        past = [check, *past]
        if decision not in made:
            made.append(decision)
            if decision.action == "retrain":
                assert kind not in ("broken", "test") and not running
        if taken:
            take(state)
    assert history(state) == made
    early = [d.instant for d in made if d.early]
    assert len({d.key for d in made if d.early}) == len(early)
    for one, other in itertools.combinations(early, 2):
        assert abs(one - other) >= trigger.COOLDOWN
    for one in early:
        assert sum(timedelta(0) <= other - one < trigger.BUDGET_SPAN for other in early) <= trigger.BUDGET
    slots = [(d.retrain_as_of, d.instant) for d in made if d.cause == "slot" and d.action == "retrain"]
    for (slot, one), (other_slot, other) in itertools.combinations(slots, 2):
        assert slot != other_slot or abs(one - other) >= trigger.COOLDOWN
