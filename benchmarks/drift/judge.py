"""What the answers of a monitor are worth, held against the truth of their streams.

An alarm episode is a run of checks that follow each other and all alarm. It is false if it begins in a window without
any drift. A drift is found at the first check that alarms once it has begun. Checks are counted from the onset: check
0 is the one whose window the onset lies in (that sees anything between minutes and all of it), check 1 the first whose
window lies wholly behind it. A slow drift that is seen before it has reached its stated size is found at check 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from benchmarks.drift.streams import EVERY, SCENARIOS, Scenario, Truth
from monitoring.sketch import SCORE

MONTH = timedelta(days=30)
HOUR = timedelta(hours=1)
QUIET = 8  # checks without an alarm: two days
SOON = 2  # checks within which a drift should be found
PERSISTS = 3  # checks of which two must agree: this one and one of those before it
NEW_MARKET = ("new users", "new items", "user_profile__country=nl", "context__language=nl", "item_profile__category=c2")


@dataclass(frozen=True)
class Said:
    """The answer of a monitor at one check.

    Attributes:
        as_of: ISO instant; the window is the six hours before it.
        alarm: Whether it alarms.
        kind: What it takes it for.
        columns: Which columns it names, worst first.
        slices: Which slices, worst first.
        detail: Scores by threshold, for people.
        retrain: Whether another early retrain follows, where alarms are acted on.
    """

    as_of: str
    alarm: bool
    kind: str
    columns: tuple[str, ...]
    slices: tuple[str, ...] = ()
    detail: tuple[str, ...] = ()
    retrain: bool = False

    @property
    def end(self) -> datetime:
        """Of the window."""
        return datetime.fromisoformat(self.as_of)


@dataclass(frozen=True)
class Run:
    """One stream and what was said of it: `acted` after its early retrain, `hourly` of checks every hour."""

    scenario: Scenario
    seed: int
    truth: Truth
    ours: tuple[Said, ...]
    stock: tuple[Said, ...]
    acted: tuple[Said, ...] = ()
    hourly: tuple[Said, ...] = ()

    @classmethod
    def read(cls, data: dict[str, Any]) -> "Run":
        """From JSON."""
        told = data["truth"]
        begin, onset = (datetime.fromisoformat(told[n]) for n in ("begin", "onset"))
        truth = Truth(told["kind"], begin, onset, tuple(told["columns"]), told["what"])
        said = {
            who: tuple(Said(**{n: tuple(v) if isinstance(v, list) else v for n, v in s.items()}) for s in data[who])
            for who in ("ours", "stock", "acted", "hourly")
        }
        return cls(data["scenario"], data["seed"], truth, **said)

    @property
    def drifts(self) -> bool:
        """Whether anything happens."""
        return self.truth.kind != "none"


@dataclass(frozen=True)
class Judged:
    """What a monitor's answers about one stream are worth.

    Attributes:
        false: Alarm episodes before anything happened.
        quiet: Time in which there could be such.
        delay: Checks from the onset to the alarm; None if it never came.
        kind: Whether its kind was right at that check; None without an alarm.
        named: Whether the feature that it named first was one that moved.
        slice: Whether a slice that it named was the new market's; None in other scenarios.
    """

    false: int
    quiet: timedelta
    delay: int | None
    kind: bool | None
    named: bool | None
    slice: bool | None


def judge(run: Run, said: Sequence[Said], every: timedelta = EVERY) -> Judged:
    """Hold the answers about a stream against its truth; the delay is in steps of `EVERY`, however often is asked."""
    truth = run.truth
    before = [s for s in said if not run.drifts or s.end <= truth.begin]
    episodes = sum(s.alarm and not (i and before[i - 1].alarm) for i, s in enumerate(before))
    found = next((s for s in said if run.drifts and s.end > truth.begin and s.alarm), None)
    quiet = len(before) * every
    if found is None:
        return Judged(episodes, quiet, None, None, None, None)
    delay = max(0, -(-(found.end - EVERY - truth.onset) // EVERY) if found.end - EVERY > truth.onset else 0)
    first = next((c.removeprefix("new ") for c in found.columns if not c.startswith(SCORE)), "")  # predictions follow
    in_market = any(s.startswith(NEW_MARKET) for s in found.slices) if run.scenario == "market" else None
    return Judged(episodes, quiet, delay, found.kind == truth.kind, first in truth.columns, in_market)


def twice(said: Sequence[Said]) -> tuple[Said, ...]:
    """The same answers with the trigger's persistence: an alarm counts with one of the two checks before it."""
    alarms = [s.alarm for s in said]
    return tuple(
        replace(s, alarm=a and any(alarms[max(0, i - 2) : i]))
        for i, (s, a) in enumerate(zip(said, alarms, strict=True))
    )


COLUMNS = (
    *("scenario", "streams", "found", "within 2 checks", "delay: median", "p90", "worst"),
    *("false alarms a month", "kind right", "column right", "slice right"),
)
MONITORS: dict[str, Callable[[Run], Sequence[Said]]] = {
    "Evergreen": lambda run: run.ours,
    "Evidently, defaults": lambda run: run.stock,
    "Evidently, 2 of 3 checks": lambda run: twice(run.stock),
}


