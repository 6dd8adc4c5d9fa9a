"""`python -m benchmarks.simulate [SECTION ...]`: how fast a feed is simulated, and in how much memory.

Writes docs/results/simulate.md. One core: every library is told to use one thread.
"""

import os
import sys
import tempfile
from pathlib import Path

from benchmarks import page
from benchmarks.measure import measure

SIZES = ((1_000, 100_000), (10_000, 1_000_000), (100_000, 10_000_000))  # users, impressions
DAYS = 84
HEAD = """# The simulator

`python -m benchmarks.simulate`.
"""


def simulated(users: int, impressions: int) -> float:
    """Write a feed of `DAYS` days of the world `recurring`; returns its megabytes."""
    import pyarrow as pa

    from engagement.simulate.worlds import Scale, recurring
    from engagement.simulate.write import simulate

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "feed"
        simulate(recurring(), Scale.of(users, DAYS, impressions), out)
        return sum(f.stat().st_size for f in out.rglob("*.parquet")) / 1e6


def scale() -> str:
    """Rows a second and peak memory by number of impressions."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    lines = ["| users | impressions | CPU s | rows a CPU s | peak memory | on disk, truth included |", "|" + "--:|" * 6]
    for users, impressions in SIZES:
        m = measure("benchmarks.simulate:simulated", users=users, impressions=impressions)
        lines.append(
            f"| {users:,} | {impressions:,} | {m.cpu:.1f} | {impressions / m.cpu:,.0f} | {m.peak_mb:,.0f} MB "
            f"| {m.result:,.0f} MB |"
        )
    return "### Drawing and writing, one core\n\n" + "\n".join(lines)


if __name__ == "__main__":
    page.write("simulate.md", HEAD, {"scale": scale}, sys.argv[1:])
