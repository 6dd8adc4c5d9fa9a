"""What one check of the monitor shows, and all that it tells a script."""

from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.markup import escape
from rich.table import Table

from evergreen import view
from evergreen.settings import Settings

WORST = 6  # columns that a check shows; its report has all
TOLD = 3  # sentences of evidence, and slices


def record(settings: Settings, as_of: datetime) -> dict[str, Any]:
    """Everything about a check that has run.

    Args:
        settings: The home.
        as_of: Its instant.

    Returns:
        The verdict as `drift`, its `decision`, the `alerts` that fire after it, the result of the `retrain` that it
        asked for (None if it asked for none, or none has ended), and the path of its `report`.
    """
    from components.check import check_directory
    from components.decide import decision_at
    from components.instant import result_at
    from monitoring.notify import Alerts

    found = decision_at(settings, as_of)
    asked = found["decision"]["retrain_as_of"]
    return {
        **found,
        "alerts": [asdict(alert) for alert in Alerts.of(settings).firing()],
        "retrain": result_at(settings, datetime.fromisoformat(asked)) if asked else None,
        "report": str(check_directory(settings, as_of) / "drift.html"),
    }


def shown(found: dict[str, Any]) -> None:
    """A check on one screen: what it found, why, and what came of it."""
    import json

    from monitoring.summary import marks
    from monitoring.verdict import DriftVerdict

    verdict = DriftVerdict.from_json(json.dumps(found["drift"]))
    since, until = (f"{instant:.16}".replace("T", " ") for instant in verdict.window)
    say = view.out.print
    say(
        f"Model v{verdict.model_version} on {verdict.requests[1]:,} requests by {verdict.users[1]:,} users, "
        f"{since} to {until} UTC:"
    )
    say(f"  {escape(verdict.reason)}")
    grid = Table.grid(padding=(0, 2))
    for mark in marks(verdict):
        grid.add_row(f"  {mark.name.lower()}", f"[red]{escape(mark.text)}[/]" if mark.wrong else escape(mark.text))
    say(grid)
    if verdict.kind != "none":
        _why(verdict)
    if verdict.drifted:
        say(_worst(verdict))
    _came_of(found)


def _why(verdict: Any) -> None:
    """The likely kind, what speaks for it, and where it moved."""
    view.out.print(f"Likely [bold]{verdict.kind}[/]:")
    for sentence in verdict.evidence[:TOLD]:
        view.out.print(f"  {escape(sentence)}")
    for s in verdict.slices[:TOLD]:
        view.out.print(f"  in {escape(s.slice)}, {s.share:.0%} of the window: {s.column} {s.score:.2f}")


def _worst(verdict: Any) -> Table:
    """The columns furthest above their thresholds."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("column", "tells of", "score", "drifts from", "usual", "what moved"):
        number = name in ("score", "drifts from", "usual")
        table.add_column(name, overflow="fold", justify="right" if number else "left")
    drifted = [c for c in verdict.worst if c.drifted]
    for c in drifted[:WORST]:
        numbers = (f"{c.score:.3f}", f"{c.threshold:.3f}", f"{c.usual:.3f}")
        table.add_row(escape(c.name), c.group, *numbers, escape(c.note))
    if len(drifted) > WORST:
        table.add_row(f"... and {len(drifted) - WORST} more")
    return table


def _came_of(found: dict[str, Any]) -> None:
    say, decision = view.out.print, found["decision"]
    colour = {"retrain": "yellow", "escalate": "red"}.get(decision["action"], "green")
    say(f"decision: [{colour}]{decision['action']}[/] ({escape(decision['reason'])})")
    if result := found["retrain"]:
        version = f"v{result['version']} " if result["version"] else ""
        say(f"retrain:  {version}{result['outcome']} ({escape(result['gate']['reason'])})")
    for alert in found["alerts"]:
        say(f"alert:    {alert['name']} ({alert['severity']}): {escape(alert['summary'])}; see {alert['runbook']}")
    say(f"report:   {escape(found['report'])}", soft_wrap=True)
