"""Encoded rows of what was asked for last, kept in the serving process.

A row is fresh for at most `CACHE_SECONDS` after it was read, and only for a reader of the state of the store that it
was read from; a fresh row of a hot item saves a read, unpacking and hashing. For much longer a row is what was last
known, for when the store does not answer. How often freshness helps and how old the served rows were is exported to
Prometheus.
"""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

CACHE_SECONDS = 30.0
"""A row is fresh up to this age (<=)."""
KNOWN_SECONDS = 1800.0
"""A row is known up to this age (<=): half an hour of a session's actions may be missing from it."""
CACHE_ROWS = 50_000
"""Items, and categories; some 20 MB of items with an embedding of 32 numbers."""
USER_ROWS = 10_000
"""Users; some 40 MB where all have a history of a hundred actions."""
PAIR_ROWS = 100_000
"""Users with a category; some 20 MB."""
_ROOM = 8  # when a cache is full, a share of one in so many makes room: looking for the oldest takes a while

HITS = Counter("evergreen_online_cache_hits", "Keys answered by the cache of online rows", ["entity"])
MISSES = Counter("evergreen_online_cache_misses", "Keys read from the online store", ["entity"])
SIZE = Gauge("evergreen_online_cache_size", "Keys in the cache of online rows", ["entity"])
STALENESS = Histogram(
    "evergreen_online_cache_staleness_seconds",
    "Age of the oldest row that a request took from the cache",
    ["entity"],
    buckets=(0.1, 0.5, 1, 2, 5, 10, 20, CACHE_SECONDS),
)


class RowCache:
    """The rows of the keys that were asked for last, of one entity; safe to share between threads.

    Rows lie in one structured array, so that those of hundreds of keys are gathered in one step.

    Args:
        entity: What a key is about; the label of the metrics.
        dtype: Of a row.
        capacity: How many keys are kept at most; 0 keeps none.
        clock: Seconds that never go back.
    """

    def __init__(
        self, entity: str, dtype: np.dtype, capacity: int = CACHE_ROWS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.dtype, self._capacity, self._clock = dtype, capacity, clock
        self._lock = threading.Lock()
        self._slot: dict[bytes, int] = {}
        self._free: list[int] = []  # slots that were given up; beyond them, slots are taken in order
        size = max(1, capacity)  # memory is taken as slots are filled
        self._rows, self._read_at = np.empty(size, dtype), np.zeros(size)
        self._state, self._asked = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._requests = 0
        self._hits, self._misses = HITS.labels(entity), MISSES.labels(entity)
        self._size, self._staleness = SIZE.labels(entity), STALENESS.labels(entity)

    def get(self, keys: Sequence[bytes], state: int) -> tuple[np.ndarray, np.ndarray]:
        """What is fresh of the given keys.

        Args:
            keys: N keys.
            state: The instant that the store stands for.

        Returns:
            (N,) rows, a copy, and (N,) bool, where they are fresh; elsewhere a row is anything.
        """
        now = self._clock()
        with self._lock:
            slot, found = self._find(keys)
            read_at = self._read_at[slot]
            fresh = found & (now - read_at <= CACHE_SECONDS) & (self._state[slot] == state)
            self._requests += 1
            self._asked[slot[fresh]] = self._requests
            rows = self._rows[slot]
        hits = int(fresh.sum())
        self._hits.inc(hits)
        self._misses.inc(len(keys) - hits)
        if hits:
            self._staleness.observe(now - read_at[fresh].min())
        return rows, fresh

    def known(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """What was last known of the given keys; the result is as that of `get`."""
        oldest = self._clock() - KNOWN_SECONDS
        with self._lock:
            slot, found = self._find(keys)
            return self._rows[slot], found & (self._read_at[slot] >= oldest)

    def put(self, keys: Sequence[bytes], rows: np.ndarray, state: int) -> None:
        """Keep rows that were read just now of this state; those that were not asked for longest make room.

        Args:
            keys: M keys, each once.
            rows: (M,) rows.
            state: As in `get`.
        """
        count = min(len(keys), self._capacity)
        if not count:
            return
        keys = keys[:count]
        with self._lock:
            slot, found = self._find(keys)
            self._requests += 1
            self._asked[slot[found]] = self._requests
            self._make_room(int((~found).sum()), int(found.sum()))
            for i in np.flatnonzero(~found).tolist():
                slot[i] = self._slot[keys[i]] = self._free.pop() if self._free else len(self._slot)
            self._rows[slot], self._read_at[slot], self._state[slot] = rows[:count], self._clock(), state
            self._asked[slot] = self._requests
            self._size.set(len(self._slot))

    def _find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) slots and whether a key has one."""
        slot = np.array([self._slot.get(key, -1) for key in keys], np.int64)
        return slot, slot >= 0

    def _make_room(self, wanted: int, spared: int) -> None:
        """Free slots, but not those of the `spared` keys that were asked for last."""
        lacking = len(self._slot) + wanted - self._capacity
        if lacking <= 0:
            return
        keys, held = list(self._slot), np.fromiter(self._slot.values(), np.int64, len(self._slot))
        some = min(max(lacking, self._capacity // _ROOM), len(held) - spared)
        for i in self._asked[held].argpartition(some - 1)[:some].tolist():
            self._free.append(self._slot.pop(keys[i]))
