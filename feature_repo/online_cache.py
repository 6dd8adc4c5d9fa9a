"""Packed rows of hot items kept in the serving process for a short while.

An entry is served for at most `CACHE_SECONDS` after it was read, and never after the reader noticed that the online
store stands for another instant. How often that helps and how old the served rows were is exported to Prometheus.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from prometheus_client import Counter, Gauge, Histogram

CACHE_SECONDS = 30.0
CACHE_ROWS = 50_000  # keys of one entity; some 30 MB of items with an embedding of 32 numbers

HITS = Counter("evergreen_online_cache_hits", "Keys answered by the cache of online rows", ["entity"])
MISSES = Counter("evergreen_online_cache_misses", "Keys read from the online store", ["entity"])
SIZE = Gauge("evergreen_online_cache_size", "Keys in the cache of online rows", ["entity"])
STALENESS = Histogram(
    "evergreen_online_cache_staleness_seconds",
    "Age of the oldest row that a request took from the cache",
    ["entity"],
    buckets=(0.1, 0.5, 1, 2, 5, 10, 20, CACHE_SECONDS),
)

Rows = tuple[bytes | None, ...]  # one packed row a view of the entity


class RowCache:
    """The rows of the keys that were asked for last, of one entity; safe to share between threads.

    Args:
        entity: What a key is about; the label of the metrics.
        capacity: How many keys are kept at most; 0 keeps none.
        clock: Seconds that never go back.
    """

    def __init__(self, entity: str, capacity: int = CACHE_ROWS, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._clock = capacity, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[float, Rows]] = OrderedDict()
        self._hits, self._misses = HITS.labels(entity), MISSES.labels(entity)
        self._size, self._staleness = SIZE.labels(entity), STALENESS.labels(entity)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Rows]:
        """What is known and fresh enough of the given keys."""
        if not self._capacity:
            return {}
        now = oldest = self._clock()
        found: dict[bytes, Rows] = {}
        misses = 0
        with self._lock:
            for key in keys:
                entry = self._kept.get(key)
                if entry is None or now - entry[0] > CACHE_SECONDS:
                    misses += 1
                    continue
                read_at, found[key] = entry
                oldest = min(oldest, read_at)
                self._kept.move_to_end(key)
        self._hits.inc(len(keys) - misses)
        self._misses.inc(misses)
        if found:
            self._staleness.observe(now - oldest)
        return found

    def put(self, rows: dict[bytes, Rows]) -> None:
        """Keep rows that were read just now; those that were not asked for longest make room."""
        if not self._capacity:
            return
        now = self._clock()
        with self._lock:
            for key, row in rows.items():
                self._kept[key] = (now, row)
                self._kept.move_to_end(key)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
            self._size.set(len(self._kept))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._size.set(0)
