"""Before anything is learned: is the data of the window fit for it? If not, the run is held, with the report."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from kfp import dsl

from components.base import step
from components.plan import Plan
from engagement.snapshot import Snapshot
from engagement.table import RankingTable
from evergreen.settings import Settings
from monitoring.verdict import DataTest

if TYPE_CHECKING:
    from monitoring.reference import Reference

GOOD: Literal["good"] = "good"
BAD: Literal["bad"] = "bad"
TESTS, REPORT = "data.json", "data.html"  # in a run's directory
TOLD = 2  # failed tests that the reason names
HELD = (
    "Nothing was trained; the champion goes on serving. Deliver what is missing or in quarantine again, corrected. "
    "Days that were stored wrong: delete their files, run evergreen data check, import them again. Then ask for the "
    "retrain again; with --trust-data if the data is right and it is the world that changed."
)


def check_window(settings: Settings, plan: Plan, table: RankingTable) -> tuple[DataTest, ...]:
    """Test what is new since the champion, training and evidence requests alike, against what the champion learned."""
    from monitoring.data_tests import HISTORY, test_window
    from monitoring.days import read_log
    from monitoring.looks import looks_of

    reference = _learned(settings, plan)
    log = read_log(Snapshot.load(settings.data, plan.snapshot), table, plan.update_start, plan.as_of, HISTORY)
    usual, spec = (looks_of(reference.spec, reference.cells), reference.spec) if reference else ([], None)
    return test_window(table, log, (plan.update_start, plan.as_of), usual, spec)


def _learned(settings: Settings, plan: Plan) -> "Reference | None":
    """The reference of the run's champion; None without a champion, and for one of an earlier release."""
    from components.train import champion_directory
    from engagement.errors import EvergreenError
    from monitoring.reference import DIRECTORY, Reference

    champion = champion_directory(settings, plan)
    try:
        return Reference.load(champion / DIRECTORY) if champion else None
    except EvergreenError:
        return None


def told_of(plan: Plan, table: RankingTable, tests: Sequence[DataTest], trust: bool) -> dict[str, Any]:
    """What the tests say, as JSON data: `verdict`, `reason`, `trusted`, `window`, `primary_action` and the `tests`.

    Args:
        plan: The run.
        table: Its ranking table.
        tests: Of its window.
        trust: Whether a person answers for the data: whatever the tests say, it is good.
    """
    texts = [t.text for t in tests if not t.passed]
    more = [f"and {len(texts) - TOLD:,} more"] if len(texts) > TOLD else []  # the report has them all
    wrong = "; ".join([*texts[:TOLD], *more])
    reason = f"all {len(tests)} tests passed"
    if wrong:
        reason = f"trusted by a person in spite of: {wrong}" if trust else f"bad data: {wrong}"
    return {
        "verdict": BAD if wrong and not trust else GOOD,
        "reason": reason,
        "trusted": trust,
        "window": [plan.update_start.isoformat(), plan.as_of.isoformat()],
        "primary_action": table.spec.primary_action,
        "tests": [vars(t) for t in tests],
    }


def page(told: dict[str, Any]) -> str:
    """The tests as a page, those that failed first."""
    start, end = (f"{t:.16}" for t in told["window"])
    rows = [
        f"<tr class={'ok' if t['passed'] else 'bad'}><td>{'yes' if t['passed'] else 'no'}"
        + "".join(f"<td>{html.escape(str(t[k]))}" for k in ("name", "limit", "text"))
        for t in sorted(told["tests"], key=lambda t: t["passed"])
    ]
    next_step = f"<p>{HELD}</p>" if told["verdict"] == BAD else ""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Data of the retrain</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:left}"
        ".bad td{background:#fde8e8}</style>"
        f"<h1>Data: {html.escape(told['verdict'])}</h1><p>{html.escape(told['reason'])}</p>"
        f"<p>Requests from {start} to {end} UTC.</p>{next_step}"
        "<table><tr><th>passed<th>test<th>limit<th>measured" + "\n".join(rows) + "</table></html>\n"
    )


@step
def check_data(plan: str, table: dsl.Input[dsl.Dataset], trust: bool, report: dsl.Output[dsl.HTML]) -> str:
    """Test the data of the run's window; returns `good` or `bad`. What a person trusts is good."""
    import json
    from pathlib import Path

    from components.base import begin, tell
    from components.plan import Plan
    from components.quality import REPORT, TESTS, check_window, page, told_of
    from engagement.files import write_text
    from engagement.table import RankingTable

    settings, p = begin(), Plan.from_json(plan)
    whole = RankingTable.load(Path(table.path))
    tell("testing the data of the window")
    told = told_of(p, whole, check_window(settings, p, whole), trust)
    tell(told["reason"])
    run = p.directory(settings)
    write_text(run / TESTS, json.dumps(told, indent=1))
    for path in (run / REPORT, Path(report.path)):
        write_text(path, page(told))
    return told["verdict"]
