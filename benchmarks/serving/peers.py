"""Beside its peers: throughput, CPU and latency at 300 candidates, all around the same exported model."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.serving import contenders, load, servers, world
from benchmarks.serving.contenders import Contender

CLIENTS = (1, 4, 16)
ORT = "ONNX Runtime alone, in a loop"
STOCK_JSON, STOCK_BINARY = "stock KServe v2, JSON tensors", "stock KServe v2, binary tensors"
PATIENT = {"x-deadline-ms": "10000"}  # nothing is to be shed here, however slow the machine
GIVEN, OURS = "**ours, features given**", "**ours, full path**"


@dataclass(frozen=True)
class Entry:
    """A row of the table: a server, and what it is asked."""

    name: str
    server: str
    requests: Callable[[Path], list[bytes]]


ENTRIES = (
    Entry(STOCK_JSON, "stock", lambda room: [world.tensors(room, binary=False)]),
    Entry(STOCK_BINARY, "stock", lambda room: [world.tensors(room, binary=True)]),
    Entry("MLServer 1.7.1, JSON tensors", "mlserver", lambda room: [world.tensors(room, binary=False)]),
    Entry("FastAPI + orjson, JSON tensors", "bare", lambda room: [world.tensors(room, binary=False)]),
    Entry("FastAPI, binary tensors", "bare", lambda room: [world.raw(room)]),
    Entry(GIVEN, "given", lambda room: world.ranking(PATIENT)),
    Entry(OURS, "ours", lambda room: world.ranking(PATIENT)),
)
STARTS: dict[str, Callable[[Path], Contender]] = {
    "stock": contenders.local("stock"),
    "mlserver": contenders.mlserver,
    "bare": contenders.local("bare"),
    "given": contenders.local("given"),
    "ours": contenders.ours,
}


@dataclass(frozen=True)
class Turn:
    """One contender, one number of clients, one round."""

    rate: float  # answers a second
    cpu_ms: float  # a request
    p50_ms: float
    p99_ms: float
    wrong: int  # answers that were not 200


def run(room: Path, rounds: int, seconds: float) -> str:
    """Measure all, interleaved, and return a section of Markdown."""
    turns: dict[tuple[str, int], list[Turn]] = {}
    alone: list[float] = []
    with ExitStack() as stack:
        running, missing = _start(room, stack)
        asked = {e: e.requests(room) for e in ENTRIES if e.server in running}
        for entry, requests in asked.items():
            load.closed(running[entry.server].port, requests, 1, min(1.0, seconds))  # warm
        for _ in range(rounds):
            alone.append(_alone(room, seconds))
            for clients in CLIENTS:
                for entry, requests in asked.items():
                    turn = _turn(running[entry.server], requests, clients, seconds)
                    turns.setdefault((entry.name, clients), []).append(turn)
        startup = {name: (c.startup, c.megabytes()) for name, c in running.items()}
    return _table(turns, statistics.median(alone), startup, missing, rounds)


def _start(room: Path, stack: ExitStack) -> tuple[dict[str, Contender], dict[str, str]]:
    running, missing = {}, {}
    for name, begin in STARTS.items():
        try:
            running[name] = begin(room)
        except (RuntimeError, OSError) as error:
            if name != "mlserver":
                raise
            missing[name] = str(error).splitlines()[0][:200]
            continue
        stack.callback(running[name].stop)
    return running, missing


def _turn(server: Contender, requests: list[bytes], clients: int, seconds: float) -> Turn:
    cpu = server.cpu()
    seen = load.closed(server.port, requests, clients, seconds)
    p50, p99 = np.percentile(seen.seconds, [50, 99]) * 1e3
    count = len(seen.status)
    return Turn(count / seen.elapsed, (server.cpu() - cpu) / count * 1e3, p50, p99, sum(s != 200 for s in seen.status))


def _alone(room: Path, seconds: float) -> float:
    """CPU milliseconds of one run of the session."""
    session = servers.session(room)
    with np.load(room / world.FEED) as feed:
        given = dict(feed)
    session.run(None, given)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        session.run(None, given)
        count += 1
    return (time.process_time() - cpu) / count * 1e3


def _table(
    turns: dict[tuple[str, int], list[Turn]],
    alone: float,
    startup: dict[str, tuple[float, float]],
    missing: dict[str, str],
    rounds: int,
) -> str:
    def middle(name: str, clients: int, what: str) -> float:
        return statistics.median(getattr(t, what) for t in turns[name, clients])

    lines = [
        "### Beside its peers, 300 candidates",
        "",
        "One exported model of the laptop recipe for all, FP32, one thread. Peers take the model's tensors; ours takes "
        f"ids. Server on one core, generator on the other; closed loop; medians of {rounds} interleaved rounds.",
        "",
        "| server | CPU ms a request, c=1 | c=16 | requests/s, c=16 | p50 / p99 ms, c=1 | c=4 | c=16 | start s | MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        f"| {ORT} | {alone:.2f} | | | | | | | |",
    ]
    for entry in ENTRIES:
        if (reason := missing.get(entry.server)) is not None:
            lines.append(f"| {entry.name} | skipped: {reason} | | | | | | | |")
            continue
        at = [f"{middle(entry.name, c, 'p50_ms'):.1f} / {middle(entry.name, c, 'p99_ms'):.1f}" for c in CLIENTS]
        seconds, megabytes = startup[entry.server]
        lines.append(
            f"| {entry.name} | {middle(entry.name, 1, 'cpu_ms'):.2f} | {middle(entry.name, 16, 'cpu_ms'):.2f} "
            f"| {middle(entry.name, 16, 'rate'):.0f} "
            f"| {' | '.join(at)} | {seconds:.1f} | {megabytes:.0f} |"
        )
    wrong = sum(t.wrong for found in turns.values() for t in found)
    given, merged = middle(GIVEN, 1, "cpu_ms"), middle(GIVEN, 16, "cpu_ms")
    stock = {n: middle(GIVEN, 16, "rate") / middle(n, 16, "rate") for n in (STOCK_JSON, STOCK_BINARY)}
    cpu = {n: middle(n, 1, "cpu_ms") for n in (STOCK_JSON, STOCK_BINARY)}
    lines += [
        "",
        f"Answers that were not 200: {wrong}.",
        "",
        "| goal | reached |",
        "|---|---|",
        "| 10 × stock KServe v2's throughput or more | "
        f"{stock[STOCK_JSON]:.1f} × its JSON, {stock[STOCK_BINARY]:.1f} × its binary |",
        "| within 1.3 × of the ONNX Runtime loop (CPU, features given) | "
        f"{given / alone:.2f} × at c=1, {merged / alone:.2f} × at c=16, where requests are merged |",
        "",
        f"Around the model (CPU at c=1 less the loop's {alone:.2f} ms) a request costs ours {given - alone:.2f} ms, "
        f"stock KServe {cpu[STOCK_JSON] - alone:.1f} (JSON) and {cpu[STOCK_BINARY] - alone:.1f} (binary): "
        f"{(cpu[STOCK_JSON] - alone) / max(given - alone, 0.01):.0f} × and "
        f"{(cpu[STOCK_BINARY] - alone) / max(given - alone, 0.01):.0f} ×.",
    ]
    return "\n".join(lines)
