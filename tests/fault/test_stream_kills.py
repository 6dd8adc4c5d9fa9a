"""`kill -9` on the consumer at any moment, a dead member of its group, a Redis that goes away: the same end."""

import os
import random
import signal
import subprocess
import time

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from feature_repo.repo import FeatureRepo
from feature_repo.stream_records import encode
from feature_repo.stream_sources import publish
from tests.fault.stream_consumer import start
from tests.features_world import DAY, START, import_synth, scratch
from tests.redis_lab import redis_server

ACTIONS = ("save", "click", "hide")
USERS = [f"u{u}" for u in range(40)]
POISON = [b"{", b"\xff\xfe", b"[]", b'{"user_id": "u1"}']
EVERY = 50  # a poison record before each so many good ones


@pytest.fixture(scope="module")
def log():
    return import_synth(scratch(), users=len(USERS), items=60, days=6, late_share=0.05)


@pytest.fixture(scope="module")
def records(log) -> list[tuple[str, bytes]]:
    """Four days in the order in which they became known, poison in between, each record twice in a while."""
    rows = pl.DataFrame(pl.from_arrow(log.snapshot(START + 30 * DAY).engagements()))
    known = pl.max_horizontal("event_timestamp", "created_timestamp")
    rows = rows.filter(~pl.col("sampled") & known.is_between(START + 2 * DAY, START + 6 * DAY, closed="left")).sort(
        known
    )
    good = list(encode(rows.to_arrow(), ACTIONS))
    found = []
    for i in range(0, len(good), EVERY):
        found += [("", POISON[i // EVERY % len(POISON)]), *good[i : i + EVERY], *good[i : i + 3]]
    return found


@pytest.fixture(scope="module")
def whole(log, records) -> list[bytes | None]:
    """What one consumer leaves that nobody disturbs."""
    with redis_server() as url:
        repo, stream = prepared(log, url, "whole")
        publish(stream, records)
        consumer = start(repo.root, url, stream)
        settle(url, len(records))
        stop(consumer)
        return stored(repo)


def prepared(log, url: str, name: str) -> tuple[FeatureRepo, str]:
    repo = FeatureRepo(scratch() / name, url)
    repo.materialize(log.snapshot(START + 2 * DAY))
    return repo, f"{url}?stream=actions"


def stored(repo: FeatureRepo) -> list[bytes | None]:
    rows, _ = repo.rows()
    return rows.get([("user_history", [u.encode() for u in USERS])])[0]


def settle(url: str, published: int) -> None:
    """Wait until everything was delivered and acknowledged."""
    client, deadline = redis.Redis.from_url(url), time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            group = next(iter(client.xinfo_groups("actions")), None)
        except redis.RedisError:
            group = None
        if group and group["pending"] == 0 and group["entries-read"] == published:
            return
        time.sleep(0.02)
    raise TimeoutError(f"the consumer did not settle: {group}")


def stop(process) -> None:
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 0  # it finished its batch and left


def poison(repo: FeatureRepo) -> list[bytes]:
    """What was put aside, each position once, in their order."""
    files = list((repo.root / "quarantine").glob("*.parquet"))
    aside = pa.concat_tables([pq.read_table(f) for f in files]).to_pylist()
    by_position = {tuple(map(int, r["position"].split("-"))): r["raw"] for r in aside}
    return [raw for _, raw in sorted(by_position.items())]


@pytest.mark.slow
def test_consumer_killed_at_random_moments_ends_as_one_that_nobody_disturbed(log, records, whole):
    chance = random.Random(4)
    with redis_server() as url:
        repo, stream = prepared(log, url, "killed")
        kills = 0
        client = redis.Redis.from_url(url)
        while kills < 6:
            consumer = start(repo.root, url, stream)
            part = len(records) // 7
            publish(stream, records[kills * part : (kills + 1) * part])
            before, deadline = done(client), time.monotonic() + 20
            while done(client) == before and time.monotonic() < deadline:  # it has begun
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.15))
            consumer.kill()
            consumer.join()
            kills += 1
        publish(stream, records[kills * part :])
        consumer = start(repo.root, url, stream)
        settle(url, len(records))
        stop(consumer)
        assert stored(repo) == whole
        assert poison(repo) == [raw for _, raw in records if raw in POISON]


def done(client) -> int:
    try:
        group = client.xinfo_groups("actions")[0]
    except (redis.ResponseError, IndexError):
        return 0
    return (group["entries-read"] or 0) - group["pending"]


@pytest.mark.slow
def test_second_consumer_of_the_group_takes_over_from_a_killed_one(log, records, whole):
    with redis_server() as url:
        repo, stream = prepared(log, url, "two")
        first = start(repo.root, url, stream, max_records=50)
        publish(stream, records[:60])
        settle(url, 60)
        second = start(repo.root, url, stream)
        publish(stream, records[60:])
        first.kill()
        first.join()
        settle(url, len(records))
        stop(second)
        assert stored(repo) == whole


@pytest.mark.slow
def test_redis_that_goes_away_and_comes_back_is_waited_for(log, records, whole):
    directory = scratch()
    options = ("--appendonly", "yes", "--dir", str(directory))
    half = len(records) // 2
    with redis_server(*options) as url:
        repo, stream = prepared(log, url, "away")
        consumer = start(repo.root, url, stream)
        publish(stream, records[:half])
        client = redis.Redis.from_url(url)
        while not done(client):
            time.sleep(0.01)
    time.sleep(0.5)
    port = url.rpartition(":")[2].partition("/")[0]
    again = subprocess.Popen(
        ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", *options], stdout=subprocess.DEVNULL
    )
    try:
        wait_loaded(url)
        publish(stream, records[half:])
        settle(url, len(records))
        stop(consumer)
        assert stored(repo) == whole
    finally:
        again.terminate()
        again.wait(10)
    told = (repo.root.parent / "stream.log").read_text().splitlines()
    assert len(told) == 2
    assert "does not answer" in told[0]
    assert "goes on after" in told[1]


def wait_loaded(url: str) -> None:
    client, deadline = redis.Redis.from_url(url), time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            client.ping()
            return
        except redis.RedisError:
            time.sleep(0.05)
