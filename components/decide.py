"""Monitor step 2: what a check starts, and whom it tells."""

import json
import os
import time
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from kfp import dsl

from components.base import step, tell
from components.check import check_directory
from components.conclude import held_for_data, results
from components.instant import why_not
from components.watch import PARENT_PID
from engagement.slots import latest_slot, next_slot
from evergreen.settings import Settings
from monitoring.trigger import CHECKS, Decision, Situation, decide
from monitoring.verdict import DriftVerdict

MISSED_AFTER = timedelta(hours=3)  # a slot whose retrain has not ended by then; it takes minutes to two hours
RUNNING_FOR = timedelta(hours=8)  # a run that was planned longer ago and did not end is dead
LAPTOP = "laptop"  # who claims a retrain where the home's run lock lets one run at a time


def situation_at(settings: Settings, as_of: datetime) -> Situation:
    """What the trigger must know beside the checks."""
    slot = latest_slot(as_of)
    # Held for bad data is not held by the gate, and nothing was learned.
    ended = [r for r in results(settings.runs) if not held_for_data(r)]
    held = takewhile(lambda result: result["outcome"] == "held", reversed(ended))
    missed = as_of - slot >= MISSED_AFTER and not why_not(settings, slot, "slot")
    done = [datetime.fromisoformat(r["as_of"]) for r in ended]
    return Situation(
        next_slot=next_slot(as_of),
        missed_slot=slot if missed else None,
        held=len(list(held)),
        running="" if here() else _running(settings),
        last_retrain=max((at for at in done if at <= as_of), default=None),
        now=settings.clock(),
    )


def here() -> bool:
    """Whether this step runs on a laptop, where no retrain runs beside it."""
    return PARENT_PID in os.environ


def _running(settings: Settings) -> str:
    """Name of a retrain that was planned, or planned again, and has not ended since; empty if there is none."""
    since = time.time() - RUNNING_FOR.total_seconds()
    planned = {p.parent: p.stat().st_mtime for p in settings.runs.glob("*/plan.json")}
    return next((run.name for run, at in planned.items() if at > since and not _ended(run / "result.json", at)), "")


def _ended(result: Path, planned: float) -> bool:
    return result.exists() and result.stat().st_mtime >= planned


def decide_at(settings: Settings, verdict: DriftVerdict) -> tuple[Decision, Situation]:
    """The decision for a check, logged, its alerts sent; the same check again gives the same one."""
    from monitoring import history
    from monitoring.notify import raise_alerts

    as_of = datetime.fromisoformat(verdict.as_of)
    recent = history.recent(settings.monitoring / "checks", verdict.model_version, as_of, CHECKS - 1)
    situation = situation_at(settings, as_of)
    decision = decide(verdict, recent, situation, settings.monitoring)
    raise_alerts(settings, verdict, recent, decision, situation)
    tell(f"{decision.action}: {decision.reason}")
    return decision, situation


def decision_at(settings: Settings, as_of: datetime) -> dict[str, Any]:
    """What the check at an instant found and started."""
    directory = check_directory(settings, as_of)
    return {name: json.loads((directory / f"{name}.json").read_text()) for name in ("drift", "decision")}


@step
def decide_retrain(as_of: str, verdict: dsl.Input[dsl.Artifact], run: str) -> NamedTuple(  # type: ignore[valid-type]
    "Decided", [("Output", str), ("retrain_as_of", str), ("cause", str)]
):
    """Decide, log and tell.

    Args:
        as_of: Instant of the check.
        verdict: The check.
        run: Id of this pipeline run.

    Returns:
        `Output`: `retrain` while a retrain is wanted and not done, else `none`. (The local runner resolves a condition
        on no other name.) `retrain_as_of`: its instant. `cause`: the word that becomes the run's reason.
    """
    import json
    from dataclasses import asdict
    from datetime import datetime
    from pathlib import Path

    from components.base import begin, tell
    from components.decide import LAPTOP, check_directory, decide_at, here
    from engagement.files import write_text
    from monitoring.trigger import claim
    from monitoring.verdict import DriftVerdict

    settings = begin()
    decision, situation = decide_at(settings, DriftVerdict.load(Path(verdict.path)))
    directory = check_directory(settings, datetime.fromisoformat(as_of))
    write_text(directory / "decision.json", json.dumps(asdict(decision), indent=1))
    mine = claim(decision, situation, settings.monitoring, LAPTOP if here() else run)
    if mine is None:
        return ("none", as_of, "drift")
    if mine != decision:
        tell(f"the retrain that the check of {mine.as_of:.16} asked for did not end: it goes on")
    return ("retrain", mine.retrain_as_of, mine.cause)
