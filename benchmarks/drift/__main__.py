"""`python -m benchmarks.drift [SECTION ...]`: measure the drift monitors and write docs/results/drift.md."""

import argparse
import importlib
from collections.abc import Callable

from benchmarks import page

HEAD = """# The drift monitors, measured

`python -m benchmarks.drift`. Windows and streams are simulated, so what changed in them is known.
"""

TITLES = {
    "speed": "Speed: sketches beside stock Evidently",
    "agreement": "Agreement with Evidently's own scores",
    "alarms": "False alarms and detection delay",
    "year": "A year of checks in the Evidently UI",
}


def measured(name: str) -> Callable[[], str]:
    """A section's own module is imported when it is measured, not before."""

    def section() -> str:
        module = importlib.import_module(f"benchmarks.drift.{name}")
        return f"## {TITLES[name]}\n\n{module.section()}"

    return section


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"{', '.join(TITLES)}; all by default")
    given = parser.parse_args()
    page.write("drift.md", HEAD, {name: measured(name) for name in TITLES}, given.sections)
