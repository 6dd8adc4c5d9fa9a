"""When the ranker is retrained: Monday and Thursday, 03:00 UTC."""

from datetime import UTC, datetime, timedelta

SLOT_WEEKDAYS = (0, 3)  # Monday, Thursday
SLOT_HOUR = 3  # UTC


def slots(start: datetime, end: datetime) -> list[datetime]:
    """Every slot in [start, end], both ends included, oldest first.

    Args:
        start: Aware instant.
        end: Aware instant.
    """
    found: list[datetime] = []
    slot = _at_or_after(start)
    while slot <= end:
        found.append(slot)
        slot = next_slot(slot)
    return found


def next_slot(after: datetime) -> datetime:
    """The first slot strictly later than `after`."""
    return _at_or_after(after + timedelta(microseconds=1))


def latest_slot(now: datetime) -> datetime:
    """The newest slot at or before `now`."""
    return previous_slots(now + timedelta(microseconds=1), 1)[0]


def latest_hour(now: datetime) -> datetime:
    """The newest full hour at or before `now`, UTC."""
    return now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def previous_slots(as_of: datetime, n: int) -> list[datetime]:
    """The last `n` slots strictly before `as_of`, newest first."""
    as_of = as_of.astimezone(UTC)
    day, found = as_of.date(), list[datetime]()
    while len(found) < n:
        slot = _on(datetime(day.year, day.month, day.day, tzinfo=UTC))
        if slot.weekday() in SLOT_WEEKDAYS and slot < as_of:
            found.append(slot)
        day -= timedelta(days=1)
    return found


def _at_or_after(instant: datetime) -> datetime:
    instant = instant.astimezone(UTC)
    slot = _on(instant)
    while slot < instant or slot.weekday() not in SLOT_WEEKDAYS:
        slot += timedelta(days=1)
    return slot


def _on(day: datetime) -> datetime:
    return day.replace(hour=SLOT_HOUR, minute=0, second=0, microsecond=0)
