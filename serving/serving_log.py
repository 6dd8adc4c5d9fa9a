"""The serving log: each answer as rows of the engagement contract, with scores, version and canary bucket.

`ServingLog.write` puts an answer into a bounded queue; a thread of its own writes files (`engagement.served` says
which). A queue that is full and a disk that is full, gone or slow cost log rows, which are counted; they never cost an
answer, nor time of one. A kill -9 costs what was not written yet.
"""

import contextlib
import logging
import shutil
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from prometheus_client import Counter

from engagement.index import from_us, to_us
from engagement.served import COMMON, LIVE, SCORE, ServedFeatures, day_directory, days, save_features, save_rows
from engagement.table import RankingTable, TableSpec, concatenate
from serving.buckets import BUCKETS
from serving.protocol import CONTEXT, RankRequest

FLUSH_SECONDS = 5.0
"""Answers wait at most about so long until they are written."""
FLUSH_ROWS = 20_000
"""As soon as so many rows (>=) wait, they are written at once."""
MAX_ROWS = 200_000
"""An answer whose rows would bring what waits above (>) this is dropped; some 50 MB."""
FEATURES_EVERY = 100
"""Of one request in so many, by the hash of its id, the features are kept as they were read."""
PURPOSES = (LIVE, "replay", "shadow")
KEEP_DAYS = 30
"""A day of the log goes when it is more (>) than so many days before today."""
CLOSE_SECONDS = 5.0
"""How long a server that stops waits for the last file."""

ROWS = Counter(
    "evergreen_serving_log_rows", "Rows of the serving log: written, dropped (no room), lost (disk)", ["how"]
)
_log = logging.getLogger("evergreen.serving")


@dataclass(frozen=True)
class Served:
    """One ranking request and how it was answered; C candidates, A actions.

    Attributes:
        request: The request.
        at: The instant as of which it was ranked (the request's own time, else when it arrived).
        status: HTTP status of the answer; a 4xx that is the caller's fault is not logged, 429 and 5xx are.
        latency_ms: From arrival to the answer.
        order_C: Indices of `request.item_ids`, best first; None where there is no ranking.
        scores_CA: Probabilities, rows in the order of `request.item_ids`; None where there is no ranking.
        bucket: The user's canary bucket (header `x-bucket`), None where it was not sent.
        purpose: `live`, `replay` or `shadow` (header `x-purpose`); what else a client calls it is `other`.
        degraded: As answered in `x-degraded`.
        features: The table that was scored; kept for a small sample of requests.
        as_of: `Features.as_of`.
    """

    request: RankRequest
    at: datetime
    status: int
    latency_ms: float
    order_C: np.ndarray | None = None
    scores_CA: np.ndarray | None = None
    bucket: int | None = None
    purpose: str = LIVE
    degraded: str = ""
    features: RankingTable | None = None
    as_of: datetime | None = None

    @property
    def rows(self) -> int:
        """Rows of the log that it takes: one a candidate that somebody saw, one if nobody saw any."""
        return len(self.order_C) if self.ranked and self.order_C is not None else 1

    @property
    def ranked(self) -> bool:
        """Whether the answer was a ranking."""
        return self.status == 200 and self.order_C is not None and self.scores_CA is not None


def keeps_features(request_id: str) -> bool:
    """Whether the features of a request are kept: the same requests for every version."""
    return xxhash.xxh3_64_intdigest(request_id.encode(), seed=FEATURES_EVERY) % FEATURES_EVERY == 0


class ServingLog:
    """Writes the serving log of one server, in a thread of its own.

    Args:
        directory: `<settings.serving>/log`; made when first written to.
        version: Model version of all answers.
        spec: The model's declaration: names the actions and the context features.
    """

    def __init__(self, directory: Path, version: str, spec: TableSpec) -> None:
        self._directory, self._rows_of = Path(directory), _Rows(version, spec)
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._waiting: list[tuple[int, Served]] = []  # with the microsecond of the answer
        self._rows, self._open = 0, True
        self._today = self._sick = ""
        self._written, self._dropped, self._lost = (ROWS.labels(how) for how in ("written", "dropped", "lost"))
        self._thread = threading.Thread(target=self._run, name="serving-log", daemon=True)
        self._thread.start()

    def write(self, served: Served) -> None:
        """Have an answer logged; never blocks, never raises. What finds no room is dropped and counted."""
        rows = served.rows
        if served.features is not None and not keeps_features(served.request.request_id):
            served = replace(served, features=None)
        answered = time.time_ns() // 1000
        with self._lock:
            if not self._open or self._rows + rows > MAX_ROWS:
                self._dropped.inc(rows)
                return
            self._waiting.append((answered, served))
            self._rows += rows
            enough = self._rows >= FLUSH_ROWS
        if enough:
            self._wake.set()

    def close(self) -> None:
        """Write what is waiting, and end; call it when the server stops (SIGTERM)."""
        with self._lock:
            self._open = False
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while self._open:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            waiting, rows = self._waiting, self._rows
            self._waiting, self._rows = [], 0
        if not waiting:
            return
        try:
            self._save(waiting)
            self._written.inc(rows)
            self._sick = ""
        except Exception as error:  # a log that cannot be written must not stop the server
            self._lost.inc(rows)
            if not self._sick:  # once, until a file could be written again
                _log.warning("the serving log loses rows: %s", error)
            self._sick = str(error)

    def _save(self, waiting: list[tuple[int, Served]]) -> None:
        now = time.time_ns() // 1000
        directory = day_directory(self._directory, from_us(now).date())
        directory.mkdir(parents=True, exist_ok=True)
        if directory.name != self._today:
            clean(self._directory, from_us(now))
            self._today = directory.name
        name = f"{now:016d}-{uuid.uuid4().hex[:8]}"
        save_rows(directory / f"{name}.parquet", self._rows_of(waiting))
        for i, features in enumerate(_features([served for _, served in waiting])):
            save_features(directory / f"{name}-{i}.npz", features)


