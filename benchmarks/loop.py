"""`make bench`: run the two slots of `make run` in a fresh home, three times, and write docs/results/loop.md.

Numbers are wall seconds by stage (median, and the spread over the runs) and HIT@3 with its interval.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

RUNS = 3
SLOTS = ("1998-04-02T03:00", "1998-04-06T03:00")
RESULT = Path(__file__).parents[1] / "docs" / "results" / "loop.md"


def evergreen(home: Path, *arguments: str) -> str:
    """One command; exit code 3 (held by the gate) is a good end, too."""
    command = [sys.executable, "-m", "evergreen.cli", "--home", str(home), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode not in (0, 3):
        sys.exit(f"{' '.join(arguments)} failed: {done.stderr[-500:]}")
    return done.stdout


def one_run(home: Path) -> tuple[list[dict], list[dict]]:
    """Results and stage timings of the two slots."""
    evergreen(home, "data", "fetch", "movielens-100k")
    slots = [word for slot in SLOTS for word in ("--as-of", slot)]
    results = json.loads(evergreen(home, "retrain", *slots, "--json"))
    timings = [json.loads((home / "runs" / r["run_key"] / "timings.json").read_text()) for r in results]
    return results, timings


def hit3(measured: dict | None) -> str:
    if not measured:
        return "–"
    low, high = measured["interval"]["save"]
    return f"{measured['hit3']['save']:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Measure and write the page."""
    runs = []
    for i in range(RUNS):
        with tempfile.TemporaryDirectory() as room:
            runs.append(one_run(Path(room) / "home"))
        print(f"run {i + 1} of {RUNS}: {sum(sum(t.values()) for t in runs[-1][1]):.0f} s")
    results = runs[0][0]
    lines = [
        "# The loop on MovieLens 100K",
        "",
        f"`make bench`, {date.today()}, {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, "
        f"code {results[0]['code']}, recipe {results[0]['recipe']}, seed {results[0]['seed']}, "
        f"snapshots {', '.join(r['snapshot'][:12] for r in results)}.",
        "",
        "| slot | requests | champion HIT@3/save | challenger HIT@3/save | gate |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        gate = r["gate"]
        shown = (hit3(gate["metrics"][who]) for who in ("champion", "challenger"))
        lines.append(
            f"| {r['as_of']:.16} | {gate['requests']} | {' | '.join(shown)} | {gate['verdict']}: {gate['reason']} |"
        )
    lines += [
        "",
        f"Wall seconds by stage, median of {RUNS} runs (least to most):",
        "",
        "| stage | slot 1 | slot 2 |",
        "|---|---|---|",
    ]
    stages = list(dict.fromkeys(stage.removesuffix("-2") for _, timings in runs for t in timings for stage in t))
    for stage in stages:
        cells = []
        for slot in range(2):
            seconds = [t[slot].get(stage, t[slot].get(f"{stage}-2", 0.0)) for _, t in runs]
            cells.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    totals = [sum(sum(t.values()) for t in timings) for _, timings in runs]
    lines += ["", f"Both slots: {statistics.median(totals):.0f} s ({min(totals):.0f}–{max(totals):.0f}).", ""]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text("\n".join(lines))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
