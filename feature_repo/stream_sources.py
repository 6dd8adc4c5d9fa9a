"""Where streamed actions come from: Redis Streams on one machine, Kafka on a cluster.

    redis://host:port/db?stream=actions
    kafka://host:port[,host:port]/topic

Both deliver at least once: what was read and not committed is read again after a crash. Order within one user is kept.
"""

import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, urlsplit, urlunsplit

from engagement.errors import EvergreenError

if TYPE_CHECKING:
    import redis
    from confluent_kafka import Producer

GROUP = "evergreen-features"
FIELD = b"record"  # of a Redis stream entry
LOG = logging.getLogger("evergreen.stream")
_REDIS_SECONDS = 10.0
_PIPELINE = 10_000


class SourceLost(EvergreenError):
    """The source does not answer for now; the call may be repeated."""


@dataclass(frozen=True)
class Batch:
    """Records in the order in which they came.

    Attributes:
        raw: The records.
        positions: Where each one lies in the source, for people and for the quarantine.
        ends: What `commit` needs; its type is the source's own.
    """

    raw: list[bytes]
    positions: list[str]
    ends: Any


class ActionSource(Protocol):
    """A stream of records.

    Attributes:
        partitioned: Whether consumers of the group may work side by side, because a user's records go to one of them.
    """

    partitioned: bool

    def read(self, max_records: int, timeout: float) -> Batch:
        """What is there, at most `max_records`; waits up to `timeout` seconds for the first record.

        Raises:
            SourceLost: It does not answer for now.
        """
        ...

    def commit(self, batch: Batch) -> None:
        """Never deliver this batch again. Batches are committed in the order in which they were read.

        Raises:
            SourceLost: It does not answer for now.
        """
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class RedisStreamSource:
    """One stream, read by a consumer group.

    The records of a user are spread over the consumers of a group, so that only one may work at a time
    (`stream.consume` sees to that). It begins with everything that was delivered and never acknowledged, by whomever:
    oldest first, so that a death does not change the order.

    Args:
        url: Address with `?stream=`.

    Raises:
        EvergreenError: The address names no stream.
    """

    partitioned = False

    def __init__(self, url: str) -> None:
        import redis

        self._client, self._stream = _redis(url)
        self._redis = redis
        self._name = socket.gethostname()
        self._left_over = True  # something may be delivered and not acknowledged

    def read(self, max_records: int, timeout: float) -> Batch:
        """See `ActionSource`."""
        try:
            entries = self._claim(max_records) if self._left_over else []
            if not entries:
                self._left_over = False
                entries = self._next(max_records, timeout)
        except self._redis.RedisError as error:
            self._left_over = True  # the answer may have been lost on its way, or the group with all that Redis held
            raise self._gone(error) from error
        ids = [i for i, _ in entries]
        return Batch([f.get(FIELD, b"") for _, f in entries], [i.decode() for i in ids], ids)

    def commit(self, batch: Batch) -> None:
        """See `ActionSource`."""
        try:
            self._client.xack(self._stream, GROUP, *batch.ends)
        except self._redis.RedisError as error:
            raise self._gone(error) from error

    def close(self) -> None:
        """See `ActionSource`."""
        self._client.close()

    def _gone(self, error: Exception) -> SourceLost:
        return SourceLost(f"the stream '{self._stream}' does not answer ({error})", "Start its Redis")

    def _claim(self, count: int) -> list[Any]:
        """The oldest entries that nobody acknowledged; makes the group if it is not there."""
        try:
            self._client.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except self._redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        start: Any = "0-0"
        while True:
            start, entries, *_ = self._client.xautoclaim(
                self._stream, GROUP, self._name, min_idle_time=0, start_id=start, count=count
            )
            if entries or start == b"0-0":
                return entries

    def _next(self, count: int, timeout: float) -> list[Any]:
        block = max(1, int(timeout * 1000))  # 0 would wait for ever
        found: Any = self._client.xreadgroup(GROUP, self._name, {self._stream: ">"}, count=count, block=block)
        return found[0][1] if found else []


