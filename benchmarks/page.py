"""A page of results in docs/results: one section a measurement; those not measured again stay as they were."""

import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"
_MARK = re.compile(r"<!-- (\w+) -->\n")


def spread(values: list[float], digits: int = 4) -> str:
    """Mean ± standard deviation; of one value that alone, of none a dash."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def write(name: str, head: str, sections: dict[str, Callable[[], str]], wanted: list[str]) -> None:
    """Measure the wanted sections, all by default, and write the page after each.

    Args:
        name: Of the file.
        head: Title and first lines.
        sections: What measures a section and gives its Markdown, in the order of the page.
        wanted: Names of sections.
    """
    if unknown := set(wanted) - set(sections):
        sys.exit(f"there is no section {sorted(unknown)[0]!r}; there are {', '.join(sections)}")
    code = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    stamp = f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    path = RESULTS / name
    parts = _MARK.split(path.read_text())[1:] if path.exists() else []
    pages = dict(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))
    for section in wanted or sections:
        print(f"measuring {section} ...", flush=True)
        text = sections[section]().strip()
        pages[section] = f"{text}\n\n*{stamp}, code {code.stdout.strip() or 'unknown'}.*"
        body = [f"<!-- {n} -->\n{pages[n]}\n" for n in sections if n in pages]
        path.write_text("\n".join([head, *body]))
    print(f"wrote {path}")
