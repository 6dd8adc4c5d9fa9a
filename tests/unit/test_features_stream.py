"""A streamed action is a feature at once, and after the next materialisation nothing tells how it came."""

import functools
import json
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engagement.store import EngagementStore
from feature_repo.features import views
from feature_repo.packed import Codec, row_keys
from feature_repo.repo import FeatureRepo
from feature_repo.stream import consume
from feature_repo.stream_metrics import StreamMetrics
from feature_repo.stream_records import encode
from feature_repo.stream_sources import Batch, open_source, publish
from tests.features_world import DAY, START, import_synth, scratch, us, world
from tests.redis_lab import redis_server

ACTIONS = ("save", "click", "hide")
DAYS = 8


@pytest.fixture(scope="module")
def redis():
    with redis_server() as url:
        yield url


@pytest.fixture(scope="module")
def log() -> EngagementStore:
    world()  # Feast is imported once for all
    return import_synth(scratch() / "home", users=25, items=60, days=DAYS, late_share=0.1)


def day(log: EngagementStore, number: int) -> pa.Table:
    """The rows that became known on one day, in the order in which they did."""
    rows = pl.DataFrame(pl.from_arrow(log.snapshot(START + 30 * DAY).engagements()))
    known = pl.max_horizontal("event_timestamp", "created_timestamp")
    low = START + number * DAY
    return rows.filter(~pl.col("sampled") & known.is_between(low, low + DAY, closed="left")).sort(known).to_arrow()


@functools.cache
def materialized_once(log: EngagementStore, as_of) -> Path:
    root = scratch() / "features"
    FeatureRepo(root).materialize(log.snapshot(as_of))
    return root


def materialized(log: EngagementStore, url: str, as_of) -> FeatureRepo:
    root = scratch() / "features"
    if not url:
        shutil.copytree(materialized_once(log, as_of), root, symlinks=True)
    repo = FeatureRepo(root, url)
    repo.materialize(log.snapshot(as_of))
    return repo


class Listed:
    """A source that is a list of batches; it is over when the last one was committed."""

    partitioned = False

    def __init__(self, batches):
        self.batches = [Batch(list(b), [f"{n}/{i}" for i in range(len(b))], n) for n, b in enumerate(batches)]
        self.committed = 0

    def read(self, max_records, timeout):
        return self.batches[self.committed] if not self.over() else Batch([], [], None)

    def commit(self, batch):
        self.committed += 1

    def over(self):
        return self.committed == len(self.batches)

    def close(self):
        pass


def stream(repo: FeatureRepo, url: str, batches, now=START + 60 * DAY) -> StreamMetrics:
    source, metrics = Listed(batches), StreamMetrics()
    consume(repo.root, url, source, source.over, metrics, clock=lambda: now.timestamp())
    return metrics


def stored(repo: FeatureRepo, users=range(25)) -> list:
    rows, _ = repo.rows()
    return rows.get([("user_history", [f"u{u}".encode() for u in users])])[0]


def test_materializing_the_log_of_a_streamed_day_changes_no_byte(log, redis):
    for url in ("", redis):
        repo = materialized(log, url, START + 6 * DAY)
        before = stored(repo)
        raw = [r for _, r in encode(day(log, 6), ACTIONS)]
        stream(repo, url, [raw[:100], raw[50:300], raw[300:]])
        streamed = stored(repo)
        assert streamed != before
        repo.materialize(log.snapshot(START + 7 * DAY))
        assert stored(repo) == streamed
        assert stored(materialized(log, url, START + 7 * DAY)) == streamed


def test_histories_streamed_beyond_the_log_stay_when_less_of_it_is_materialized(log):
    repo = materialized(log, "", START + 6 * DAY)
    stream(repo, "", [[r for _, r in encode(day(log, 6), ACTIONS)]])
    streamed = stored(repo)
    repo.materialize(log.snapshot(START + 6 * DAY + timedelta(minutes=1)))
    assert stored(repo) == streamed


