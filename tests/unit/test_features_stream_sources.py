"""Redis Streams and Kafka (a mock cluster over real sockets): nothing is lost, nothing committed comes again."""

import time

import pytest
from confluent_kafka import Producer, TopicPartition

from engagement.errors import EvergreenError
from feature_repo.stream_sources import (
    FIELD,
    GROUP,
    Batch,
    KafkaSource,
    SourceLost,
    open_source,
    publish,
    publish_kafka,
)
from tests.redis_lab import redis_server

RECORDS = [(f"u{i % 5}", f"{i}".encode()) for i in range(40)]
RAW = [raw for _, raw in RECORDS]


@pytest.fixture(scope="module")
def redis():
    with redis_server() as url:
        yield url


@pytest.fixture(scope="module")
def kafka():
    """(producer, address) of one mock cluster; it lives as long as the producer that made it."""
    producer = Producer({"test.mock.num.brokers": 1, "linger.ms": 0, "log_level": 0})
    brokers = producer.list_topics(timeout=20).brokers.values()
    yield producer, "kafka://" + ",".join(f"{b.host}:{b.port}" for b in brokers)


def drain(source, count: int, commit: bool = True) -> list:
    found, deadline = [], time.monotonic() + 30
    while len(found) < count and time.monotonic() < deadline:
        batch = source.read(7, 0.2)
        found += zip(batch.positions, batch.raw, strict=True)
        if commit and batch.raw:
            source.commit(batch)
    return found


def test_redis_delivers_in_order_and_commits(redis):
    url = f"{redis}?stream=order"
    assert publish(url, RECORDS) == len(RECORDS)
    source = open_source(url)
    assert [raw for _, raw in drain(source, len(RAW))] == RAW
    assert source.read(10, 0.01).raw == []
    again = open_source(url)
    assert again.read(10, 0.01).raw == []
    publish(url, [("u", b"new")])
    assert again.read(10, 0.5).raw == [b"new"]


def test_redis_begins_with_what_a_dead_consumer_left_in_order(redis):
    url = f"{redis}?stream=dead"
    publish(url, RECORDS)
    dead = open_source(url)
    committed = dead.read(5, 0.1)
    dead.commit(committed)
    assert dead.read(12, 0.1).raw == RAW[5:17]  # delivered and never acknowledged
    heir = open_source(url)
    assert [raw for _, raw in drain(heir, 35)] == RAW[5:]
    assert heir.read(10, 0.01).raw == []


def test_redis_entry_that_nobody_can_read_is_handed_on_as_it_is(redis):
    import redis as client

    url = f"{redis}?stream=foreign"
    direct = client.Redis.from_url(redis)
    direct.xadd("foreign", {b"something": b"else"})
    direct.xadd("foreign", {FIELD: b"\x00\xff"})
    assert open_source(url).read(10, 0.1).raw == [b"", b"\x00\xff"]


def test_redis_that_lost_everything_gets_its_group_anew(redis):
    import redis as client

    url = f"{redis}?stream=lost"
    source = open_source(url)
    publish(url, RECORDS[:3])
    assert len(drain(source, 3)) == 3
    client.Redis.from_url(redis).delete("lost")
    with pytest.raises(SourceLost, match="lost"):
        source.read(5, 0.05)
    publish(url, RECORDS[3:5])
    assert [raw for _, raw in drain(source, 2)] == RAW[3:5]


def test_redis_out_of_reach_is_told_and_waited_for():
    with redis_server() as url:
        source = open_source(f"{url}?stream=a")
        assert source.read(1, 0.01).raw == []
    with pytest.raises(SourceLost, match="Start its Redis"):
        source.read(1, 0.01)


def test_kafka_keeps_each_users_order_and_delivers_again_what_was_not_committed(kafka):
    producer, address = kafka
    publish_kafka(producer, "order", RECORDS)
    first = KafkaSource(f"{address}/order")
    found = drain(first, len(RAW), commit=False)
    assert sorted(raw for _, raw in found) == sorted(RAW)
    for user in range(5):
        mine = [raw for u, raw in RECORDS if u == f"u{user}"]
        assert [raw for _, raw in found if raw in mine] == mine
    half = Batch([], [], [TopicPartition("order", 0, 0)])
    done = {p for p, _ in found if p.split("/")[1] != "0"}
    for partition in {int(p.split("/")[1]) for p in done}:
        last = max(int(p.split("/")[2]) for p in done if int(p.split("/")[1]) == partition)
        half.ends.append(TopicPartition("order", partition, last + 1))
    first.commit(half)
    first.close()
    second = KafkaSource(f"{address}/order")  # the mock cluster lets it in when the first one's session has run out
    rest = [pair for pair in found if pair[0] not in done]
    assert rest
    assert done
    assert sorted(drain(second, len(rest))) == sorted(rest)
    assert second.read(1, 0.2).raw == []
    second.close()


@pytest.mark.parametrize("url", ["", "actions", "http://h/x", "redis://h:1/0", "kafka://h:1", "kafka:///topic"])
def test_a_wrong_address_is_told(url):
    for use in (open_source, lambda u: publish(u, [])):
        with pytest.raises(EvergreenError, match="is no action stream"):
            use(url)


def test_no_password_in_the_message():
    with pytest.raises(EvergreenError) as told:
        open_source("redis://me:secret@h:1/0")
    assert "secret" not in str(told.value)


def test_group_is_one_name():
    assert GROUP == "evergreen-features"  # committed positions hang on it
