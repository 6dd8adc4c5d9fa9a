"""A year of hourly checks: what is kept takes so much disk, and the Evidently UI opens in so many seconds.

One check with plots is made by the real code; the others are copies of its snapshot with a verdict, numbers and tables
of their own. They come week by week through `workspace.rebuild`, the last two days hour by hour through
`workspace.record`; both thin by `monitoring/keep.py`. Beside it the same year unthinned: every snapshot, without plots.
"""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from evergreen.settings import LOOPBACK, TELEMETRY_OFF
from monitoring import keep, page, panels, workspace
from monitoring.compare import Pair
from monitoring.counts import numbers
from monitoring.verdict import ColumnDrift, DataTest, DriftVerdict, Outcome, ServingHealth

YEAR = 365 * 24
COLUMNS = 50
START = datetime(2025, 3, 3, tzinfo=UTC)
MODEL = "homefeed-ranker"
HOUR = timedelta(hours=1)
START_LIMIT, SHOW_LIMIT = 300.0, 120.0  # seconds that a UI and a dashboard are waited for


@dataclass(frozen=True)
class Opened:
    """How a UI opened: seconds to the first answer, seconds until every panel shows, MB of its process."""

    start: float | None
    panels: float | None
    memory: float


def section(hours: int = YEAR) -> str:
    """Make the year, thinned and not, and open both."""
    with tempfile.TemporaryDirectory(prefix="year-") as name:
        root = Path(name)
        seconds = make(root, hours)
        kept = _row("by the policy", root / "evidently", open_ui(root / "evidently"))
        whole = _row("every snapshot", root / "whole", open_ui(root / "whole"))
        count, size = _size(root / "checks")
        full = sum((d / "drift.html").exists() for d in (root / "checks").iterdir())
    return (
        f"{hours:,} hourly checks of {COLUMNS} columns; {seconds:.2f} s to record one (median of the last 48, "
        "thinning included). Snapshots without plots are copies of a real one with numbers of their own.\n\n"
        "| kept | runs | files | MB | UI: first answer | dashboard: all panels | memory of the UI |\n"
        f"|---|---|---|---|---|---|---|\n{kept}\n{whole}\n\n"
        f"The check directories: {count:,} files, {size:,.0f} MB, {full} with a page "
        f"(the policy promises {keep.MOST_BYTES / 1e6:,.0f} MB for all together)."
    )


def make(root: Path, hours: int) -> float:
    """Record the year under `root`: `checks`, `evidently`, and `whole` without thinning; returns seconds a record."""
    snapshot, whole_page = _real_check(root / "first")
    template = json.loads(page.trimmed(snapshot))
    draw, took = np.random.default_rng(0), []
    unthinned = root / "whole" / str(workspace.project_id_of(MODEL)) / "snapshots"
    unthinned.mkdir(parents=True)
    for hour in range(hours):
        at = START + HOUR * hour
        found = _verdict(draw, at, drifted=hour % 500 in range(470, 490))
        out, young = root / "checks" / keep.stamp(at), hours - hour <= 72 or hour % 500 in (470, 490)
        out.mkdir(parents=True)
        text = json.dumps(_numbered(template, found))
        (unthinned / f"{workspace.run_id_of(MODEL, found)}.json").write_text(text)
        (out / "snapshot.json").write_text(_numbered_text(snapshot, found) if hours - hour <= 3 else text)
        (out / "drift.html").write_text(whole_page if young else page.without_plots(found))
        (out / "drift.json").write_text(found.to_json())
        if hours - hour <= 48:
            begin = time.perf_counter()
            workspace.record(root / "evidently", MODEL, out)
            took.append(time.perf_counter() - begin)
        elif (hour + 1) % 168 == 0 or hours - hour == 49:
            workspace.rebuild(root / "evidently", MODEL, root / "checks")
    for name in ("metadata.json", "dashboard.json"):
        shutil.copy(root / "evidently" / unthinned.parent.name / name, unthinned.parent)
    return float(np.median(took))


def open_ui(space: Path) -> Opened:
    """Start the UI over a workspace and open its dashboard in Chromium."""
    from playwright.sync_api import Error, sync_playwright

    begin = time.monotonic()
    with _served(space) as (process, base):
        if not _answers(process, base, begin + START_LIMIT):
            return Opened(None, None, _memory(process.pid))
        start = time.monotonic() - begin
        project = workspace.project_id_of(MODEL)
        wanted = sum(bool(p["values"]) for p in httpx.get(f"{base}/api/v2/dashboards/{project}").json()["panels"])
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            begin = time.monotonic()
            drawn = "[class*=MuiMarkElement],[class*=MuiLineElement],[class*=MuiBarElement]"
            shown = f"[...document.querySelectorAll('svg')].filter(s => s.querySelector('{drawn}')).length >= {wanted}"
            try:
                tab.goto(f"{base}/projects/{project}", timeout=SHOW_LIMIT * 1000)
                tab.wait_for_function(shown, timeout=SHOW_LIMIT * 1000)
                seen: float | None = time.monotonic() - begin
            except Error:
                seen = None
            browser.close()
        return Opened(start, seen, _memory(process.pid))


