"""A load generator over raw sockets: prepared requests, kept-alive connections, as little work as Python allows.

Closed loop for throughput: so many clients, each asks as soon as it has its answer. Open loop for latency: requests
arrive when a Poisson process says, whether or not the server keeps up, and their time counts from then on.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PATIENCE = 30.0  # seconds for one answer
CONNECTIONS = 400  # of an open loop


@dataclass
class Seen:
    """Answers: status, seconds, and which of the prepared requests it was."""

    status: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    elapsed: float = 0.0

    def add(self, status: int, seconds: float, which: int) -> None:
        self.status.append(status)
        self.seconds.append(seconds)
        self.which.append(which)


class _Connection(asyncio.Protocol):
    """One request at a time; the answer's status when it is complete."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport) -> None:
        self._transport = transport

    def connection_lost(self, error) -> None:
        if self._answer and not self._answer.done():
            said = bytes(self._data[:300]).decode(errors="replace")
            self._answer.set_exception(ConnectionError(f"the server closed the connection after {said!r}"))

    def data_received(self, data: bytes) -> None:
        self._data += data
        head = self._data.find(b"\r\n\r\n")
        if head < 0:
            return
        headers = bytes(self._data[:head]).lower()
        at = headers.find(b"content-length:")
        if at >= 0:
            done = len(self._data) >= head + 4 + int(headers[at + 15 :].split(b"\r\n", 1)[0])
        else:
            done = self._data.endswith(b"0\r\n\r\n")
        if done and self._answer and not self._answer.done():
            status = int(headers[9:12])
            self._data.clear()
            self._answer.set_result(status)

    async def ask(self, request: bytes) -> int:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await asyncio.wait_for(self._answer, PATIENCE)


async def _connect(port: int) -> _Connection:
    return (await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port))[1]


async def _closed(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Seen:
    seen, turn, start = Seen(), itertools.count(), time.perf_counter()

    async def client() -> None:
        connection = await _connect(port)
        while (now := time.perf_counter()) < start + seconds:
            which = next(turn) % len(requests)
            status = await connection.ask(requests[which])
            seen.add(status, time.perf_counter() - now, which)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.elapsed = time.perf_counter() - start
    return seen


async def _open(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> Seen:
    seen, idle, count = Seen(), list[_Connection](), 0
    gaps = np.random.default_rng(0).exponential(1 / rate, max(1, int(rate * seconds)))
    start = time.perf_counter()

    async def one(due: float, which: int) -> None:
        nonlocal count
        if not idle and count >= CONNECTIONS:
            seen.add(0, 0.0, which)
            return
        if not idle:
            count += 1
            idle.append(await _connect(port))
        connection = idle.pop()
        try:
            status = await connection.ask(requests[which])
        except (ConnectionError, TimeoutError):
            count -= 1
            seen.add(0, time.perf_counter() - due, which)
            return
        seen.add(status, time.perf_counter() - due, which)
        idle.append(connection)

    tasks = []
    for index, due in enumerate(start + np.cumsum(gaps)):
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(due, index % len(requests))))
    await asyncio.gather(*tasks)
    seen.elapsed = time.perf_counter() - start
    return seen


def closed(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Seen:
    """So many clients for so long."""
    return _run(_closed(port, requests, clients, seconds))


def opened(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> Seen:
    """So many requests a second for so long; status 0 where there was no answer."""
    return _run(_open(port, requests, rate, seconds))


def _run(work) -> Seen:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
