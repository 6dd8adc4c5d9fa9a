"""Which checks are kept, and how much of each: a year of hourly checks opens fast and stays below `MOST_BYTES`.

    age                              kept                                            of the kept ones
    the newest `PLOTTED`             all                                             everything
    up to `PAGED`                    all                                             page; snapshot without plots
    up to `ALL`                      all                                             tables, no plots
    up to `BLOCKS`                   the first of each six hours                     tables, no plots
    up to `YEAR`                     the first of each day                           tables, no plots
    any up to `YEAR`                 the newest `EVENTS` where something happened    page for the newest `PAGES` of them
    older                            none

Something happened where drift, kind, broken columns, lost quality or a decision differ from the check before: a drift
that lasts is told by its begin and its end. Of what is thinned out only the numbers of the verdict stay (`drift.json`,
without notes and slices) and the decision; the run leaves the Evidently workspace.

The third newest check tells the time: a replay of history keeps what it made, and one check by a clock that is wrong
ages nothing. Which check is the first of its block never changes, so the policy applied again changes nothing.

A check directory: <checks>/20260302T030000/{drift.json, drift.html, snapshot.json, decision.json}.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

from engagement.errors import EvergreenError
from engagement.files import write_text
from monitoring import page
from monitoring.history import NAME, STAMP, stamp
from monitoring.verdict import DriftVerdict

PLOTTED = 3
PAGED = timedelta(hours=24)  # a page with plots takes 4 MB, most of it Evidently's script
ALL = timedelta(hours=48)
BLOCKS, BLOCK = timedelta(days=14), timedelta(hours=6)
YEAR, DAY = timedelta(days=365), timedelta(days=1)
EVENTS = 300
PAGES = 50
MOST_BYTES = 10**9
"""What a year of hourly checks of 50 columns takes at most, checks and workspace together."""

_GONE = ".gone-"  # begins the name of a directory that is being deleted
_WHOLE_PAGE = 1_000_000  # bytes: a page with plots holds Evidently's script of 3.6 MB, one without holds 20 kB


class Level(IntEnum):
    """How much of a check is kept."""

    GONE = 0
    THIN = 1  # the numbers of the verdict
    TABLES = 2
    PAGE = 3
    PLOTS = 4


@dataclass(frozen=True)
class State:
    """What must differ from the check before for something to have happened; the defaults are a calm check."""

    drifted: bool = False
    kind: str = "none"
    broken: tuple[str, ...] = ()
    lost: bool = False
    action: str = "none"


def plan(happened: Mapping[str, bool], spared: str = "") -> dict[str, Level]:
    """The policy: how much is kept of each check.

    Args:
        happened: By stamp of a check that is not yet thinned out, whether something happened there.
        spared: Stamp of a check whose page is kept whatever its age: somebody made it just now, to look at.
    """
    times = {name: datetime.strptime(name, STAMP) for name in sorted(happened)}
    newest = list(times)[-PLOTTED:]
    if not newest:
        return {}
    now = times[newest[0]]
    events = [name for name in reversed(times) if happened[name] and now - times[name] <= YEAR][:EVENTS]
    levels: dict[str, Level] = {}
    blocks: set[datetime] = set()
    for name, at in times.items():
        age = now - at
        width = BLOCK if age <= BLOCKS else DAY
        block = datetime.min + (at - datetime.min) // width * width
        first = block not in blocks
        blocks.add(block)
        if age > YEAR:
            levels[name] = Level.GONE
        elif name in newest:
            levels[name] = Level.PLOTS
        elif age <= PAGED or name in events[:PAGES]:
            levels[name] = Level.PAGE
        else:
            levels[name] = Level.TABLES if first or age <= ALL or name in events else Level.THIN
        if name == spared:
            levels[name] = max(levels[name], Level.PAGE)
    return levels


def stamps(checks: Path) -> list[str]:
    """Every check directory, oldest first."""
    return sorted(p.name for p in checks.glob("*T*") if NAME.fullmatch(p.name)) if checks.is_dir() else []


def events(checks: Path) -> dict[str, bool]:
    """By stamp, whether something happened, for each check that still has its snapshot."""
    found: dict[str, bool] = {}
    before = ""
    known: State | None = State()  # of `before`; None where nobody asked for it
    for name in stamps(checks):
        now = None
        if (checks / name / "snapshot.json").exists():
            now = state(checks / name)
            found[name] = now != (state(checks / before) if known is None else known)
        before, known = name, now
    return found


def state(check: Path) -> State:
    """The state of a check; a calm one where it did not finish or cannot be read."""
    try:
        verdict = DriftVerdict.load(check / "drift.json")
    except EvergreenError:
        return State()
    try:
        action = str(json.loads((check / "decision.json").read_text())["action"])
    except (OSError, ValueError, KeyError, TypeError):
        action = "none"
    lost = bool(verdict.outcome and verdict.outcome.lost)
    return State(verdict.drifted, verdict.kind, tuple(sorted(verdict.broken)), lost, action)


def thin(checks: Path, levels: Mapping[str, Level]) -> None:
    """Bring each check directory to its level; killed at any point, the next call ends what was begun.

    `snapshot.json` goes last: a directory that has one is looked at again.
    """
    for name, level in levels.items():
        check = checks / name
        if not check.is_dir():
            continue
        if level == Level.THIN:
            _rewrite(check / "drift.json", small)
            (check / "drift.html").unlink(missing_ok=True)
            (check / "snapshot.json").unlink(missing_ok=True)
        elif Level.THIN < level < Level.PLOTS:
            if level == Level.TABLES:
                _tables(check)
            _rewrite(check / "snapshot.json", page.trimmed, needed=page.has_plots)
    _forget(checks, levels)


def _forget(checks: Path, levels: Mapping[str, Level]) -> None:
    """Delete the directories of checks that are older than a year, whatever was kept of them; a rename comes first,
    so that none is half there."""
    newest = [name for name, level in levels.items() if level == Level.PLOTS]
    if newest:
        end = stamp(datetime.strptime(newest[0], STAMP).replace(tzinfo=UTC) - YEAR)
        for name in stamps(checks):
            if name < end and levels.get(name, Level.GONE) < Level.PAGE:
                (checks / name).rename(checks / (_GONE + name))
    for left in checks.glob(f"{_GONE}*"):
        shutil.rmtree(left, ignore_errors=True)


def _tables(check: Path) -> None:
    """Replace a page with plots by one without."""
    path = check / "drift.html"
    if path.exists() and path.stat().st_size > _WHOLE_PAGE:
        try:
            verdict = DriftVerdict.load(check / "drift.json")
        except EvergreenError:
            return
        write_text(path, page.without_plots(verdict, "The plots of this check were thinned out with age."))


def _rewrite(path: Path, change: Any, needed: Any = lambda text: True) -> None:
    try:
        text = path.read_text()
        changed = change(text) if needed(text) else text
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # missing or damaged: nothing to save
    if changed != text:
        write_text(path, changed)


def small(text: str) -> str:
    """A verdict without what only a page tells: every column keeps its numbers, to four digits."""
    verdict = DriftVerdict.from_json(text)
    columns = tuple(replace(c, note="") for c in verdict.columns)
    kept = replace(verdict, columns=columns, slices=(), evidence=verdict.evidence[:1])
    kept = replace(kept, data=tuple(t for t in verdict.data if not t.passed))
    return json.dumps(_rounded(asdict(kept)), separators=(",", ":"), sort_keys=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(held) for name, held in value.items()}
    return [_rounded(held) for held in value] if isinstance(value, list | tuple) else value
