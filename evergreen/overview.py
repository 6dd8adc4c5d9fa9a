"""`evergreen status`: who serves and how it came to be, what the newest check found, what runs by itself.

It tells what the page of the check tells, in the same words (`monitoring/summary.py`). It is there for when something
is wrong: what cannot be read is one line, and the rest is shown.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

from rich.markup import escape
from rich.table import Table

from components.conclude import held_for_data, results
from engagement.errors import EvergreenError
from engagement.slots import next_slot
from evergreen import scheduling, view
from evergreen.settings import Settings
from monitoring import history, summary
from monitoring.alerts import Alert
from monitoring.decisions import LOG, Decision
from monitoring.notify import Alerts
from monitoring.state import CLOCK_SKEW, instant
from monitoring.trigger import history as decisions
from monitoring.trigger import pending
from monitoring.verdict import DriftVerdict

CANARY = ("percent", "verdict", "looks", "requests", "pairs", "errors", "p50_ms", "p99_ms", "reason")  # told of a stage
RUNS, PROMOTIONS, DECISIONS = 5, 5, 3  # the newest of each
SENTENCES = 4  # of each kind on the screen; `--json` and the report have all

T = TypeVar("T")


def overview(settings: Settings) -> dict[str, Any]:
    """The same for the table and for a script.

    Returns:
        `home`. `champion`, `previous`, `challenger`, `candidate`: versions, or None. `serving`, `promoter`: what
        answers now. `decisions`: of the promoter. `runs`: retrains. `drift`: the newest check, whole; `report`: its
        page. `alerts`: what fires. `triggers`: what the newest checks started, `waiting`: the early retrain that was
        asked for and is not done. `schedule`: what runs by itself, in words; `entries`: each line of it. `next_slot`.
        `problems`: what could not be read.
    """
    from serving.agreement import Agreement
    from serving.registry import Registry
    from serving.stack import promoter_state, scheduler_state, serving_state

    runs, problems = results(settings.runs), list[str]()
    registry_exists = settings.mlflow_tracking_uri or (settings.root / "mlflow").exists()
    aliases = Registry(settings).aliases() if registry_exists else {}
    decided = Agreement(settings.serving)
    check, report = _newest_check(settings, runs)
    asked = (settings.monitoring / LOG).exists()
    fired = (settings.monitoring / "alerts.json").exists()
    made = _read(lambda: decisions(settings.monitoring), problems, list[Decision]()) if asked else []
    waiting = _read(lambda: pending(settings.monitoring), problems, None) if asked else None
    alerts = _read(Alerts.of(settings).firing, problems, list[Alert]()) if fired else []
    return {
        "home": str(settings.root),
        "champion": aliases.get("champion") or decided.now().champion or None,  # in MLflow it may have been deleted
        "previous": aliases.get("previous"),
        "challenger": aliases.get("challenger"),
        "candidate": aliases.get("candidate"),
        "serving": serving_state(settings),
        "promoter": promoter_state(settings),
        "decisions": decided.decisions()[-PROMOTIONS:],
        "runs": [_brief(r) for r in runs[-RUNS:]],
        "drift": json.loads(check.to_json()) if check else None,
        "report": report,
        "alerts": [asdict(alert) for alert in alerts],
        "triggers": [asdict(decision) for decision in made[-DECISIONS:]],
        "waiting": asdict(waiting) if waiting else None,
        "schedule": scheduler_state(settings),
        "entries": scheduling.show(settings),
        "next_slot": next_slot(settings.clock()).isoformat(),
        "problems": list(dict.fromkeys(problems)),
    }


def _newest_check(settings: Settings, runs: list[dict[str, Any]]) -> tuple[DriftVerdict | None, str]:
    """The newest check with its page: of the monitor, or of a retrain, which looks at its own window."""
    checks = settings.monitoring / "checks"
    check = history.newest(checks, settings.clock() + CLOCK_SKEW)
    page = checks / history.stamp(_instant(check)) / "drift.html" if check else None
    for result in reversed(runs):
        try:
            of_run = DriftVerdict.from_json(json.dumps(result["drift"])) if result["drift"] else None
        except (ValueError, TypeError, KeyError, AttributeError):
            of_run = None  # as an earlier release wrote it
        if of_run:
            if check is None or _instant(of_run) > _instant(check):
                check, page = of_run, settings.runs / result["run_key"] / "drift" / "drift.html"
            break
    return check, str(page) if page and page.exists() else ""  # pages of old checks are thinned


def _instant(check: DriftVerdict) -> datetime:
    return instant(check.as_of)


def _read(read: Callable[[], T], problems: list[str], otherwise: T) -> T:
    try:
        return read()
    except EvergreenError as error:
        problems.append(str(error))
        return otherwise


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    keys = ("as_of", "run_key", "reason", "strategy", "champion", "version", "outcome", "finished_at")
    gate = result["gate"]
    rollout = result["rollout"] or {"steps": []}
    return {
        **{k: result[k] for k in keys},
        "also_scratch": result.get("also_scratch", ""),
        "chosen": gate.get("chosen", ""),
        "report": result["data"]["report"] if held_for_data(result) else "",
        "gate": {k: gate[k] for k in ("verdict", "reason", "requests", "metrics")},
        "canary": [{k: s.get(k) for k in CANARY} for s in rollout["steps"]],  # earlier releases knew fewer
    }


def shown(state: dict[str, Any]) -> None:
    """The state of the house on one screen."""
    if not state["champion"]:
        view.out.print(f"No champion yet in {state['home']}. Run `evergreen retrain`.")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = [*_house(state), *_checked(state), *_told(state)] if state["champion"] else [*_told(state)]
    for name, text in rows:
        table.add_row(name, text)
    view.out.print(table)
    _tables(state)


def _house(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Who serves, and what runs by itself."""
    before = f" (previous v{state['previous']})" if state["previous"] else ""
    yield "champion", f"v{state['champion']}{before}"
    yield "traffic", state["serving"]["summary"]
    if state["candidate"]:
        yield "wished for", f"v{state['candidate']}"
    yield "promoter", escape(state["promoter"])
    yield "schedule", escape(state["schedule"])
    for entry in state["entries"]:
        if entry["last_failed"]:
            yield (
                "",
                f"[red]{entry['entry']} of {entry['last_failed']:.16} failed[/]: {escape(entry['last_line'] or '')}",
            )
    yield "next slot", f"{state['next_slot']:.16} UTC"


