"""What runs when: every slot once, whatever the machine, its clock and its zone do."""

import os
import random
import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement.slots import latest_hour, latest_slot, previous_slots, slots
from pipelines.schedule import WRONG_CLOCK, credible, due, schedule, skipped

RETRAIN, REFRESH, MONITOR = schedule()
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
ZONES = ("America/New_York", "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Kathmandu")


def test_cron_has_six_fields_and_names_the_slots():
    assert [e.cron for e in schedule()] == ["0 5 3 * * 1,4", "0 10 * * * *", "0 20 * * * *"]


def test_a_retrains_instants_are_the_slots():
    slot = datetime(2026, 11, 19, 3, tzinfo=UTC)
    assert RETRAIN.newest(slot + 5 * MINUTE) == slot == latest_slot(slot)
    assert RETRAIN.newest(slot + 5 * MINUTE - timedelta(microseconds=1)) == previous_slots(slot, 1)[0]
    assert RETRAIN.following(slot) == slot  # it starts five minutes later
    assert RETRAIN.following(slot + 5 * MINUTE) == datetime(2026, 11, 23, 3, tzinfo=UTC)


def test_runs_that_start_in_one_hour_start_one_after_the_other():
    starts = [e.starts(datetime(2026, 11, 19, 3, tzinfo=UTC)) for e in schedule()]
    assert all(b - a >= 5 * MINUTE for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("seed", range(3))
def test_through_a_year_of_random_outages_every_slot_runs_once_or_is_told_as_skipped(seed):
    draw = random.Random(seed)
    now, last, ran, left_out = START, RETRAIN.newest(START - timedelta(days=9)), [], 0
    first = last
    while now < END:
        if draw.random() < 0.02:  # the machine is off: minutes, or weeks
            now += timedelta(minutes=draw.choice([3, 200, 4000, 30000]))
        instant = due(RETRAIN, now, last)
        if instant:
            left_out += skipped(RETRAIN, now, last)
            ran.append(instant)
            last = instant
        now += HOUR * draw.random() * 2
    assert ran == sorted(set(ran)) and set(ran) <= set(slots(first, ran[-1]))
    assert len(ran) + left_out == len(slots(first, ran[-1])) - 1  # the first was done before
    assert left_out > 0 and len(ran) > 40


@given(st.lists(st.timedeltas(timedelta(0), timedelta(days=12)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=50)
def test_an_hourly_entry_runs_once_for_the_newest_hour_after_any_gap(gaps):
    now, last = START, REFRESH.newest(START)
    for gap in gaps:
        now += gap
        newest, instant = latest_hour(now - 10 * MINUTE), due(REFRESH, now, last)
        assert instant == (newest if newest > last else None)
        if instant:
            assert skipped(REFRESH, now, last) == (instant - last) // HOUR - 1
            last = instant
        assert due(REFRESH, now, last) is None


@pytest.mark.parametrize("zone", ZONES)
def test_summer_time_of_the_machines_zone_moves_nothing(zone, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for entry, step in ((RETRAIN, 5 * HOUR), (MONITOR, HOUR)):
            last, ran, now = entry.newest(START), [], START
            while now < END:
                wall = datetime.fromtimestamp(now.timestamp()).astimezone(ZoneInfo(zone))  # as the machine shows it
                if instant := due(entry, wall, last):
                    assert instant.utcoffset() == timedelta(0) and skipped(entry, wall, last) == 0
                    ran.append(instant)
                    last = instant
                now += step
            every = slots(START, END) if entry is RETRAIN else [START + n * HOUR for n in range(len(ran))]
            assert ran == every[: len(ran)] and len(ran) >= (103 if entry is RETRAIN else 8758)
    finally:
        os.environ.pop("TZ")
        time.tzset()


def test_clock_that_goes_back_an_hour_runs_nothing_twice():
    last = datetime(2026, 11, 19, 14, tzinfo=UTC)
    back = last - HOUR + 20 * MINUTE
    assert [due(MONITOR, back + minutes * MINUTE, last) for minutes in range(120)] == [None] * 120
    assert due(MONITOR, back + 120 * MINUTE, last) == last + HOUR


def test_run_dated_by_a_clock_that_was_years_ahead_blocks_nothing():
    now, wrong = datetime(2026, 11, 19, 14, 30, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC)
    instant = due(MONITOR, now, wrong)
    assert instant == datetime(2026, 11, 19, 14, tzinfo=UTC) and skipped(MONITOR, now, wrong) == 0
    assert due(MONITOR, now + HOUR, instant) == instant + HOUR


@pytest.mark.parametrize("ahead, believed", [(WRONG_CLOCK, True), (WRONG_CLOCK + timedelta(microseconds=1), False)])
def test_a_clock_is_wrong_when_it_was_more_than_a_day_ahead(ahead, believed):
    now = datetime(2026, 11, 19, 14, 30, tzinfo=UTC)
    assert (credible(now, now + ahead) is not None) is believed


def test_lost_memory_costs_one_run_of_each_entry():
    now = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)
    for entry in schedule():
        instant = due(entry, now, None)
        assert instant == entry.newest(now) and skipped(entry, now, None) == 0
        assert due(entry, now, instant) is None


def test_entry_says_when_it_runs_for_a_person():
    assert [entry.when for entry in schedule()] == ["Mon, Thu 03:05 UTC", "every hour at :10", "every hour at :20"]
