"""The stream consumer: how soon an action is a feature, and how fast a backlog drains.

    python -m benchmarks.features.stream

Every user's history is full (100 actions), so that each write is as large as it gets.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.measure import ROOT, Measured, measure, median

USERS, ITEMS = 20_000, 100_000
BACKLOG = 1_000_000
KAFKA_BACKLOG = 200_000  # the mock cluster keeps 5 MB a partition
PER_SECOND, SECONDS, WARM_SECONDS = 2_000, 20, 3  # the first seconds of a process do not count
ACTIONS = ("save", "click", "hide")


def run(scale: int = 1, runs: int = 3) -> str:
    """Measure and return the section."""
    lines = [
        "| source | store | work | records/s | CPU s | peak MB | action to feature p50 / p99 / max |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    backlog = {"records": BACKLOG * scale, "users": USERS * scale}
    for source, kind, store, sizes in (
        ("Redis Streams", "redis", "Redis", backlog),
        ("Redis Streams", "redis", "SQLite", backlog),
        ("Kafka (mock cluster)", "kafka", "Redis", backlog | {"records": KAFKA_BACKLOG}),
    ):
        found = [_measured("drain", source=kind, store=store, **sizes) for _ in range(runs)]
        speed = sizes["records"] / _middle(found, "wall")
        lines.append(_line(source, store, f"backlog of {sizes['records']:,}", speed, found, ""))
    for store in ("Redis", "SQLite"):
        found = [_measured("live", store=store, users=USERS * scale) for _ in range(runs)]
        delay = " / ".join(f"{1000 * _middle(found, n):,.0f} ms" for n in ("p50", "p99", "max"))
        work = f"{PER_SECOND:,} actions/s for {SECONDS} s"
        lines.append(_line("Redis Streams", store, work, PER_SECOND, found, delay))
    intro = (
        f"{USERS * scale:,} users with full histories, {ITEMS:,} items; one consumer process, median of {runs} runs. "
        "CPU is the consumer's without its start; Redis and the publisher run beside it on the same cores. "
        f"Delays leave out the first {WARM_SECONDS} s. Again: `python -m benchmarks.features.stream`.\n"
    )
    return "\n".join(["### Stream: actions into the online store", "", intro, *lines, ""])


def _line(source: str, store: str, work: str, speed: float, found: list[Measured], delay: str) -> str:
    peak = median(found).peak_mb
    return f"| {source} | {store} | {work} | {speed:,.0f} | {_middle(found, 'cpu'):.1f} | {peak:,.0f} | {delay} |"


def _middle(found: list[Measured], name: str) -> float:
    return float(np.median([m.result[name] for m in found]))


def _measured(name: str, **arguments) -> Measured:
    with _redis() as redis, tempfile.TemporaryDirectory(prefix="stream-") as home:
        return measure(f"benchmarks.features.stream:{name}", home=home, redis=redis, **arguments)


def drain(home: str, redis: str, source: str, store: str, records: int, users: int) -> dict:
    """Read a backlog that is there already."""
    from feature_repo import stream_sources as sources
    from feature_repo.stream_metrics import StreamMetrics

    root, url = _filled(Path(home), redis if store == "Redis" else "", users)
    metrics, backlog = StreamMetrics(), _records(records, users)
    if source == "kafka":
        from confluent_kafka import Producer

        producer = Producer({"test.mock.num.brokers": 1, "linger.ms": 50, "compression.type": "zstd", "log_level": 0})
        broker = next(iter(producer.list_topics(timeout=20).brokers.values()))
        sources.publish_kafka(producer, "actions", backlog)
        reader: sources.ActionSource = sources.KafkaSource(f"kafka://{broker.host}:{broker.port}/actions")
    else:
        sources.publish(f"{redis}?stream=actions", backlog)
        reader = sources.open_source(f"{redis}?stream=actions")
    first = _Started(reader)
    _consume(root, url, first, lambda: metrics.records >= records, metrics)
    assert not metrics.quarantined, metrics.quarantined
    return {"wall": time.perf_counter() - first.wall, "cpu": time.process_time() - first.cpu}


def live(home: str, redis: str, store: str, users: int) -> dict:
    """Keep up with a publisher of another process; delays are from the action until its row is written."""
    from feature_repo.stream_metrics import StreamMetrics
    from feature_repo.stream_sources import open_source

    root, url = _filled(Path(home), redis if store == "Redis" else "", users)
    total = PER_SECOND * SECONDS

    class Kept(StreamMetrics):
        found: list[np.ndarray] = []

        def delays(self, seconds: np.ndarray) -> None:
            self.found.append(seconds)

    metrics = Kept()
    command = [sys.executable, "-m", "benchmarks.features.stream", "publish", f"{redis}?stream=actions", str(users)]
    first = _Started(open_source(f"{redis}?stream=actions"), command)
    _consume(root, url, first, lambda: metrics.records >= total, metrics)
    delays = np.concatenate(metrics.found)[PER_SECOND * WARM_SECONDS :]
    p50, p99 = np.quantile(delays, [0.5, 0.99])
    cpu = time.process_time() - first.cpu
    return {"p50": p50, "p99": p99, "max": delays.max(), "cpu": cpu, "batches": metrics.batches}


class _Started:
    """A source that starts a publisher when it is first asked, and remembers when its first record came."""

    def __init__(self, source, publisher: list[str] | None = None) -> None:
        self._publisher = publisher
        self._source, self.partitioned, self.wall, self.cpu = source, source.partitioned, 0.0, 0.0
        self.commit, self.close = source.commit, source.close

    def read(self, max_records: int, timeout: float):
        if self._publisher:
            subprocess.Popen(self._publisher, cwd=ROOT)
            self._publisher = None
        wall, cpu = time.perf_counter(), time.process_time()
        batch = self._source.read(max_records, timeout)
        if batch.raw and not self.wall:
            self.wall, self.cpu = wall, cpu
        return batch


def _consume(root: Path, url: str, source, stopped, metrics) -> None:
    from feature_repo.stream import consume

    consume(root, url, source, stopped, metrics)


def _filled(home: Path, url: str, users: int) -> tuple[Path, str]:
    """A published repository in which every user has done a hundred things."""
    from datetime import timedelta

    import polars as pl

    from engagement.importers import contract_dir
    from engagement.store import EngagementStore
    from feature_repo.features import HISTORY_LENGTH, views
    from feature_repo.packed import Codec, row_keys
    from feature_repo.repo import FeatureRepo
    from feature_repo.stream_merge import ACTIONS as SCHEMA
    from feature_repo.stream_merge import rows
    from tests.synth import DAY_US, START, write_contract_dir

    store = EngagementStore(home / "data")
    store.append(contract_dir.read(write_contract_dir(home / "source", users=20, items=50, days=2)))
    repo = FeatureRepo(home / "features", url)
    repo.materialize(store.snapshot(START + timedelta(days=2)))
    online, spec = repo.rows()
    view = next(v for v in views(spec) if v.name == "user_history")
    rng, codec = np.random.default_rng(0), Codec(view)
    for low in range(0, users, 5_000):
        block = np.arange(low, min(low + 5_000, users))
        count = len(block) * HISTORY_LENGTH
        time_us = (
            int(START.timestamp() * 1e6)
            + np.sort(rng.integers(0, DAY_US, (len(block), HISTORY_LENGTH)), axis=1).ravel()
        )
        columns = {"user": np.repeat(np.arange(len(block)), HISTORY_LENGTH), "known": time_us, "time": time_us}
        columns |= {"item": [f"i{i}" for i in rng.integers(0, ITEMS, count)], "actions": np.ones(count, np.int64)}
        table = rows(pl.Series([f"u{u}" for u in block]), pl.DataFrame(columns, SCHEMA))
        online.put(view.name, row_keys(view, table), codec.pack(table))
    return repo.root, url


def _records(count: int, users: int) -> Iterator[tuple[str, bytes]]:
    """Actions of the last minutes, in order."""
    import orjson

    rng = np.random.default_rng(1)
    step = min(1_000, 1_800_000_000 // count)
    start = int(time.time() * 1e6) - count * step
    for i, (user, item) in enumerate(
        zip(rng.integers(0, users, count).tolist(), rng.integers(0, ITEMS, count).tolist(), strict=True)
    ):
        yield f"u{user}", orjson.dumps(_record(i, user, item, start + i * step))


def _record(number: int, user: int, item: int, us: int) -> dict:
    at = pa.scalar(us, pa.timestamp("us", "UTC")).as_py().isoformat()
    row = {"request_id": f"r{number}", "user_id": f"u{user}", "item_id": f"i{item}", "event_timestamp": at}
    return row | {a: a == ACTIONS[number % 3] for a in ACTIONS}


def publish_live(url: str, users: int) -> None:
    """Publish at the stated rate; an action happens at the moment at which it is published."""
    import orjson

    from feature_repo.stream_sources import publish

    rng, start, sent = np.random.default_rng(2), time.time(), 0
    while sent < PER_SECOND * SECONDS:
        due = min(PER_SECOND * SECONDS, int((time.time() - start) * PER_SECOND)) - sent
        user, item = rng.integers(0, users, due).tolist(), rng.integers(0, ITEMS, due).tolist()
        now = int(time.time() * 1e6)
        publish(
            url,
            [
                (f"u{u}", orjson.dumps(_record(sent + i, u, m, now)))
                for i, (u, m) in enumerate(zip(user, item, strict=True))
            ],
        )
        sent += due
        time.sleep(0.01)


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    from tests.redis_lab import redis_server

    with redis_server() as url:
        yield url


if __name__ == "__main__":
    if sys.argv[1:2] == ["publish"]:
        publish_live(sys.argv[2], int(sys.argv[3]))
    else:
        print(run())