def _checked(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the newest check found, as its page tells it."""
    if not state["drift"]:
        yield "check", "none yet: `evergreen monitor` makes one"
        return
    check = DriftVerdict.from_json(json.dumps(state["drift"]))
    start, end = (f"{moment:.16}" for moment in check.window)
    yield "check", f"{check.as_of:.16} UTC, of v{check.model_version}: {escape(check.reason)}"
    sizes = f"{check.requests[1]:,} requests, {check.rows[1]:,} rows, {check.users[1]:,} users"
    yield "window", f"{start} to {end} UTC: {sizes}; {check.late:.1%} of the rows came late"
    for mark in summary.marks(check):
        yield mark.name.lower(), f"[red]{escape(mark.text)}[/]" if mark.wrong else escape(mark.text)
        if mark.name == "Drift" and mark.wrong:
            yield from (("", escape(sentence)) for sentence in check.evidence[:SENTENCES])
    found = summary.wrong(check)
    more = [f"and {len(found) - SENTENCES} more"] if len(found) > SENTENCES else []
    yield from (("wrong" if n == 0 else "", escape(text)) for n, text in enumerate(found[:SENTENCES] + more))
    if state["report"]:
        yield "report", escape(state["report"])


def _told(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What fires, and what the newest checks started."""
    for n, alert in enumerate(state["alerts"]):
        since = f"{alert['severity']} since {alert['starts_at']:.16}"
        yield "alerts" if n == 0 else "", f"[red]{alert['name']}[/] ({since}): {escape(alert['summary'])}"
    if state["champion"] and not state["alerts"]:
        yield "alerts", "none"
    for n, made in enumerate(reversed(state["triggers"])):
        yield "started" if n == 0 else "", f"{made['as_of']:.16}  {made['action']}: {escape(made['reason'])}"
    if state["waiting"]:
        yield "waits", f"the early retrain that the check of {state['waiting']['as_of']:.16} asked for"
    yield from (("[red]problem[/]", escape(problem)) for problem in state["problems"])


def _tables(state: dict[str, Any]) -> None:
    """How it came to be: promotions and retrains."""
    decided = Table(title="Last promotions and rollbacks", title_justify="left")
    for name in ("at", "version", "decision", "by", "why"):
        decided.add_column(name, overflow="fold")
    for d in state["decisions"]:
        decided.add_row(f"{d['at']:.16}", f"v{d['version']}", d["decision"], escape(d["by"]), escape(d["why"]))
    if state["decisions"]:
        view.out.print(decided)
    runs = Table(title="Last retrains", title_justify="left")
    for name in ("as of", "asked by", "version", "outcome", "gate"):
        runs.add_column(name, overflow="fold")
    for r in state["runs"]:
        version = view.version_of(r["version"]) + (f" from {r['chosen']}" if r["chosen"] and r["also_scratch"] else "")
        why = r["gate"]["reason"] + (f" ({r['report']})" if r["report"] else "")
        runs.add_row(f"{r['as_of']:.16}", r["reason"], version, r["outcome"], escape(why))
    if state["runs"]:
        view.out.print(runs)
