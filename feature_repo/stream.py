"""Actions become online features within a moment: read, judge, merge into the users' histories, push, commit.

Everything between reading and committing may be done twice: a history that holds an action already stays as it is
(`stream_merge`). A consumer that is killed anywhere therefore leaves nothing to repair; who comes next begins with what
was not committed.

One batch is read, merged and written at a time. A source gives what has come since the last batch, so that batches are
small and quick when little happens, and large and cheap when there is a backlog.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import tenacity

from engagement.errors import EvergreenError
from engagement.files import write_part
from feature_repo import stream_merge, stream_records
from feature_repo.definitions import open_store
from feature_repo.features import views
from feature_repo.generations import Generation, served, settled
from feature_repo.locks import held
from feature_repo.packed import Codec, row_keys
from feature_repo.stream_metrics import StreamMetrics
from feature_repo.stream_sources import ActionSource, Batch, SourceLost, open_source

MAX_RECORDS = 50_000  # a batch; bounds memory (the histories of as many users) and what a crash makes us do again
PAUSE = 0.02  # seconds at least from one batch to the next: few records at a time would each cost a whole write
POLL_SECONDS = 1.0
QUARANTINE_ROWS = 10_000  # a file
VIEW = "user_history"
PUSH_SOURCE = "user_history_push"
LOG = logging.getLogger("evergreen.stream")
T = TypeVar("T")


def run(root: Path, online_store: str, url: str, metrics_at: str = "") -> None:
    """Consume a stream until SIGTERM or SIGINT; the batch at hand is finished.

    Args:
        root: The Feast repository of a home.
        online_store: As `Settings.online_store`.
        url: Address of the stream, as `stream_sources` tells.
        metrics_at: Where Prometheus may ask, `host:port`; nowhere by default.

    Raises:
        EvergreenError: The address is wrong, or nothing was materialised yet.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    metrics = StreamMetrics()
    if metrics_at:
        metrics.serve(metrics_at)
    consume(root, online_store, open_source(url), stop.is_set, metrics)