def clean(directory: Path, now: datetime) -> None:
    """Remove the days that are too old, and what killed servers left half written an hour ago or earlier."""
    for day, path in days(directory):
        if now.date() - day > timedelta(days=KEEP_DAYS):
            shutil.rmtree(path, ignore_errors=True)
    for half in Path(directory).glob("*/.*.tmp"):
        with contextlib.suppress(OSError):
            if half.stat().st_mtime <= now.timestamp() - 3600:
                half.unlink()


class _Rows:
    """Makes the rows of one version."""

    def __init__(self, version: str, spec: TableSpec) -> None:
        self._version, self._actions = version, spec.actions
        self._context = [f.name.removeprefix(CONTEXT) for f in spec.features if f.name.startswith(CONTEXT)]

    def __call__(self, waiting: Sequence[tuple[int, Served]]) -> pa.Table:
        """Answers as a table: R of them, N rows, `owner_N` tells whose."""
        answers = [served for _, served in waiting]
        sizes_R = np.array([s.rows for s in answers])
        owner_N = np.repeat(np.arange(len(answers), dtype=np.int32), sizes_R)
        failed_N = ~np.array([s.ranked for s in answers])[owner_N]
        ends_R = np.cumsum(sizes_R)
        position_N = np.arange(len(owner_N)) - np.repeat(ends_R - sizes_R, sizes_R)
        items: list[str | None] = []
        blocks = []
        for served in answers:
            if served.ranked and served.order_C is not None and served.scores_CA is not None:
                items += [served.request.item_ids[i] for i in served.order_C.tolist()]
                blocks.append(np.asarray(served.scores_CA, np.float32)[served.order_C])
            else:
                items.append(None)
                blocks.append(np.zeros((1, len(self._actions)), np.float32))
        scores_NA = np.concatenate(blocks)
        texts: dict[str, list[str | None]] = {
            "request_id": [s.request.request_id for s in answers],
            "user_id": [s.request.user_id for s in answers],
            "model_version": [self._version] * len(answers),
            "purpose": [s.purpose if s.purpose in PURPOSES else "other" for s in answers],
            "degraded": [s.degraded for s in answers],
            **{name: [s.request.context.get(name) for s in answers] for name in self._context},
        }
        numbers = {
            "event_timestamp": [to_us(s.at) for s in answers],
            "created_timestamp": [us for us, _ in waiting],
            "canary_bucket": [s.bucket if s.bucket is not None and s.bucket < BUCKETS else None for s in answers],
            "status": [s.status for s in answers],
            "latency_ms": [s.latency_ms for s in answers],
        }
        owner = pa.array(owner_N)
        columns = {
            "item_id": pa.array(items, pa.string()),
            "position": pa.array(position_N.astype(np.int16), mask=failed_N),
            **{n: pa.array(v, pa.string()).dictionary_encode().take(owner) for n, v in texts.items()},
            **{n: pa.array(v, COMMON.field(n).type).take(owner) for n, v in numbers.items()},
            **{f"{SCORE}{a}": pa.array(scores_NA[:, i], mask=failed_N) for i, a in enumerate(self._actions)},
        }
        return pa.table({n: columns.pop(n) for n in COMMON.names} | columns)


def _features(answers: Sequence[Served]) -> list[ServedFeatures]:
    """The features among some answers, together where they are of one spec."""
    by_spec: dict[TableSpec, list[tuple[RankingTable, datetime]]] = defaultdict(list)
    for served in answers:
        if served.features is not None and served.as_of is not None and not served.degraded:
            named = replace(served.features, request_id=np.array([served.request.request_id.encode()]))
            by_spec[named.spec].append((named, served.as_of.astimezone(UTC)))
    return [
        ServedFeatures(concatenate([t for t, _ in found]), tuple(a for _, a in found)) for found in by_spec.values()
    ]