def test_an_action_published_now_is_in_the_next_ranking_request(log, redis):
    repo = materialized(log, redis, START + DAYS * DAY)
    reader, metrics, stop = repo.online(), StreamMetrics(), threading.Event()
    source = open_source(f"{redis}?stream=live")
    worker = threading.Thread(target=consume, args=(repo.root, redis, source, stop.is_set, metrics))
    worker.start()
    try:
        now = pl.Series([int(time.time() * 1e6)]).cast(pl.Datetime("us", "UTC"))[0]
        row = {"request_id": "r", "user_id": "u1", "item_id": "i5", "event_timestamp": now.isoformat(), "save": True}
        publish(f"{redis}?stream=live", [("u1", json.dumps(row | {"click": False, "hide": False}).encode())])
        deadline = time.monotonic() + 30
        while not metrics.batches and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        stop.set()
        worker.join()
    newest = reader.read("u1", ["i1"], {}, now + timedelta(seconds=1))
    assert (newest.history_time[-1], newest.history_actions[-1]) == (us(now), 1)
    same_instant = reader.read("u1", ["i1"], {}, now)
    assert same_instant.history_end[0] == newest.history_end[0] - 1  # known strictly before the request


def test_poison_between_good_records_is_put_aside_and_costs_nothing(log, tmp_path):
    raw = [r for _, r in encode(day(log, 6), ACTIONS)]
    poison = [b"{", b"\xff", json.dumps({"user_id": "u1"}).encode(), b"x" * 20_000]
    mixed = [r for i, good in enumerate(raw) for r in ([good, poison[i % 4]] if i < 8 else [good])]
    clean, dirty = (materialized(log, "", START + 6 * DAY) for _ in range(2))
    stream(clean, "", [raw])
    metrics = stream(dirty, "", [mixed])
    assert stored(clean) == stored(dirty)
    assert metrics.quarantined == {"bad_json": 4, "null_key": 2, "too_large": 2}
    (file,) = (dirty.root / "quarantine").glob("*.parquet")
    aside = pq.read_table(file)
    assert aside.column("position").to_pylist() == [f"0/{2 * i + 1}" for i in range(8)]
    assert aside.column("raw").to_pylist()[:3] == poison[:3]
    assert len(aside.column("raw")[3].as_py()) == 16_384
    stream(dirty, "", [mixed])
    assert list((dirty.root / "quarantine").glob("*.parquet")) == [file]  # the same batch, the same file
    assert stored(clean) == stored(dirty)


def test_what_comes_too_late_is_put_aside_and_the_log_brings_it(log):
    raw = [r for _, r in encode(day(log, 6), ACTIONS)]
    repo = materialized(log, "", START + 6 * DAY)
    metrics = stream(repo, "", [raw[200:], raw[:200]])
    assert metrics.quarantined["too_late"] > 0
    assert set(metrics.quarantined) == {"too_late"}
    repo.materialize(log.snapshot(START + 7 * DAY))
    assert stored(repo) == stored(materialized(log, "", START + 7 * DAY))


def test_a_user_whom_the_log_does_not_know_gets_a_history(log):
    repo = materialized(log, "", START + 6 * DAY)
    row = {"request_id": "r", "user_id": "new:ü", "item_id": "i1", "event_timestamp": "2024-01-07T05:00:00Z"}
    stream(repo, "", [[json.dumps(row | {"save": True, "click": False, "hide": True}).encode()]])
    rows, spec = repo.rows()
    view = next(v for v in views(spec) if v.name == "user_history")
    found = Codec(view).unpack(rows.get([(view.name, row_keys(view, {"user_id": ["new:ü"]}))])[0])
    instant = us(START + 6 * DAY + timedelta(hours=5))
    assert found.to_pylist() == [
        {"time": [instant], "known": [instant], "actions": [5], "item": ["i1"], "event_timestamp": instant + 1}
    ]


def test_metrics_count_records_and_delays():
    metrics = StreamMetrics()
    metrics.records, metrics.quarantined["bad_json"] = 7, 2
    metrics.delays(pl.Series([0.01, 0.02, 7200.0]).to_numpy())
    found = {(s.name, *s.labels.values()): s.value for m in metrics.collect() for s in m.samples}
    assert found["evergreen_stream_records_total",] == 7
    assert found["evergreen_stream_quarantined_total", "bad_json"] == 2
    assert found["evergreen_stream_delay_seconds_bucket", "0.01"] == 1
    assert found["evergreen_stream_delay_seconds_bucket", "0.025"] == 2
    assert found["evergreen_stream_delay_seconds_bucket", "+Inf"] == 3
