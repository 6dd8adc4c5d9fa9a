"""What the schedule commands do and show."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from engagement.errors import EvergreenError
from evergreen import view
from evergreen.settings import Settings

if TYPE_CHECKING:
    from pipelines.recurring import Change


def show(settings: Settings) -> list[dict[str, Any]]:
    """Of each entry when it runs next, what ran last, and what was missed since."""
    from pipelines.memory import Memory
    from pipelines.schedule import due, schedule, skipped

    now, memory = settings.clock(), Memory(settings)
    shown = []
    for entry in schedule():
        last = memory.last(entry.name)
        waits = due(entry, now, last) if last else None
        first = entry.following(now)
        upcoming = [first, entry.following(entry.starts(first))]
        shown.append(
            {
                "entry": entry.name,
                "says": entry.says,
                "when": entry.when,
                "cron": entry.cron,
                "next": [entry.starts(instant).isoformat() for instant in upcoming],
                "as_of": [instant.isoformat() for instant in upcoming],
                "due": waits.isoformat() if waits else None,
                "missed": skipped(entry, now, last) + 1 if waits else 0,
                **{f"last_{k}" if k != "last" else k: v for k, v in memory.told(entry.name).items()},
            }
        )
    return shown


def shown(entries: list[dict[str, Any]]) -> None:
    """The schedule on one screen."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("entry", "next, UTC", "then", "last on this machine", "missed"):
        table.add_column(name, overflow="fold")
    for e in entries:
        ended = "failed: " if e["last_failed"] else ""
        last = f"{e['last']:.16}" if e["last"] else "–"
        line = f"{last}  {ended}{e['last_line'] or ''}".rstrip()
        missed = f"{e['missed']}; {e['due']:.16} is due" if e["missed"] else "–"
        first, then = (f"{t:.16}" for t in e["next"])
        name = f"[bold]{e['entry']}[/], {e['when']}\n{escape(e['says'])}"
        table.add_row(name, first, then, escape(line), missed)
    view.out.print(table)


def apply(dry_run: bool, yes: bool, quiet: bool) -> dict[str, Any]:
    """Make Kubeflow's recurring runs what the schedule says, once a person agrees.

    Args:
        dry_run: Show the difference only.
        yes: Nobody is asked.
        quiet: Print nothing.

    Raises:
        EvergreenError: Kubeflow cannot be asked; or nobody can be, as there is no terminal.
    """
    from pipelines import recurring

    def agree(changes: Sequence["Change"]) -> bool:
        if not quiet:
            differs(changes)
        if dry_run or yes:
            return yes and not dry_run
        if quiet or not sys.stdin.isatty():
            raise EvergreenError("nobody is there to agree to the change", "Add --yes, or --dry-run to look only")
        view.err.print("Apply? \\[y/N] ", end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    changes, applied = recurring.apply(agree)
    return {"applied": applied, "changes": [change.to_json() for change in changes]}


def differs(changes: Sequence["Change"]) -> None:
    """The difference between what is on Kubeflow and what is wanted."""
    colours = {"create": "green", "update": "yellow", "delete": "red", "none": "dim"}
    table = Table(show_edge=False, pad_edge=False)
    for name in ("entry", "now", "wanted", "action"):
        table.add_column(name, overflow="fold")
    for c in changes:
        when = f"\n{c.when}" if c.when else ""
        table.add_row(c.entry + when, escape(c.now), escape(c.wanted), f"[{colours[c.action]}]{c.action}[/]")
    view.out.print(table)


def applied(result: dict[str, Any], dry_run: bool) -> None:
    """How an apply ended."""
    todo = [c for c in result["changes"] if c["action"] != "none"]
    if not todo:
        view.out.print("No change: the recurring runs on Kubeflow are what the schedule says.")
    elif result["applied"]:
        done = ", ".join(f"{c['entry']} {c['action']}d" for c in todo)
        view.out.print(f"Applied: {done}.")
    else:
        view.out.print("Nothing was changed." if not dry_run else "Nothing was changed: that was a dry run.")
