"""Features when the online store is slow, dead and back again: real stores; no request fails or waits for long."""

import asyncio
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import redis
from prometheus_client import REGISTRY

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving import degrade
from serving.breaker import CALLS, OPEN_SECONDS, State
from serving.degrade import READERS, FeatureSource
from serving.protocol import RankRequest
from tests.features_world import DAY, START, scratch
from tests.online_lab import ITEMS, assert_same, at, built, fresh
from tests.redis_lab import redis_server

NOW = START + 7 * DAY + timedelta(hours=2)
LONG = 30.0


class Clock:
    """The real one, but it can be put forward, and stopped."""

    ahead, stopped = 0.0, None

    def __call__(self):
        return time.monotonic() + self.ahead if self.stopped is None else self.stopped


def asking(user="u1", items=ITEMS, surface="home"):
    return RankRequest(f"r-{user}", user, tuple(items), {"surface": surface})


def read(source, request, within=LONG):
    return asyncio.run(source.read(request, NOW, within))


def degraded(kind):
    return REGISTRY.get_sample_value("evergreen_degraded_total", {"kind": kind}) or 0.0


def materialised(url=""):
    """A home of its own, materialised an hour into day seven."""
    repo = fresh(url)
    repo.materialize(at(built()[0], 7))
    return repo


@pytest.fixture(scope="module")
def plain():
    """A home on SQLite."""
    return materialised()


@pytest.fixture(scope="module")
def on_redis():
    """A home on a Redis that all tests share, and its address."""
    with redis_server() as url:
        yield materialised(url), url


@contextmanager
def opened(repo, url=""):
    """A source with an empty memory; its clock can be put forward."""
    clock = Clock()
    source = FeatureSource(Settings(home=repo.root.parent, online_store=url), clock)
    try:
        yield source, clock
    finally:
        source.close()


@pytest.fixture
def sick(on_redis):
    """A source, its clock, and a client of its store, which is well again afterwards whatever a test does to it."""
    with opened(*on_redis) as (source, clock), redis.Redis.from_url(on_redis[1]) as client:
        yield source, clock, client
        client.config_set("requirepass", "")


def open_it(source):
    for _ in range(CALLS):
        read(source, asking("u1"))
    assert source.state == State.OPEN


def test_a_store_that_is_well_is_read_as_ever_and_nothing_is_degraded(plain):
    with opened(plain) as (source, _):
        found = read(source, asking())
        assert_same(found.table, plain.online().read("u1", ITEMS, {"surface": "home"}, NOW))
        assert (found.degraded, found.as_of) == ("", START + 7 * DAY + timedelta(hours=1))


def test_where_nothing_was_materialised_there_is_no_source():
    with pytest.raises(EvergreenError, match="no features were materialised"):
        FeatureSource(Settings(home=scratch()))


def test_a_dead_store_costs_freshness_then_features_but_no_request():
    with redis_server() as url, redis.Redis.from_url(url) as client, opened(materialised(url), url) as (source, _):
        well = read(source, asking("u1", ITEMS[:40]))
        client.shutdown(nosave=True)
        before = degraded("cached"), degraded("popularity")
        known = read(source, asking("u1", ITEMS[:40]))
        assert known.degraded == "cached" and known.as_of == well.as_of
        assert_same(known.table, well.table)
        # Other candidates: what is known of some, and nulls for those that nobody asked for yet.
        other = read(source, asking("u1", ITEMS[20:]))
        assert other.degraded == "cached" and not np.isfinite(other.table.item_num[20:]).any()
        np.testing.assert_array_equal(other.table.item_num[:20], well.table.item_num[20:])
        stranger = read(source, asking("u2"))
        assert (stranger.degraded, stranger.table, stranger.as_of) == ("popularity", None, None)
        assert (degraded("cached"), degraded("popularity")) == (before[0] + 2, before[1] + 1)