def table(runs: Sequence[Run]) -> str:
    """One table a monitor, one row a scenario."""
    parts = []
    for monitor, said in MONITORS.items():
        rows = [_row(s, [judge(r, said(r)) for r in runs if r.scenario == s], monitor) for s in SCENARIOS]
        for name, some in (("all", runs), ("even seeds", _half(runs, 0)), ("odd seeds", _half(runs, 1))):
            rows.append(_row(name, [judge(r, said(r)) for r in some], monitor))
        parts.append("\n".join([f"**{monitor}**", "", _head(COLUMNS), *rows]))
    return "\n\n".join(parts) + "\n"


def _half(runs: Sequence[Run], odd: int) -> list[Run]:
    return [r for r in runs if r.seed % 2 == odd]


def _row(scenario: str, judged: Sequence[Judged], monitor: str) -> str:
    drifts = [j for j in judged if j.quiet < timedelta(days=28)]
    delays = [j.delay for j in drifts if j.delay is not None]
    months = sum((j.quiet for j in judged), timedelta()) / MONTH
    false = sum(j.false for j in judged) / months if months else 0.0
    cells = [scenario, str(len(judged))]
    if drifts:
        # What was never found counts as later than anything.
        late = sorted([*map(float, delays), *[np.inf] * (len(drifts) - len(delays))])
        soon = sum(d <= SOON for d in delays) / len(drifts)
        ranks = (late[(len(late) - 1) // 2], late[min(len(late) - 1, int(np.ceil(0.9 * len(late))) - 1)], late[-1])
        cells += [
            f"{len(delays) / len(drifts):.0%}",
            f"{soon:.0%}",
            *("never" if np.isinf(d) else f"{d:.0f}" for d in ranks),
        ]
    else:
        cells += ["–"] * 5
    kinds, named, where = (
        [getattr(j, n) for j in drifts if getattr(j, n) is not None] for n in ("kind", "named", "slice")
    )
    ours = monitor == "Evergreen"
    cells += [
        f"{false:.2f}",
        _share(kinds if ours else []),
        _share(named if ours else []),
        _share(where if ours else []),
    ]
    return "| " + " | ".join(cells) + " |"


def _share(found: Sequence[bool]) -> str:
    return f"{sum(found) / len(found):.0%}" if found else "–"


def until_quiet(acted: Sequence[Said]) -> float:
    """Checks after an early retrain until the alarm is over, for two days at least; infinite if it never is."""
    alarms = [s.alarm for s in acted]
    rest = (i for i in range(len(alarms) - QUIET + 1) if not any(alarms[i : i + QUIET]))
    return next(rest, np.inf)


def recovery_table(runs: Sequence[Run]) -> str:
    """What follows when alarms of a drift are acted on, one row a scenario."""
    head = ("scenario", "streams", "checks until no alarm: median", "p90", "worst", "early retrains", "alarmed again")
    lines = ["**Evergreen, when the first alarm and later ones are answered by an early retrain**", "", _head(head)]
    for scenario in SCENARIOS:
        acted = [r.acted for r in runs if r.scenario == scenario and len(r.acted) >= QUIET]
        if not acted:
            continue
        waits = sorted(until_quiet(a) for a in acted)
        ranks = (waits[(len(waits) - 1) // 2], waits[int(np.ceil(0.9 * len(waits))) - 1], waits[-1])
        again = [
            any(s.alarm for s in a[int(w) :]) for a in acted for w in [until_quiet(a)] if not np.isinf(w)
        ]  # a slow drift moves on
        retrains = np.mean([1 + sum(s.retrain for s in a) for a in acted])
        told = ("never" if np.isinf(w) else f"{w:.0f}" for w in ranks)
        lines.append("| " + " | ".join([scenario, str(len(acted)), *told, f"{retrains:.1f}", _share(again)]) + " |")
    return "\n".join(lines) + "\n"


def hourly_table(runs: Sequence[Run]) -> str:
    """A few streams checked every hour (windows are six hours still), delays in steps of six hours."""
    hourly = [(r, judge(r, r.hourly, HOUR)) for r in runs if r.hourly]
    head = ("checks every hour", "streams", "found", "within 2 × 6 h", "false alarms a month")
    lines = [_head(head)]
    for scenario in SCENARIOS:
        some = [(r, j) for r, j in hourly if r.scenario == scenario]
        if not some:
            continue
        drifts = [j.delay for r, j in some if r.drifts]
        months = sum((j.quiet for _, j in some), timedelta()) / MONTH
        found = _share([d is not None for d in drifts])
        soon = _share([d is not None and d <= SOON for d in drifts])
        false = f"{sum(j.false for _, j in some) / months:.2f}" if months else "–"
        lines.append("| " + " | ".join([scenario, str(len(some)), found, soon, false]) + " |")
    return "\n".join(lines) + "\n"


def _head(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |\n|---|" + "--:|" * (len(columns) - 1)