def consume(
    root: Path,
    online_store: str,
    source: ActionSource,
    stopped: Callable[[], bool],
    metrics: StreamMetrics | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Bring what a source delivers into the online store, until told to stop.

    Consumers of a source that is not partitioned by user take turns: one works, the others wait for its end, and
    the system tells them at once when it dies.

    Args:
        root: The Feast repository of a home.
        online_store: As `Settings.online_store`.
        source: What to read; closed at the end.
        stopped: Asked between batches.
        metrics: Counted into.
        clock: Seconds since 1970, to tell which records are of the future.

    Raises:
        EvergreenError: Nothing was materialised yet, or a store refuses its work other than by being out of reach.
    """
    root, metrics = Path(root).resolve(), metrics or StreamMetrics()
    consumer = _Consumer(root, online_store, metrics, clock)
    try:
        with held(root / ".stream.lock", shared=source.partitioned, stopped=stopped):
            _patiently(consumer.open, stopped)  # imports Feast, so that the first action need not wait for it
            while not stopped():
                began = time.monotonic()
                batch = _patiently(partial(source.read, MAX_RECORDS, POLL_SECONDS), stopped)
                if batch.raw:
                    _patiently(partial(consumer.write, batch), stopped)
                    _patiently(partial(source.commit, batch), stopped)
                    if len(batch.raw) < MAX_RECORDS:
                        time.sleep(max(0.0, began + PAUSE - time.monotonic()))
    finally:
        source.close()


class _Consumer:
    """Writes batches to the published generation of the online store."""

    def __init__(self, root: Path, url: str, metrics: StreamMetrics, clock: Callable[[], float]) -> None:
        self._root, self._url, self._metrics, self._clock = root, url, metrics, clock
        self._generation: Path | None = None

    def open(self) -> None:
        """Work on the generation that is published now."""
        directory = served(self._root)
        if directory != self._generation:
            generation = Generation.load(directory)
            self._rows, self._spec = generation.rows(self._url), generation.spec
            self._codec = Codec(next(v for v in views(self._spec) if v.name == VIEW))
            self._store = open_store(self._root, url=self._url)
            self._store.get_feature_view(VIEW, allow_registry_cache=True)  # fills the cache of the registry
            self._generation = directory

    def write(self, batch: Batch) -> None:
        """Merge a batch into the store; may be called again with the same batch."""
        with settled(self._root / "online"):
            self.open()
            records = stream_records.read(batch.raw, self._spec.actions, int(self._clock() * 1e6))
            late = self._merge(records.actions)
        bad = pl.concat([records.bad, late])
        _put_aside(self._root / "quarantine", bad.sort("_row"), batch)
        self._count(records, bad, len(batch.raw))

    def _merge(self, actions: pl.DataFrame) -> pl.DataFrame:
        """Push the histories that the actions change; returns the rows and the reason of what came too late."""
        users = actions["user_id"].unique().sort()
        actions = actions.join(users.to_frame().with_row_index("user"), on="user_id", maintain_order="left")
        keys = row_keys(self._codec.view, {"user_id": users.to_arrow().cast(pa.string())})
        old = stream_merge.unrolled(self._codec.unpack(self._rows.get([(VIEW, keys)])[0]))
        new = actions.select(stream_merge.ACTIONS.names())
        late = stream_merge.too_late(old, new)
        if not late.all():
            changed = stream_merge.merge(old, new.filter(~late))
            self._push(stream_merge.rows(users, changed))
        return actions.filter(late).select("_row", reason=pl.lit("too_late"))

    def _push(self, rows: pa.Table) -> None:
        from feast.data_source import PushMode

        # Arrow columns inside pandas: Feast hands them on without making a Python object of each value.
        self._store.push(PUSH_SOURCE, rows.to_pandas(types_mapper=pd.ArrowDtype), to=PushMode.ONLINE)

    def _count(self, records: stream_records.Records, bad: pl.DataFrame, read: int) -> None:
        metrics = self._metrics
        metrics.records += read
        metrics.batches += 1
        metrics.idle += records.idle
        for reason, count in bad.group_by("reason").len().iter_rows():
            metrics.quarantined[reason] += count
        known = records.actions["known"].to_numpy()
        metrics.delays(np.maximum(self._clock() - known / 1e6, 0.0))


def _put_aside(directory: Path, bad: pl.DataFrame, batch: Batch) -> None:
    """Write records with their reasons to files named by their content: the same batch gives the same files."""
    for part in bad.iter_slices(QUARANTINE_ROWS):
        at = part["_row"].to_list()
        raw = [batch.raw[i][: stream_records.MAX_BYTES] for i in at]
        columns = {"reason": part["reason"].to_list(), "position": [batch.positions[i] for i in at], "raw": raw}
        types = [("reason", pa.string()), ("position", pa.string()), ("raw", pa.binary())]
        write_part(directory, pa.table(columns, pa.schema(types)), "stream-")


def _patiently(work: Callable[[], T], stopped: Callable[[], bool]) -> T:
    """Do work that may be repeated, and wait for a source or a store that is out of reach; says so once."""
    began = time.monotonic()

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            LOG.warning("%s The stream waits.", state.outcome.exception())

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_out_of_reach),
        wait=tenacity.wait_exponential(multiplier=0.1, max=5.0),
        stop=lambda _: stopped(),
        before_sleep=tell,
        reraise=True,
    )
    result = attempts(work)
    if attempts.statistics["attempt_number"] > 1:
        LOG.warning("The stream goes on after %.1f s.", time.monotonic() - began)
    return result


def _out_of_reach(error: BaseException) -> bool:
    if isinstance(error, SourceLost):
        return True
    import redis

    lost = (redis.ConnectionError, redis.TimeoutError)
    return isinstance(error, EvergreenError) and isinstance(error.__cause__, lost)
