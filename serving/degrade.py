"""Features within a time budget: from the online store, else as they were last known, else none at all.

A read runs in a small pool of threads and is waited for only so long. A store that fails or is slow too often is left
alone by a circuit breaker: then requests are answered from memory at once, and now and then one of them starts a probe
that nobody waits for.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from prometheus_client import Counter, Histogram

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from evergreen.settings import Settings
from feature_repo.generations import Generation, served
from feature_repo.online import OnlineReader, Reading
from feature_repo.online_rows import READER_SECONDS
from serving.breaker import Breaker, State, Ticket
from serving.protocol import RankRequest

Degraded = Literal["", "cached", "popularity"]

READ_SECONDS = 0.25
"""A read of the online store is waited for at most so long; one that takes as long or longer (>=) is slow, which is as
bad as a failed one for the breaker. Waiting for a free thread counts: features that come late are of no use."""
READERS = 4
"""Threads that read; a store that hangs holds each for `READER_SECONDS`, twice where Redis has to be called again."""

DEGRADED = Counter("evergreen_degraded", "Requests answered without fresh features", ["kind"])
READS = Histogram(
    "evergreen_feature_read_seconds",
    "Reads of the online store, from when they were asked for",
    ["outcome"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, READ_SECONDS, 0.5, 1.0, 2.5),
)
_log = logging.getLogger("evergreen.serving")


@dataclass(frozen=True)
class Features:
    """What is known about one request.

    Attributes:
        table: The request as a ranking table (R = 1); None: rank by popularity.
        degraded: Empty when the store answered; `cached` when these are the last known features; `popularity` when
            there are none.
        as_of: The instant whose knowledge the online store held when they were read; None without a table.
    """

    table: RankingTable | None
    degraded: Degraded = ""
    as_of: datetime | None = None


class FeatureSource:
    """Reads features for an asyncio server; never raises for a sick store.

    Args:
        settings: The home. A store that does not answer now is no error: it is tried again in passing.
        clock: Seconds that never go back.

    Raises:
        EvergreenError: Nothing was ever materialised in this home, or what was is damaged.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        Generation.load(served(settings.features))
        self._root, self._url = settings.features, settings.online_store
        self._clock, self._breaker = clock, Breaker("online_store", clock)
        self._readers = ThreadPoolExecutor(READERS, "features")
        self._memory = ThreadPoolExecutor(1, "known-features")  # of its own: the readers may all hang
        self._reader: OnlineReader | None = None
        try:
            self._open()
        except EvergreenError as error:
            _log.warning("no features for now: %s", error)

    @property
    def state(self) -> State:
        """The state of the store's breaker."""
        return self._breaker.state

    async def read(self, request: RankRequest, at: datetime, within: float) -> Features:
        """Features of one request.

        Args:
            request: The request.
            at: As of when: the request's own time, else now.
            within: Seconds that may be spent on waiting for the store, at most `READ_SECONDS` of them; falling back
                takes a millisecond or two more.
        """
        ticket = self._breaker.admit()
        if ticket is None:
            return await self._last_known(request, at)
        read = self._start(ticket, request, at)
        if ticket.probe:
            return await self._last_known(request, at)
        waiting = asyncio.wrap_future(read)
        done, _ = await asyncio.wait({waiting}, timeout=min(within, READ_SECONDS))
        if done and not waiting.cancelled() and waiting.exception() is None:
            return Features(waiting.result().table, "", waiting.result().as_of)
        waiting.cancel()  # spares a read that has not begun; one under way goes on, for the breaker and the memory
        return await self._last_known(request, at)

    def close(self) -> None:
        """End the threads; a read that hangs is not waited for."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._memory.shutdown(wait=False, cancel_futures=True)

    def _start(self, ticket: Ticket, request: RankRequest, at: datetime) -> "Future[Reading]":
        started = self._clock()
        read = self._readers.submit(self._read, request, at)
        read.add_done_callback(lambda ended: self._record(ticket, ended, self._clock() - started))
        return read

    def _read(self, request: RankRequest, at: datetime) -> Reading:
        reader = self._reader or self._open()
        return reader.reading(request.user_id, list(request.item_ids), dict(request.context), at)

    def _open(self) -> OnlineReader:
        self._reader = OnlineReader(self._root, self._url, patience=READER_SECONDS)
        return self._reader

    def _record(self, ticket: Ticket, read: "Future[Reading]", seconds: float) -> None:
        slow = seconds >= READ_SECONDS
        if read.cancelled() and not slow:
            return  # the request had no time for it, which says nothing about the store
        failed = None if read.cancelled() else read.exception()
        READS.labels("failed" if failed else "slow" if slow else "ok").observe(seconds)
        before = self._breaker.state
        self._breaker.record(ticket, bad=slow or failed is not None)
        if before != self._breaker.state:
            reason = failed or ("it is slow" if slow else "it answers again")
            _log.warning("online store: breaker %s: %s", self._breaker.state.name.lower(), reason)

    async def _last_known(self, request: RankRequest, at: datetime) -> Features:
        known = await asyncio.get_running_loop().run_in_executor(self._memory, self._recall, request, at)
        found = Features(known.table, "cached", known.as_of) if known else Features(None, "popularity")
        DEGRADED.labels(found.degraded).inc()
        return found

    def _recall(self, request: RankRequest, at: datetime) -> Reading | None:
        if self._reader is None:
            return None
        try:
            return self._reader.remembered(request.user_id, list(request.item_ids), dict(request.context), at)
        except Exception:  # rows that a sick store gave and that no code can read
            return None
