"""`python -m benchmarks.gate [SECTION ...]`: measure and write docs/results/gate.md (a few minutes)."""

import argparse
from collections.abc import Callable
from functools import partial

from benchmarks import page
from benchmarks.gate import rates, real, year

HEAD = """# How often the gate is wrong

`python -m benchmarks.gate`. Pairs of models are simulated (`benchmarks/gate/pairs.py`), so the truth is known; the
gate's own code and thresholds decide about them.
"""


def headed(title: str, section: Callable[[], str]) -> str:
    return f"### {title}\n\n{section()}"


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "rates": ("False promotions and power", rates.run),
    "few": ("Few users", rates.few),
    "slices": ("Slices", rates.slices),
    "real": ("Real pairs, MovieLens 100K", real.run),
    "year": ("A year of gates: why fresher counts", year.run),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; all by default")
    given = parser.parse_args()
    page.write("gate.md", HEAD, {n: partial(headed, *s) for n, s in SECTIONS.items()}, given.sections)
