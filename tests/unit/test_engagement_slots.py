"""Slots: Monday and Thursday 03:00 UTC."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engagement.slots import next_slot, previous_slots, slots

MONDAY = datetime(2024, 1, 1, 3, tzinfo=UTC)
THURSDAY = datetime(2024, 1, 4, 3, tzinfo=UTC)
instants = st.datetimes(datetime(1997, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))


def test_both_ends_of_the_range_are_included():
    assert slots(MONDAY, THURSDAY) == [MONDAY, THURSDAY]
    assert slots(MONDAY + timedelta(microseconds=1), THURSDAY - timedelta(microseconds=1)) == []


def test_next_is_strictly_later_and_previous_strictly_earlier():
    assert next_slot(MONDAY) == THURSDAY
    assert previous_slots(THURSDAY, 2) == [MONDAY, MONDAY - timedelta(days=4)]
    assert previous_slots(THURSDAY + timedelta(microseconds=1), 1) == [THURSDAY]


def test_another_time_zone_names_the_same_slots():
    tokyo = MONDAY.astimezone(timezone(timedelta(hours=9)))
    assert next_slot(tokyo) == THURSDAY and previous_slots(tokyo, 1) == [MONDAY - timedelta(days=4)]
    assert next_slot(tokyo).utcoffset() == timedelta(0)


@given(instants, st.integers(1, 9))
def test_slots_alternate_three_and_four_days_around_any_instant(instant, n):
    earlier, later = previous_slots(instant, n), next_slot(instant)
    chain = [*reversed(earlier), *([instant] if slots(instant, instant) else []), later]
    assert all(s.weekday() in (0, 3) and (s.hour, s.minute, s.second, s.microsecond) == (3, 0, 0, 0) for s in chain)
    assert all(b - a in (timedelta(days=3), timedelta(days=4)) for a, b in zip(chain, chain[1:], strict=False))
    assert slots(chain[0], chain[-1]) == chain


@pytest.mark.parametrize("n", [0, 1, 5])
def test_as_many_previous_slots_as_asked_for(n):
    assert len(previous_slots(MONDAY, n)) == n
