"""What runs when. This file is the one place that says so; the laptop and Kubeflow both follow it.

Everything is UTC, so that no machine's zone and no summer time moves a run. An entry has *instants* (slots, or full
hours): what a run is asked to know, its `as_of`. It starts some minutes later, so that the log holds the rows of the
last minutes, two clocks that differ agree on which instant it is, and two entries do not start at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile

from engagement.slots import SLOT_HOUR, SLOT_WEEKDAYS

HOUR = timedelta(hours=1)
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
EVERY_DAY, EVERY_HOUR = tuple(range(7)), tuple(range(24))

WRONG_CLOCK = timedelta(days=1)
"""A last run dated more than this (>) after now was dated by a clock that was wrong: it counts as unknown.

A smaller step back is a correction: what ran does not run again, and the clock soon comes there."""


@dataclass(frozen=True)
class Entry:
    """One line of the schedule.

    Attributes:
        name: Names the entry and its compiled pipeline.
        pipeline: The compiled pipeline that it runs on Kubeflow.
        says: What it does, for a person.
        weekdays: Days of its instants; Monday is 0.
        hours: Hours of its instants, UTC.
        minute: Minutes after an instant at which its run starts.
    """

    name: str
    pipeline: str
    says: str
    weekdays: tuple[int, ...]
    hours: tuple[int, ...]
    minute: int

    @property
    def cron(self) -> str:
        """When it starts, in the six fields of Kubeflow: second, minute, hour, day, month, weekday (Sunday is 0)."""
        hours = "*" if self.hours == EVERY_HOUR else ",".join(str(h) for h in self.hours)
        days = "*" if self.weekdays == EVERY_DAY else ",".join(str((d + 1) % 7) for d in self.weekdays)
        return f"0 {self.minute} {hours} * * {days}"

    @property
    def when(self) -> str:
        """Likewise, for a person: `Mon, Thu 03:05 UTC`, `every hour at :10`."""
        if self.hours == EVERY_HOUR:
            times = f"every hour at :{self.minute:02}"
        else:
            times = ", ".join(f"{hour:02}:{self.minute:02}" for hour in self.hours) + " UTC"
        days = "" if self.weekdays == EVERY_DAY else ", ".join(DAYS[day] for day in self.weekdays) + " "
        return days + times

    def starts(self, instant: datetime) -> datetime:
        """When the run for an instant starts."""
        return instant + timedelta(minutes=self.minute)

    def newest(self, now: datetime) -> datetime:
        """The newest instant whose start is at or before `now`."""
        return next(self._hours((now.astimezone(UTC) - timedelta(minutes=self.minute)), -HOUR))

    def following(self, now: datetime) -> datetime:
        """The first instant whose start is later than `now`."""
        return next(self._hours(self.newest(now) + HOUR, HOUR))

    def between(self, first: datetime, last: datetime) -> int:
        """How many instants lie between two others, both left out."""
        return sum(1 for _ in takewhile(lambda instant: instant < last, self._hours(first + HOUR, HOUR)))

    def _hours(self, start: datetime, step: timedelta) -> Iterator[datetime]:
        hour = start.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        while True:
            if hour.weekday() in self.weekdays and hour.hour in self.hours:
                yield hour
            hour += step


def schedule() -> tuple[Entry, ...]:
    """What runs by itself, in the order in which one hour's runs start."""
    return (
        Entry("retrain", "slot", "retrain, judge, register, roll out", SLOT_WEEKDAYS, (SLOT_HOUR,), minute=5),
        Entry("refresh", "refresh", "bring served features up to the log", EVERY_DAY, EVERY_HOUR, minute=10),
        Entry("monitor", "monitor", "check for drift; retrain early if it lasts", EVERY_DAY, EVERY_HOUR, minute=20),
    )


def due(entry: Entry, now: datetime, last: datetime | None) -> datetime | None:
    """The instant that is to be run now, if any: the newest, once, however many were missed.

    Args:
        entry: The entry.
        now: The present instant, aware.
        last: The instant of its last run; None if nobody knows of one.
    """
    newest, last = entry.newest(now), credible(now, last)
    return newest if last is None or newest > last else None


def skipped(entry: Entry, now: datetime, last: datetime | None) -> int:
    """How many instants were missed since the last run, for which the run that is due now stands."""
    last = credible(now, last)
    return entry.between(last, entry.newest(now)) if last else 0


def credible(now: datetime, last: datetime | None) -> datetime | None:
    """The last run's instant; None if it was dated by a clock that was wrong."""
    return None if last is None or last - now > WRONG_CLOCK else last