class KafkaSource:
    """One topic; each consumer of the group has partitions of its own, and a user's records are in one of them.

    `KAFKA_USERNAME` and `KAFKA_PASSWORD` in the environment make it log in (SCRAM over TLS).

    Args:
        url: Address; the path is the topic.
    """

    partitioned = True

    def __init__(self, url: str) -> None:
        from confluent_kafka import Consumer

        servers, self._topic = _kafka(url)
        self._consumer = Consumer(
            {
                **_kafka_client(servers),
                "group.id": GROUP,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": 10_000,  # a dead consumer's partitions wait that long for another
            }
        )
        self._consumer.subscribe([self._topic])

    def read(self, max_records: int, timeout: float) -> Batch:
        """See `ActionSource`."""
        from confluent_kafka import TopicPartition

        first = self._consumer.poll(timeout)
        # `consume` alone would wait for all of max_records; what has already been fetched it gives at once.
        messages: list[Any] = [first, *self._consumer.consume(max_records - 1, 0)] if first is not None else []
        for error in (m.error() for m in messages if m.error() is not None):
            if error.fatal():
                raise EvergreenError(f"Kafka topic '{self._topic}' cannot be read ({error})", "Start the consumer anew")
            LOG.warning("Kafka topic '%s': %s", self._topic, error)
        messages = [m for m in messages if m.error() is None]
        ends = {m.partition(): m.offset() + 1 for m in messages}
        return Batch(
            [m.value() or b"" for m in messages],
            [f"{self._topic}/{m.partition()}/{m.offset()}" for m in messages],
            [TopicPartition(self._topic, p, offset) for p, offset in ends.items()],
        )

    def commit(self, batch: Batch) -> None:
        """See `ActionSource`. One that fails is made good by the next, or the records come once more."""
        from confluent_kafka import KafkaException

        try:
            self._consumer.commit(offsets=batch.ends, asynchronous=False)
        except KafkaException as error:
            LOG.warning("Kafka topic '%s' did not take a commit: %s", self._topic, error)

    def close(self) -> None:
        """See `ActionSource`."""
        self._consumer.close()


def open_source(url: str) -> ActionSource:
    """The source at an address.

    Raises:
        EvergreenError: The address is of no known kind, or names no stream or topic.
    """
    if urlsplit(url).scheme in ("redis", "rediss"):
        return RedisStreamSource(url)
    if urlsplit(url).scheme == "kafka":
        return KafkaSource(url)
    raise _unknown(url)


def publish(url: str, records: Iterable[tuple[str, bytes]]) -> int:
    """Append records to a stream, keyed by user.

    Args:
        url: Address of the source.
        records: (user, record) pairs.

    Returns:
        How many were written, all of them for good.

    Raises:
        EvergreenError: The address is wrong, or the stream did not take a record.
    """
    if urlsplit(url).scheme == "kafka":
        from confluent_kafka import Producer

        servers, topic = _kafka(url)
        producer = Producer({**_kafka_client(servers), "enable.idempotence": True, "linger.ms": 5})
        return publish_kafka(producer, topic, records)
    if urlsplit(url).scheme not in ("redis", "rediss"):
        raise _unknown(url)
    client, stream = _redis(url)
    count, rest = 0, iter(records)
    while block := list(islice(rest, _PIPELINE)):
        pipeline = client.pipeline(transaction=False)
        for _, record in block:
            pipeline.xadd(stream, {FIELD: record})
        pipeline.execute()
        count += len(block)
    client.close()
    return count


def publish_kafka(producer: "Producer", topic: str, records: Iterable[tuple[str, bytes]]) -> int:
    """`publish` by a producer that is there already."""
    failed: list[Any] = []
    count = 0
    for user, record in records:
        while True:
            try:
                producer.produce(topic, record, user, on_delivery=lambda e, _: failed.append(e) if e else None)
                break
            except BufferError:  # its queue is full: let it send
                producer.poll(0.05)
        count += 1
        if count % 1000 == 0:
            producer.poll(0)
    producer.flush()
    if failed:
        raise EvergreenError(f"{len(failed):,} of {count:,} records were not written ({failed[0]})", "Try again")
    return count


def _redis(url: str) -> tuple["redis.Redis", str]:
    import redis

    parts = urlsplit(url)
    stream = parse_qs(parts.query).get("stream", [""])[0]
    if not stream:
        raise _unknown(url)
    bare = urlunsplit(parts._replace(query=""))
    return redis.Redis.from_url(bare, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS), stream


def _kafka(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    topic = parts.path.strip("/")
    if not parts.netloc or not topic:
        raise _unknown(url)
    return parts.netloc, topic


def _kafka_client(servers: str) -> dict[str, Any]:
    client: dict[str, Any] = {"bootstrap.servers": servers, "client.id": socket.gethostname()}
    if user := os.environ.get("KAFKA_USERNAME"):
        client |= {"security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": user}
        client["sasl.password"] = os.environ.get("KAFKA_PASSWORD", "")
    return client


def _unknown(url: str) -> EvergreenError:
    shown = url.rpartition("@")[2]  # no password in a message
    return EvergreenError(
        f"'{shown}' is no action stream", "Give redis://host:port/db?stream=NAME or kafka://host:port/topic"
    )
