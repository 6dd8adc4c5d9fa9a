"""What the serving log says of serving: counted by request, live users alone, and no alarm from a handful."""

from datetime import timedelta

import pytest

from engagement.served import read
from monitoring.health import answers, health
from tests.served_lab import AT, failed, served, write

DAY = timedelta(days=1)


def told(directory, *logged):
    write(directory, *logged)
    return health(answers(directory, AT - DAY, AT + DAY))


def test_nothing_logged_and_nobody_live_is_no_verdict(tmp_path):
    assert health(answers(tmp_path, AT - DAY, AT + DAY)) is None
    assert told(tmp_path, served(0, purpose="shadow"), served(1, purpose="replay")) is None


def test_requests_are_counted_not_their_candidates(tmp_path):
    found = told(
        tmp_path,
        *(served(i, items=tuple("abcdefgh"[: 1 + i % 8])) for i in range(90)),
        *(failed(90 + i) for i in range(10)),
    )
    assert (found.requests, found.errors) == (100, 0.1)
    rows = read(tmp_path, AT - DAY, AT + DAY)
    assert rows.height > 400 and health(rows) == found  # the whole log says the same


def test_errors_shed_and_fallbacks_are_told_apart_each_with_its_limit(tmp_path):
    logged = [served(i) for i in range(480)]
    logged += [failed(500 + i, status=500) for i in range(5)] + [failed(510 + i, status=503) for i in range(5)]
    logged += [failed(520 + i, status=429) for i in range(15)] + [failed(540 + i, status=504) for i in range(15)]
    logged += [served(600 + i, degraded="cached") for i in range(15)]
    logged += [served(700 + i, degraded="popularity") for i in range(15)]
    found = told(tmp_path, *logged)
    assert found.requests == 550
    assert found.errors == pytest.approx(10 / 550) and found.shed == pytest.approx(30 / 550)
    assert found.fallbacks == {"cached": pytest.approx(15 / 510), "popularity": pytest.approx(15 / 510)}
    errors, shed, fallbacks = found.problems
    assert "1.8% of 550 requests failed" in errors and "turned away" in shed
    assert "5.9% of 510 answers had no fresh features" in fallbacks and "cached" in fallbacks


def test_limits_are_reached_exactly_and_not_by_a_handful(tmp_path):
    exactly = [served(i) for i in range(495)] + [failed(500 + i) for i in range(5)]
    assert len(told(tmp_path / "exactly", *exactly).problems) == 1
    handful = [served(i) for i in range(20)] + [failed(50 + i) for i in range(4)]
    assert told(tmp_path / "handful", *handful).problems == ()


def test_slow_answers_are_a_problem_and_slow_failures_are_none(tmp_path):
    quick = [served(i, latency_ms=10.0) for i in range(495)]
    slow = told(tmp_path / "slow", *quick, *(served(500 + i, latency_ms=500.0) for i in range(10)))
    assert (slow.p50_ms, slow.p99_ms) == (10.0, 500.0) and "500 ms or more" in slow.problems[0]
    hung = told(tmp_path / "hung", *quick, *(failed(500 + i, status=504, latency_ms=9000.0) for i in range(4)))
    assert hung.p99_ms == 10.0 and hung.problems == ()


def test_only_failures_have_no_latency(tmp_path):
    found = told(tmp_path, *(failed(i) for i in range(10)))
    assert (found.errors, found.p50_ms, found.p99_ms, found.fallbacks) == (1.0, None, None, {})


def test_requests_outside_of_the_window_and_damaged_files_are_passed_over(tmp_path):
    write(tmp_path, served(0), served(1, at=AT + 3 * DAY), served(2, at=AT - 2 * DAY))
    day = next(tmp_path.glob("date=*"))
    (day / "9999999999999999-torn.parquet").write_bytes(b"PAR1 torn")
    assert health(answers(tmp_path, AT - DAY, AT + DAY)).requests == 1
