"""When a circuit breaker opens, tries and closes: each rule on both sides of its boundary."""

import pytest

from serving.breaker import BAD_SHARE, CALLS, OPEN_SECONDS, PROBES, WINDOW_CALLS, WINDOW_SECONDS, Breaker, State


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker("a-test", clock)


def call(breaker, *bad):
    for one in bad:
        breaker.record(breaker.admit(), one)


def opened(breaker):
    call(breaker, *[True] * CALLS)
    assert breaker.state == State.OPEN
    return breaker


def test_too_few_calls_open_nothing_and_one_more_does(breaker):
    call(breaker, *[True] * (CALLS - 1))
    assert breaker.state == State.CLOSED
    call(breaker, True)
    assert breaker.state == State.OPEN and breaker.admit() is None


def test_the_share_of_bad_calls_opens_it_from_half_on(breaker):
    most = CALLS - int(BAD_SHARE * CALLS)
    call(breaker, *[False] * most, *[True] * (CALLS - most - 1), False)
    assert breaker.state == State.CLOSED  # 4 of 10
    call(breaker, True, True)
    assert breaker.state == State.OPEN  # 6 of 12


def test_calls_are_forgotten_when_the_window_has_passed(breaker, clock):
    call(breaker, *[True] * (CALLS - 1))
    clock.now = WINDOW_SECONDS
    call(breaker, True)
    assert breaker.state == State.CLOSED
    clock.now = 2 * WINDOW_SECONDS - 0.01
    call(breaker, *[True] * (CALLS - 1))
    assert breaker.state == State.OPEN


def test_only_the_last_calls_count_however_many_went_well_before(breaker):
    call(breaker, *[False] * 1000, *[True] * (WINDOW_CALLS // 2 - 1))
    assert breaker.state == State.CLOSED  # 9 of the last 20
    call(breaker, True)
    assert breaker.state == State.OPEN


def test_it_is_left_alone_until_its_time_and_then_tried_by_one_call_at_a_time(breaker, clock):
    opened(breaker)
    clock.now = OPEN_SECONDS - 0.01
    assert breaker.state == State.OPEN and breaker.admit() is None
    clock.now = OPEN_SECONDS
    probe = breaker.admit()
    assert probe.probe and breaker.state == State.HALF_OPEN
    assert breaker.admit() is None
    breaker.record(probe, bad=False)
    assert breaker.admit().probe


def test_enough_good_probes_close_it_and_the_past_is_forgotten(breaker, clock):
    opened(breaker)
    clock.now = OPEN_SECONDS
    call(breaker, *[False] * (PROBES - 1))
    assert breaker.state == State.HALF_OPEN
    call(breaker, False)
    assert breaker.state == State.CLOSED and not breaker.admit().probe
    call(breaker, *[True] * (CALLS - 1))
    assert breaker.state == State.CLOSED


def test_one_bad_probe_opens_it_for_the_whole_time_again(breaker, clock):
    opened(breaker)
    clock.now = OPEN_SECONDS
    call(breaker, *[False] * (PROBES - 1), True)
    clock.now = 2 * OPEN_SECONDS - 0.01
    assert breaker.admit() is None
    clock.now = 2 * OPEN_SECONDS
    assert breaker.admit().probe


def test_calls_that_end_late_say_nothing_about_the_state_that_came_after(breaker, clock):
    late = [breaker.admit() for _ in range(CALLS)]
    opened(breaker)
    clock.now = OPEN_SECONDS
    probe = breaker.admit()
    for ticket in late:
        breaker.record(ticket, bad=True)
    assert breaker.state == State.HALF_OPEN and breaker.admit() is None  # still the one probe
    breaker.record(probe, bad=False)
    call(breaker, *[False] * (PROBES - 1))
    for ticket in late:
        breaker.record(ticket, bad=True)
    assert breaker.state == State.CLOSED
