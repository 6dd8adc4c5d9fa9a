"""`python -m benchmarks.continual [SECTION ...]`: measure and write docs/results/continual.md.

A replay that was killed goes on where it was; one that is known is only read.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

from benchmarks import page
from benchmarks.continual import section, update
from benchmarks.continual.strategies import FAMILY, FRONTIER, SHORT

HEAD = """# Continual learning, replayed

`python -m benchmarks.continual`. Test, then train, slot after slot: every strategy is tested on the next window, then
learns it. Brackets are 95 % intervals (bootstrap over users, the same resamples for all strategies, on the mean over
seeds); costs are means of one update.
"""
REPLAYS = {
    "movielens": ("MovieLens 100K", "movielens", SHORT),
    "kuairand": ("KuaiRand", "kuairand", SHORT),
    "recurring": ("Seasons that come back (simulated)", "recurring", FAMILY),
    "drift": ("Steady drift (simulated)", "drift", SHORT),
    "shock": ("A holiday shock (simulated)", "shock", SHORT),
    "frontier": ("Stability and plasticity by penalty strength (recurring)", "recurring", FRONTIER),
}


def headed(title: str, measured: Callable[[], str]) -> str:
    return f"### {title}\n\n{measured()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"{', '.join([*REPLAYS, 'update'])}; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    sections = {
        name: partial(headed, title, partial(section.run, name, data, strategies, given.seeds, given.jobs))
        for name, (title, data, strategies) in REPLAYS.items()
    }
    sections["update"] = partial(headed, "One update", update.run)
    page.write("continual.md", HEAD, sections, given.sections)
