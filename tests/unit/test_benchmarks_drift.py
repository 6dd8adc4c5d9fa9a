"""The streams that judge the drift monitors hold what they say, and the judge counts as it says."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from benchmarks.drift.alarms import SLOT, may_retrain
from benchmarks.drift.feed import SPEC
from benchmarks.drift.judge import QUIET, Run, Said, judge, twice, until_quiet
from benchmarks.drift.streams import END, EVERY, START, TRAIN, Truth, stream
from engagement.table import micros

ONSET = START + TRAIN + timedelta(days=10, hours=2)
CHECKS = [START + TRAIN + (i + 1) * EVERY for i in range(112)]
FIRST = next(i for i, end in enumerate(CHECKS) if end > ONSET)  # its window holds the onset


def said(*alarms: int, kind: str = "behaviour", columns: tuple[str, ...] = ("a",)) -> tuple[Said, ...]:
    return tuple(Said(end.isoformat(), i in alarms, kind, columns) for i, end in enumerate(CHECKS))


def run(kind: str = "behaviour") -> Run:
    return Run("shock", 0, Truth(kind, ONSET, ONSET, ("a",), ""), (), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(("after", "delay"), [(0, 0), (1, 1), (2, 2), (9, 9)])
def test_delay_counts_windows_that_lie_behind_the_onset(after: int, delay: int) -> None:
    assert judge(run(), said(FIRST + after)).delay == delay


def test_alarms_in_a_row_are_one_false_alarm() -> None:
    judged = judge(run(), said(3, 4, 5, 20, FIRST))
    assert (judged.false, judged.delay) == (2, 0)


def test_a_stream_without_drift_is_quiet_for_its_whole_length() -> None:
    quiet = replace(run("none"), truth=Truth("none", ONSET, ONSET, (), ""))
    judged = judge(quiet, said(FIRST + 1))
    assert (judged.false, judged.quiet, judged.delay) == (1, END - START - TRAIN, None)


def test_kind_and_column_are_those_of_the_first_alarm() -> None:
    wrong = judge(run(), said(FIRST, kind="population", columns=("b", "a")))
    assert (wrong.kind, wrong.named) == (False, False)
    assert judge(run(), said(FIRST, columns=("new a",))).named


def test_twice_needs_one_of_the_two_checks_before() -> None:
    assert [s.alarm for s in twice(said(1, 3, 6, 7))[:8]] == [False, False, False, True, False, False, False, True]


def test_alarm_is_over_when_two_days_were_quiet() -> None:
    assert until_quiet(said()) == 0
    assert until_quiet(said(0, 3, 4, 40)) == 5
    assert until_quiet(said(*range(0, 112, QUIET))) == np.inf


def test_early_retrains_are_simulated_with_the_triggers_own_limits() -> None:
    slot, hour = START + TRAIN + SLOT, timedelta(hours=1)
    assert may_retrain(slot + 40 * hour, [slot])
    assert not may_retrain(slot + 30 * hour, [slot])  # cooldown
    assert not may_retrain(slot + SLOT - 5 * hour, [slot]) and not may_retrain(slot + SLOT + 5 * hour, [slot])
    assert not may_retrain(slot + 150 * hour, [slot + hour, slot + 40 * hour])  # budget of a week


def test_a_stream_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    one, same, other = stream("shock", 3), stream("shock", 3), stream("shock", 4)
    assert one.truth == same.truth != other.truth
    np.testing.assert_array_equal(one.table.item_num, same.table.item_num)


def test_a_check_sees_enough_rows_by_enough_users() -> None:
    made = stream("none", 0)
    windows = [made.window(end - EVERY, end) for end in CHECKS]
    assert np.median([w.table.rows for w in windows]) > 2_000
    assert min(len(np.unique(w.table.user_id)) for w in windows) > 50
    assert all(len(w.scores) == w.table.rows for w in windows)


def test_a_new_market_brings_its_share_of_requests_from_new_users() -> None:
    made = stream("market", 1)
    country = [f.name for f in SPEC.of("request", True)].index("user_profile__country")
    names = made.names["user_profile__country"]
    after = made.table.time >= micros(made.truth.onset)
    there = np.array([names[h] == "nl" for h in made.table.request_cat[:, country].tolist()])
    assert there[~after].mean() == 0
    assert there[after].mean() == pytest.approx(0.3 * 0.8, abs=0.06)


def test_a_slow_drift_has_its_size_at_the_onset() -> None:
    made = stream("slow", 2)
    assert made.truth.onset - made.truth.begin == timedelta(days=5)
    assert len(made.truth.columns) == 4


def test_labels_come_late_only_where_the_stream_says_so() -> None:
    usual, late = stream("none", 0), stream("delay", 1)
    assert np.median(usual.known - usual.table.time) < 3 * 3_600_000_000
    after = (late.table.time >= micros(late.truth.onset)) & (
        late.table.time < micros(late.truth.onset) + 86_400_000_000
    )
    assert np.median((late.known - late.table.time)[after]) > 10 * 3_600_000_000
