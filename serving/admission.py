"""Who is let in: deadlines, and shedding by priority before the queue is so long that deadlines would be missed.

The waiting time of a request is foretold as (work queued + its own) x seconds a unit of work, where the latter is an
exponentially weighted mean over the last answers: the busy time since the answer before, by the work it stood for.
Little's law in the form that needs no model of the stages: whatever they do, and however they overlap, it is the pace
at which answers leave that says how long the queue takes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from serving.buckets import BUCKET_HEADER, BUCKETS
from serving.protocol import TOO_MANY, BadRequestError, RefusedError

Priority = Literal["high", "normal", "low"]
Purpose = Literal["live", "replay", "shadow"]
PRIORITY_HEADER, DEADLINE_HEADER, PURPOSE_HEADER = "x-priority", "x-deadline-ms", "x-purpose"
DEFAULT_DEADLINE = 1.0  # seconds, where the caller names none
MAX_DEADLINE = 10.0  # seconds; who names more gets this
# A request is shed when its foretold answer takes MORE than this share of its deadline (exactly as much is let in):
# what low gives up is there for normal, and what normal gives up for high. High keeps a margin too, since a forecast
# errs.
SHARES: Mapping[Priority, float] = {"high": 0.8, "normal": 0.6, "low": 0.4}
FIXED_WORK = 100  # what a request costs before its first candidate, in candidates
DECAY = 0.95  # weight of the past at each answer: the pace of the last 20 counts


class ShedError(RefusedError):
    """Too much is queued for this request: 429, with the seconds after which to try again."""

    def __init__(self, wait: float, over: float, priority: Priority) -> None:
        retry_after = max(1, math.ceil(over))
        super().__init__(
            TOO_MANY, f"overloaded: the answer would take {wait * 1000:.0f} ms; try again in {retry_after} s"
        )
        self.retry_after, self.priority = retry_after, priority


class LateError(RefusedError):
    """There is no answer within the deadline: 504."""

    def __init__(self, deadline: float) -> None:
        super().__init__(504, f"no answer within the deadline of {deadline * 1000:.0f} ms")


@dataclass(frozen=True)
class Terms:
    """What the caller asks for beside the ranking.

    Attributes:
        priority: Low is shed first.
        deadline: Seconds within which the answer must be there.
        purpose: For whom: a user (`live`), a rollout that replays the log, or one that compares two versions.
        bucket: The user's canary bucket; None where the caller knows none.
    """

    priority: Priority = "normal"
    deadline: float = DEFAULT_DEADLINE
    purpose: Purpose = "live"
    bucket: int | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> "Terms":
        """Read headers or gRPC metadata, by names in lower case.

        Raises:
            BadRequestError: A value is none of those that exist.
        """
        return cls(
            _word(headers, PRIORITY_HEADER, Priority, "normal"),
            _deadline(headers.get(DEADLINE_HEADER)),
            _word(headers, PURPOSE_HEADER, Purpose, "live"),
            _bucket(headers.get(BUCKET_HEADER)),
        )


def _word(headers: Mapping[str, str], name: str, known: Any, default: str) -> Any:
    word = headers.get(name, default)
    if word not in get_args(known):
        raise BadRequestError(f"{name} must be {', '.join(get_args(known))}")
    return word


def _deadline(text: str | None) -> float:
    try:
        deadline = DEFAULT_DEADLINE if text is None else float(text) / 1000
    except ValueError:
        deadline = math.nan
    if not 0 < deadline < math.inf:
        raise BadRequestError(f"{DEADLINE_HEADER} must be a number of milliseconds above 0")
    return min(deadline, MAX_DEADLINE)


def _bucket(text: str | None) -> int | None:
    if text is None:
        return None
    # Length first: Python refuses to read numbers of thousands of digits.
    if len(text) > len(str(BUCKETS)) or not (text.isascii() and text.isdigit()) or int(text) >= BUCKETS:
        raise BadRequestError(f"{BUCKET_HEADER} must be a whole number from 0 to {BUCKETS - 1}")
    return int(text)


class Admission:
    """Keeps count of the work that was let in and of the pace at which it gets done.

    Args:
        clock: Seconds; tests have their own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._queued = 0
        self._busy_since = 0.0  # when the pace was last measured, or when the first of the queued came
        self._seconds, self._work = 0.0, 0.0  # decaying sums

    @property
    def queued(self) -> int:
        """Work that was let in and is not answered."""
        return self._queued

    def forecast(self, candidates: int) -> float:
        """Seconds until a request that came now would be answered; 0 before the first answer."""
        pace = self._seconds / self._work if self._work else 0.0
        return (self._queued + FIXED_WORK + candidates) * pace

    @contextmanager
    def let_in(self, candidates: int, terms: Terms) -> Iterator[None]:
        """The time that a request is worked on.

        Raises:
            ShedError: The forecast is above the share of the deadline that its priority may use.
        """
        wait, allowed = self.forecast(candidates), SHARES[terms.priority] * terms.deadline
        # An idle server takes whoever comes: else a pace that was measured in a bad moment would never be corrected.
        if self._queued and wait > allowed:
            raise ShedError(wait, wait - allowed, terms.priority)
        work = FIXED_WORK + candidates
        if not self._queued:
            self._busy_since = self._clock()
        self._queued += work
        try:
            yield
        finally:
            self._queued -= work
            now = self._clock()
            self._seconds = DECAY * self._seconds + now - self._busy_since
            self._work = DECAY * self._work + work
            self._busy_since = now
