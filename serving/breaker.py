"""A circuit breaker: a dependency that is sick is left alone, and asked now and then whether it is well again.

After Nygard, Release It! (2007): closed (calls go through), open (none does), half-open (one at a time tries).
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from prometheus_client import Gauge

WINDOW_SECONDS = 10.0
"""A call counts from its end on for less (<) than this."""
WINDOW_CALLS = 20
"""And only the last so many calls count, so that a store that hangs is noticed as fast after a busy minute as ever."""
CALLS = 10
"""A closed breaker opens only if at least (>=) so many calls count."""
BAD_SHARE = 0.5
"""And if at least (>=) this share of them was bad."""
OPEN_SECONDS = 2.0
"""An open breaker is half-open once it has been open for at least (>=) this long."""
PROBES = 3
"""So many good probes, one after the other, close a half-open breaker; one bad probe opens it anew."""

STATE = Gauge("evergreen_breaker_state", "0 closed, 1 half-open, 2 open", ["dependency"])


class State(IntEnum):
    """What a breaker does with calls."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Ticket(NamedTuple):
    """Leave to make one call.

    Attributes:
        turn: During which stay in a state it was given: how the call ends says nothing about a later one.
        probe: Whether it is to find out if the dependency is well again: nobody should have to wait for it.
    """

    turn: int
    probe: bool


class Breaker:
    """The breaker of one dependency; safe to share between threads.

    Who wants to call asks for a ticket, and gives it back with how the call ended. A probe's ticket must come back.

    Args:
        dependency: Its name, the label of the metric.
        clock: Seconds that never go back.
    """

    def __init__(self, dependency: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._gauge = STATE.labels(dependency)
        self._ended: deque[tuple[float, bool]] = deque()  # (when, bad), oldest first
        self._bad = self._good = self._turn = 0  # bad calls that count; good probes; changes of the state
        self._probing, self._opened = False, 0.0
        self._go(State.CLOSED)

    @property
    def state(self) -> State:
        """Its state now."""
        with self._lock:
            return self._now()

    def admit(self) -> Ticket | None:
        """A ticket for one call; None when the dependency is to be left alone."""
        with self._lock:
            state = self._now()
            if state == State.OPEN or self._probing:
                return None
            self._probing = state == State.HALF_OPEN
            return Ticket(self._turn, self._probing)

    def record(self, ticket: Ticket, bad: bool) -> None:
        """Tell how a call ended."""
        with self._lock:
            self._now()
            if ticket.turn != self._turn:
                return
            if self._state == State.CLOSED:
                self._count(bad)
            elif bad:
                self._open()
            else:
                self._probing, self._good = False, self._good + 1
                if self._good >= PROBES:
                    self._go(State.CLOSED)

    def _count(self, bad: bool) -> None:
        now = self._clock()
        self._ended.append((now, bad))
        self._bad += bad
        while len(self._ended) > WINDOW_CALLS or now - self._ended[0][0] >= WINDOW_SECONDS:
            self._bad -= self._ended.popleft()[1]
        if len(self._ended) >= CALLS and self._bad >= BAD_SHARE * len(self._ended):
            self._open()

    def _open(self) -> None:
        self._opened = self._clock()
        self._go(State.OPEN)

    def _now(self) -> State:
        if self._state == State.OPEN and self._clock() - self._opened >= OPEN_SECONDS:
            self._go(State.HALF_OPEN)
        return self._state

    def _go(self, state: State) -> None:
        self._state, self._turn = state, self._turn + 1
        self._probing, self._good, self._bad = False, 0, 0
        self._ended.clear()
        self._gauge.set(state)
