"""`python -m benchmarks.serving [SECTION ...] [--quick]`: measure and write docs/results/serving.md."""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import page
from benchmarks.measure import measure
from benchmarks.serving import contenders, path, peers

HEAD = "# Serving beside its peers\n\n`python -m benchmarks.serving` (10 minutes; `--quick`: 2, less steady).\n"


def main() -> None:
    """Make the world once, then measure what is wanted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", help="peers, path; all by default")
    parser.add_argument("--quick", action="store_true", help="short rounds, printed and not written")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        room = Path(name)
        measure("benchmarks.serving.world:make", directory=name)
        os.sched_setaffinity(0, {contenders.GENERATOR_CORE})
        rounds, seconds, span = (1, 1.0, 5.0) if given.quick else (5, 4.0, 30.0)
        sections = {"peers": partial(peers.run, room, rounds, seconds), "path": partial(path.run, room, span)}
        if given.quick:
            for section in given.sections or sections:
                print(sections[section]())
            return
        page.write("serving.md", HEAD, sections, given.sections)


if __name__ == "__main__":
    sys.exit(main())
