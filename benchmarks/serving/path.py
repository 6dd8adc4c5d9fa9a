"""The full path, features included, under a given load: 70 % of what it can do, and twice as much as it can."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.serving import contenders, load, world
from benchmarks.serving.load import Seen
from benchmarks.serving.peers import PATIENT

PRIORITIES = ("high", "normal", "low")
DEADLINE_MS = 250


def run(room: Path, seconds: float) -> str:
    """Measure and return a section of Markdown."""
    server = contenders.ours(room)
    try:
        plain = world.ranking()
        patient = world.ranking(PATIENT)
        load.closed(server.port, patient, 1, 1.0)
        capacity = float(np.median([_rate(server.port, patient, seconds / 3) for _ in range(3)]))
        seventy = [load.opened(server.port, plain, 0.7 * capacity, seconds) for _ in range(3)]
        by_priority = [world.ranking({"x-priority": p, "x-deadline-ms": str(DEADLINE_MS)}) for p in PRIORITIES]
        mixed = list(itertools.chain.from_iterable(zip(*by_priority, strict=True)))
        double = load.opened(server.port, mixed, 2 * capacity, seconds)
        alive = load.closed(server.port, plain, 1, 1.0)
    finally:
        server.stop()
    p50, p99 = (float(np.median([np.percentile(s.seconds, q) for s in seventy])) * 1e3 for q in (50, 99))
    wrong = sum(status != 200 for s in [*seventy, alive] for status in s.status)
    return "\n".join(
        [
            "### Full path under load",
            "",
            f"Ids in, features read from the online store in SQLite ({world.online.ITEMS:,} items), ranked, logged, "
            f"ids out; open loop (Poisson arrivals; time counts from when a request was due). Capacity, closed loop "
            f"at c=16: {capacity:.0f} requests/s on one core.",
            "",
            "| load | answers | p50 ms | p99 ms | not 200 |",
            "|---|--:|--:|--:|--:|",
            f"| 70 % (goal: p99 < 100 ms) | {sum(len(s.status) for s in seventy)} | {p50:.1f} | {p99:.1f} | {wrong} |",
            "",
            f"At 200 % with a deadline of {DEADLINE_MS} ms, a third of the requests each priority:",
            "",
            "| priority | asked | answered | shed (429) | late (504) | no answer | p50 / p99 ms of the answered "
            "| answered after the deadline |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
            *(_row(double, i) for i in range(len(PRIORITIES))),
        ]
    )


def _rate(port: int, requests: Sequence[bytes], seconds: float) -> float:
    seen = load.closed(port, requests, 16, seconds)
    return len(seen.status) / seen.elapsed


def _row(seen: Seen, which: int) -> str:
    mine = [i for i, w in enumerate(seen.which) if w % len(PRIORITIES) == which]
    status = [seen.status[i] for i in mine]
    taken = np.array([seen.seconds[i] for i in mine if seen.status[i] == 200]) * 1e3
    p50, p99 = np.percentile(taken, [50, 99]) if len(taken) else (np.nan, np.nan)
    share = {s: f"{100 * status.count(s) / max(1, len(status)):.1f} %" for s in (200, 429, 504, 0)}
    return (
        f"| {PRIORITIES[which]} | {len(mine)} | {share[200]} | {share[429]} | {share[504]} | {share[0]} "
        f"| {p50:.0f} / {p99:.0f} | {int((taken > DEADLINE_MS).sum())} |"
    )