@contextmanager
def _served(space: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "evidently.cli", "ui", "--host", LOOPBACK, "--port", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--workspace", str(space)], env={**os.environ, **TELEMETRY_OFF}, **quiet)
    try:
        yield process, f"http://{LOOPBACK}:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(process: subprocess.Popen[bytes], base: str, deadline: float) -> bool:
    """Whether the UI lists its projects before the deadline; it loads its workspace for the first who asks."""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{base}/api/projects", timeout=max(1.0, deadline - time.monotonic())).status_code == 200:
                return True
        except httpx.HTTPError:
            time.sleep(0.1)
    return False


def _memory(pid: int) -> float:
    """MB of a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def _size(directory: Path) -> tuple[int, float]:
    """Files and MB on the disk, blocks counted, directories too."""
    paths = [directory, *directory.rglob("*")]
    return sum(p.is_file() for p in paths), sum(p.stat().st_blocks for p in paths) * 512 / 1e6


def _row(name: str, space: Path, opened: Opened) -> str:
    count, size = _size(space)
    runs = len(list(space.glob("*/snapshots/*.json")))
    start = f"{opened.start:.1f} s" if opened.start is not None else f"not in {START_LIMIT:.0f} s"
    seen = f"{opened.panels:.1f} s" if opened.panels is not None else f"not in {SHOW_LIMIT:.0f} s"
    return f"| {name} | {runs:,} | {count:,} | {size:,.0f} | {start} | {seen} | {opened.memory:,.0f} MB |"


def _real_check(out: Path) -> tuple[str, str]:
    """Snapshot and page of one check of `COLUMNS` columns, plots and all."""
    draw = np.random.default_rng(1)
    found = _verdict(draw, START, drifted=False)
    names = [c.name for c in found.columns if c.kind == "numeric"]
    sides = [[numbers(draw.normal(size=n).astype(np.float32), 0.0) for n in (20_000, 5_000)] for _ in names]
    pairs = [Pair(name, "numeric", 0.0, *both, {}) for name, both in zip(names, sides, strict=True)]
    page.save(found, pairs, out)
    return (out / "snapshot.json").read_text(), (out / "drift.html").read_text()


def _numbered(template: dict[str, Any], found: DriftVerdict) -> dict[str, Any]:
    """A snapshot with the numbers, the tags and the instant of another verdict."""
    data = copy.copy(template)
    known = panels.numbers(found)
    data["metric_results"] = {k: _valued(r, known) for k, r in template["metric_results"].items()}
    data["timestamp"] = page.naive(datetime.fromisoformat(found.as_of)).isoformat()
    data["tags"] = [f"kind:{found.kind}", f"model:{found.model_version}", f"slot:{found.slot}"]
    state = "drifted" if found.drifted else "not drifted"
    data["metadata"] = {**template["metadata"], "as_of": found.as_of, "kind": found.kind, "drift": state}
    return data


def _numbered_text(text: str, found: DriftVerdict) -> str:
    return json.dumps(_numbered(json.loads(text), found))


def _valued(result: dict[str, Any], known: dict[str, float]) -> dict[str, Any]:
    name = result["metric_value_location"]["metric"]["params"]["column"]
    return {**result, "value": known.get(name, result["value"])}


def _verdict(draw: np.random.Generator, at: datetime, drifted: bool) -> DriftVerdict:
    """A verdict of `COLUMNS` columns; in a drift every fifth feature is above its threshold."""
    scores = np.abs(draw.normal(0.08, 0.03, COLUMNS))
    scores[::5] += 0.5 * drifted

    def column(i: int) -> ColumnDrift:
        name, group = (f"user_stats__number_{i}", "statistic") if i else ("score_save", "prediction")
        note = "median 3.1 → 12" if scores[i] >= 0.3 else ""
        return ColumnDrift(
            name, "numeric", group, float(scores[i]), 0.07, 0.3, bool(scores[i] >= 0.3), (0.01, 0.01), note
        )

    new_items = ColumnDrift("new item_id", "vocabulary", "item", float(scores[-1]), 0.07, 0.3, False, (0.0, 0.0))
    hit3 = 0.3 + float(draw.normal(0, 0.01))
    shares = {"save": 0.05}
    outcome = Outcome(900, 300, {"save": hit3}, {"save": (hit3 - 0.02, hit3 + 0.02)}, shares, shares, {"save": 1.0},
                      40.0, 0.31, False, "HIT@3/save is as expected")  # fmt: skip
    tests = tuple(DataTest(f"missing: number_{i}", True, 0.01, "< 0.2", "1 % is missing") for i in range(10))
    calm = DriftVerdict(
        as_of=at.isoformat(),
        model_version=str(1 + (at - START).days // 4),
        slot=START.isoformat(),
        window=((at - HOUR * 6).isoformat(), at.isoformat()),
        drifted=drifted,
        kind="behaviour" if drifted else "none",
        evidence=("statistics moved, profiles did not",) if drifted else (),
        reason="10 of 49 features drifted" if drifted else "No column is above its threshold",
        columns=(*(column(i) for i in range(COLUMNS - 1)), new_items),
        slices=(),
        broken={},
        skipped={},
        requests=(9000, int(draw.integers(1500, 2500))),
        rows=(90_000, 20_000),
        users=(700, 300),
        data=tests,
        outcome=outcome,
    )
    return replace(calm, serving=ServingHealth(2500, 0.001, 0.0, {}, 8.0, float(draw.normal(21, 2))), skew_share=0.001)
