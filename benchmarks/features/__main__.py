"""`python -m benchmarks.features [SECTION ...] [--runs N]`: measure and write docs/results/features.md.

A section that is not measured again stays as it was on the page.
"""

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

SECTIONS = ("offline", "offline_x10", "online", "stream", "aggregates", "sequences")
RESULT = Path(__file__).parents[2] / "docs" / "results" / "features.md"
_MARK = re.compile(r"<!-- (\w+) -->\n")


def measured() -> dict[str, str]:
    """The sections that the page holds."""
    if not RESULT.exists():
        return {}
    parts = _MARK.split(RESULT.read_text())[1:]
    return dict(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))


def main(wanted: list[str], runs: int) -> None:
    """Measure and write the page after each section."""
    if unknown := set(wanted) - set(SECTIONS):
        sys.exit(f"there is no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    code = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    stamp = f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    pages = measured()
    for name in wanted or SECTIONS:
        print(f"measuring {name} ...", flush=True)
        module = importlib.import_module(f"benchmarks.features.{name.removesuffix('_x10')}")
        section = (module.run(scale=10, runs=1) if name.endswith("_x10") else module.run(runs=runs)).strip()
        pages[name] = f"{section}\n\n*{stamp}, code {code.stdout.strip() or 'unknown'}.*"
        head = "# Features beside their peers\n\n`python -m benchmarks.features`. CPU seconds are the steady number.\n"
        body = [f"<!-- {n} -->\n{pages[n]}\n" for n in SECTIONS if n in pages]
        RESULT.write_text("\n".join([head, *body]))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    main(given.sections, given.runs)
