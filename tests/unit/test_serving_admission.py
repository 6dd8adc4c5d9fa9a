"""Who is let in: the forecast follows the pace, low is shed first, and no limit is off by one."""

import pytest

from serving.admission import DEFAULT_DEADLINE, FIXED_WORK, MAX_DEADLINE, SHARES, Admission, ShedError, Terms
from serving.protocol import BadRequestError

CANDIDATES = 300
WORK = FIXED_WORK + CANDIDATES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(seconds: float) -> tuple[Admission, Clock]:
    """An admission that has seen requests of 300 candidates take so long, one after another."""
    clock = Clock()
    admission = Admission(clock)
    for _ in range(10):
        with admission.let_in(CANDIDATES, Terms()):
            clock.now += seconds
        clock.now += 7.0  # idle time is no work
    return admission, clock


def test_pace_is_the_busy_time_by_work_and_not_the_idle_time():
    admission, _ = paced(0.125)
    assert admission.forecast(CANDIDATES) == pytest.approx(0.125)
    assert admission.forecast(2 * CANDIDATES + FIXED_WORK) == pytest.approx(0.25)
    assert admission.queued == 0


def test_forecast_counts_what_is_queued_before():
    admission, _ = paced(0.125)
    with admission.let_in(CANDIDATES, Terms()), admission.let_in(CANDIDATES, Terms()):
        assert admission.queued == 2 * WORK
        assert admission.forecast(CANDIDATES) == pytest.approx(3 * 0.125)


def test_overlapping_requests_count_by_the_pace_at_which_they_leave():
    clock = Clock()
    admission = Admission(clock)
    for _ in range(200):  # two at a time, each there for 0.25 s, one leaves every 0.125 s
        with admission.let_in(CANDIDATES, Terms("high", 9)), admission.let_in(CANDIDATES, Terms("high", 9)):
            clock.now += 0.125
        clock.now += 0.0
    assert admission.forecast(CANDIDATES) == pytest.approx(0.0625, rel=0.05)


def test_pace_follows_a_server_that_becomes_slow():
    admission, clock = paced(0.01)
    for _ in range(60):
        with admission.let_in(CANDIDATES, Terms()):
            clock.now += 0.1
    assert admission.forecast(CANDIDATES) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("priority", SHARES)
def test_forecast_of_exactly_the_share_is_let_in_and_above_it_is_shed(priority):
    admission, _ = paced(0.125)
    deadline = 2 * 0.125 / SHARES[priority]
    with admission.let_in(CANDIDATES, Terms()):
        with pytest.raises(ShedError) as caught, admission.let_in(CANDIDATES, Terms(priority, deadline - 1e-6)):
            pass
        with admission.let_in(CANDIDATES, Terms(priority, deadline + 1e-9)):
            pass
    assert (caught.value.status, caught.value.priority, caught.value.retry_after) == (429, priority, 1)
    assert admission.queued == 0


def test_low_is_shed_before_normal_before_high():
    admission, _ = paced(0.125)
    let_in = dict.fromkeys(SHARES, 0)
    for priority in SHARES:
        held = []
        try:
            while True:
                entered = admission.let_in(CANDIDATES, Terms(priority, 2.0))
                entered.__enter__()
                held.append(entered)
        except ShedError:
            let_in[priority] = len(held)
        for entered in held:
            entered.__exit__(None, None, None)
        admission, _ = paced(0.125)
    assert 0 < let_in["low"] < let_in["normal"] < let_in["high"] <= 16


def test_idle_server_takes_whoever_comes_so_that_a_bad_pace_is_measured_again():
    admission, clock = paced(5.0)
    with admission.let_in(CANDIDATES, Terms("low", 0.5)):
        clock.now += 0.001
    assert admission.forecast(CANDIDATES) < 5.0


def test_retry_after_is_the_excess_in_whole_seconds():
    admission, _ = paced(2.0)
    with (
        admission.let_in(CANDIDATES, Terms()),
        pytest.raises(ShedError) as caught,
        admission.let_in(CANDIDATES, Terms("high", 1.0)),
    ):
        pass
    assert caught.value.retry_after == 4  # 4 s foretold, 0.8 s allowed
    assert "\n" not in str(caught.value)


def test_terms_are_read_from_headers_and_have_defaults():
    assert Terms.of({}) == Terms("normal", DEFAULT_DEADLINE)
    assert Terms.of({"x-priority": "low", "x-deadline-ms": "250"}) == Terms("low", 0.25)
    assert Terms.of({"x-deadline-ms": "1e9"}).deadline == MAX_DEADLINE
    assert Terms.of({"x-bucket": "9999", "x-purpose": "shadow"}) == Terms(purpose="shadow", bucket=9999)
    assert Terms.of({"x-bucket": "0"}).bucket == 0


@pytest.mark.parametrize("text", ["", "-1", "10000", "abc", "²", "1.5", "9" * 5000])
def test_bucket_that_is_none_is_refused(text):
    with pytest.raises(BadRequestError, match="x-bucket"):
        Terms.of({"x-bucket": text})


def test_purpose_that_is_none_is_refused():
    with pytest.raises(BadRequestError, match="x-purpose"):
        Terms.of({"x-purpose": "fun"})


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "1" * 400])
def test_deadline_that_is_none_is_refused(text):
    with pytest.raises(BadRequestError, match="x-deadline-ms"):
        Terms.of({"x-deadline-ms": text})


@pytest.mark.parametrize("text", ["urgent", "", "HIGH"])
def test_priority_that_is_none_is_refused(text):
    with pytest.raises(BadRequestError, match="x-priority"):
        Terms.of({"x-priority": text})
