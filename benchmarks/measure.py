"""Measure one function in a process of its own: wall seconds, CPU seconds, peak memory.

    measured = measure("benchmarks.features.offline:ours", labels=1_000_000)

The function's arguments and its result are JSON. Only the call counts for the times, not the imports; the peak is that
of the whole process.
"""

import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Measured:
    result: Any
    wall: float  # seconds
    cpu: float  # seconds, user and system, children included
    peak_mb: float


def measure(target: str, python: str = sys.executable, timeout: float = 1800, **arguments: Any) -> Measured:
    """Call `module:function` with keyword arguments in a fresh interpreter (`python`: that of another environment)."""
    command = [python, "-m", "benchmarks.measure", target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{target} failed: {done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def median(runs: list[Measured]) -> Measured:
    """Medians of several runs of one thing; the result is that of the first."""
    wall, cpu, peak = (statistics.median(getattr(r, name) for r in runs) for name in ("wall", "cpu", "peak_mb"))
    return Measured(runs[0].result, wall, cpu, peak)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(module), name)
    start, cpu = time.perf_counter(), cpu_seconds()
    result = function(**json.loads(sys.argv[2]))
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({"result": result, "wall": wall, "cpu": cpu, "peak_mb": peak}))


if __name__ == "__main__":
    main()
