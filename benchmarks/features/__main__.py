"""`python -m benchmarks.features [SECTION ...] [--runs N]`: measure and write docs/results/features.md."""

import argparse
import importlib
from functools import partial

from benchmarks import page

SECTIONS = ("offline", "offline_x10", "online", "stream", "aggregates", "sequences")
HEAD = "# Features beside their peers\n\n`python -m benchmarks.features`. CPU seconds are the steady number.\n"


def section(name: str, runs: int) -> str:
    module = importlib.import_module(f"benchmarks.features.{name.removesuffix('_x10')}")
    return module.run(scale=10, runs=1) if name.endswith("_x10") else module.run(runs=runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    page.write("features.md", HEAD, {name: partial(section, name, given.runs) for name in SECTIONS}, given.sections)