def test_the_last_known_features_are_of_this_request_not_of_the_last_one(sick):
    source, clock, client = sick
    read(source, asking("u1", surface="home"))
    then = read(source, asking("u1", surface="search"))
    read(source, asking("u1", surface="home"))
    read(source, asking("u2", surface="home"))
    _refuse(client)
    found = read(source, asking("u1", surface="search"))
    assert found.degraded == "cached"
    assert_same(found.table, then.table)


def test_an_open_breaker_leaves_the_store_alone_and_answers_from_memory(sick):
    source, clock, client = sick
    read(source, asking("u1"))
    _refuse(client)
    open_it(source)
    clock.stopped = clock()
    assert REGISTRY.get_sample_value("evergreen_breaker_state", {"dependency": "online_store"}) == State.OPEN
    reads = _reads()
    assert [read(source, asking("u1")).degraded for _ in range(5)] == ["cached"] * 5
    assert _reads() == reads


def test_a_store_that_hangs_is_given_up_in_time_and_found_again_when_it_answers(sick):
    source, clock, client = sick
    assert read(source, asking()).degraded == ""
    server = client.info("server")["process_id"]
    os.kill(server, signal.SIGSTOP)
    try:
        ended = _reads()
        assert read(source, asking(), within=0.05).degraded == "cached"
        assert _reads() == ended  # it did not wait for the store to fail
        burst = _together(source, [asking() for _ in range(3 * READERS + CALLS)])
        assert {f.degraded for f in burst} == {"cached"}
        _until(lambda: source.state == State.OPEN)
    finally:
        os.kill(server, signal.SIGCONT)
    _recover(source, clock)
    assert read(source, asking()).degraded == ""


def test_a_dead_store_that_comes_back_is_used_again_without_a_restart(sick):
    source, clock, client = sick
    read(source, asking())
    _refuse(client)
    open_it(source)
    client.config_set("requirepass", "")
    _recover(source, clock)
    assert read(source, asking()).degraded == ""


def test_a_server_that_starts_while_the_store_is_down_gets_its_features_later(on_redis):
    repo, url = on_redis
    with redis.Redis.from_url(url) as client:
        _refuse(client)
        with opened(repo, url) as (source, _):
            assert read(source, asking()).degraded == "popularity"
            client.config_set("requirepass", "")
            _until(lambda: read(source, asking()).degraded == "")


def test_a_read_without_time_left_says_nothing_about_the_store(plain):
    with opened(plain) as (source, _):
        for _ in range(2 * CALLS):
            assert read(source, asking(), within=0.0).degraded in ("", "cached", "popularity")
        _until(lambda: read(source, asking()).degraded == "")
        assert source.state == State.CLOSED


def test_many_threads_of_a_slow_store_block_no_other_request(plain, monkeypatch):
    monkeypatch.setattr(degrade, "READ_SECONDS", 0.02)
    with opened(plain) as (source, _):
        read(source, asking())
        release, entered = threading.Event(), threading.Semaphore(0)
        real = source._reader._version._rows.get

        def slow(wanted):
            entered.release()
            release.wait(10)
            return real(wanted)

        monkeypatch.setattr(source._reader._version._rows, "get", slow)
        try:
            found = _together(source, [asking() for _ in range(4 * READERS)])
            assert {f.degraded for f in found} == {"cached"}
        finally:
            release.set()


def _together(source, requests):
    async def all_of_them():
        return await asyncio.gather(*(source.read(r, NOW, LONG) for r in requests))

    return asyncio.run(all_of_them())


def _refuse(client):
    """Redis drops all connections and refuses everybody else's calls."""
    client.config_set("requirepass", "other")
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def _recover(source, clock):
    """Requests come; each may start one probe, for which it does not wait."""
    clock.ahead += OPEN_SECONDS

    def closed():
        assert read(source, replace(asking(), request_id="probe")).degraded in ("cached", "")
        return source.state == State.CLOSED

    _until(closed)


def _until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _reads():
    outcomes = ("ok", "slow", "failed")
    name = "evergreen_feature_read_seconds_count"
    return sum(REGISTRY.get_sample_value(name, {"outcome": o}) or 0 for o in outcomes)
