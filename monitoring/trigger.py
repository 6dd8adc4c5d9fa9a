"""When a check starts a retrain: the whole policy.

A missed slot is caught up once. Between two slots, a retrain is asked for when drift or lost quality persists: once,
within a budget, never over broken data, and not again when the gate has refused it twice. Every decision, each "no"
too, is logged with its reason (`decisions.py`). The rules are asked in the order of `_answer`; the first that speaks
decides.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from monitoring.decisions import Decision, DecisionLog, history, opened, pending, take
from monitoring.verdict import DriftVerdict

__all__ = ["Decision", "Situation", "claim", "decide", "history", "pending", "persistent", "take"]

CHECKS = 3
"""Drift and lost quality persist if this check and **≥ 1** of the others among the last 3 of its model tell of it."""

COOLDOWN = timedelta(hours=36)
"""No early retrain is asked for **<** this before or after another, whatever the champion.

Long enough for the retrain that was asked for to finish and roll out, shorter than the gap of two slots. A request
that is not done lapses **≥** this after it was made: whoever should have done it is gone. A missed slot that is not
caught up is asked for again after the same time."""

BUDGET = 2
BUDGET_SPAN = timedelta(days=7)
"""No early retrain is asked for if **≥** `BUDGET` others were within **<** `BUDGET_SPAN`."""

SLOT_NEAR = timedelta(hours=6)
"""No early retrain is asked for if the next slot is **≤** this away, or a retrain ended up to **<** this ago: the two
would learn the same window."""

HELD = 2
"""If the gate held the last **≥** this many retrains in a row, a person is asked instead of another early
retrain; slots go on."""

CLOCK_AHEAD = timedelta(hours=1)
"""A check **>** this ahead of the clock decides nothing, nor does one **<** the newest decision's instant."""


@dataclass(frozen=True)
class Situation:
    """What the trigger must know of the world beside the checks.

    Attributes:
        next_slot: The next regular retrain after the check, aware.
        missed_slot: The newest slot that should have been retrained at and was not; None if there is none.
        held: How many of the last retrains the gate held in a row, since the last champion.
        running: Name of the retrain that runs now; empty if none does.
        last_retrain: Instant (`as_of`) of the newest retrain that ended, whatever its cause and its outcome; one that
            was held for bad data learned nothing and is passed over.
        now: The clock; None in a replay, where any instant may be looked at.
    """

    next_slot: datetime
    missed_slot: datetime | None = None
    held: int = 0
    running: str = ""
    last_retrain: datetime | None = None
    now: datetime | None = None


def decide(verdict: DriftVerdict, recent: Sequence[DriftVerdict], situation: Situation, state_dir: Path) -> Decision:
    """Decide what a check starts, and log it; the same check again decides the same.

    Args:
        verdict: The check.
        recent: The checks before it (`history.recent`).
        situation: What else is so.
        state_dir: Directory of the log; created if missing.

    Raises:
        EvergreenError: The log cannot be written, or holds a line that is not a decision.
    """
    check = _identity(verdict)
    with opened(state_dir) as log:
        earlier = log.of_check(check)
        if earlier:
            return earlier
        answer = _answer(verdict, recent, situation, log)
        decision = Decision(
            action=answer.action,
            reason=answer.reason,
            champion=verdict.model_version,
            as_of=verdict.as_of,
            key=_key(verdict, answer),
            check=check,
            cause=answer.cause,
            retrain_as_of=(answer.slot or _instant(verdict)).isoformat() if answer.action == "retrain" else "",
            skewed=answer.skewed,
        )
        log.add(decision)
        return decision


def claim(decision: Decision, situation: Situation, state_dir: Path, who: str) -> Decision | None:
    """The decision whose retrain the caller is to start now, if any.

    However many monitors hold the same decision, one may start it: who came first, also when it comes again because
    it was killed. A later check that still sees the need takes up the early retrain that waits, if nobody began it or
    the caller itself did: on a laptop, where one run goes at a time, that run was killed. Nobody may start a retrain
    that is done, or any while one runs.

    Args:
        decision: What `decide` returned.
        situation: As it is now.
        state_dir: Directory of the log.
        who: Name of the caller, the same when it is started again: a pipeline run's id.

    Raises:
        EvergreenError: The log cannot be written, or holds a line that is not a decision.
    """
    if situation.running:
        return None
    with opened(state_dir) as log:
        wanted = _wanted(decision, situation, log)
        return wanted if wanted and log.claim(wanted, who) else None


def _wanted(decision: Decision, situation: Situation, log: DecisionLog) -> Decision | None:
    """The decision whose retrain is wanted and not done."""
    waiting = log.pending()
    if decision.early:
        return decision if waiting and waiting.check == decision.check else None
    if decision.action == "retrain":
        return decision if situation.missed_slot == datetime.fromisoformat(decision.retrain_as_of) else None
    return waiting if decision.action == "none" and decision.cause in ("drift", "quality") else None


@dataclass(frozen=True)
class _Answer:
    """What a rule says; see `Decision`."""

    reason: str
    action: Literal["retrain", "none", "escalate"] = "none"
    cause: Literal["drift", "quality", "slot", ""] = ""
    slot: datetime | None = None
    skewed: bool = False


def _answer(verdict: DriftVerdict, recent: Sequence[DriftVerdict], situation: Situation, log: DecisionLog) -> _Answer:
    """The policy, first rule first."""
    cause: Literal["drift", "quality"]
    skew = _skew(_instant(verdict), situation, log)
    if skew:
        return _Answer(f"{skew}: this check decides nothing", skewed=True)
    if not situation.running:
        _let_lapse(verdict, situation, log)
    broken = broken_data(verdict)
    if broken:
        return _Answer(f"Broken data is repaired, not trained on: {broken}")
    if situation.missed_slot:
        return _catch_up(_instant(verdict), situation, situation.missed_slot, log)
    columns, lost = persistent(verdict, recent), verdict.outcome if quality_persists(verdict, recent) else None
    if columns:
        cause, why = "drift", f"Drift persists ({verdict.kind}): {_names(columns)}"
    elif lost:
        cause, why = "quality", f"Lost quality persists: {lost.reason}"
    else:
        return _Answer(_not_yet(verdict))
    if situation.running:
        return _Answer(f"{why}; but a retrain runs ({situation.running})", cause=cause)
    if situation.held >= HELD:
        return _Answer(
            f"{why}; but the gate held the last {situation.held} retrains: a person must look", "escalate", cause
        )
    refusal = _refusal(_instant(verdict), situation, log)
    if refusal:
        return _Answer(f"{why}; but {refusal}", cause=cause)
    return _Answer(why, "retrain", cause)


def _skew(as_of: datetime, situation: Situation, log: DecisionLog) -> str:
    """Why the clock of a check, or that of an earlier one, cannot be trusted; empty if it can."""
    if situation.now and as_of - situation.now > CLOCK_AHEAD:
        return f"{_at(as_of)} is more than {_hours(CLOCK_AHEAD)} ahead of the clock ({_at(situation.now)})"
    last = log.newest(situation.now + CLOCK_AHEAD if situation.now else None)
    if last and as_of < last.instant:
        return f"{_at(as_of)} is before the check that was decided on last ({_at(last.instant)})"
    return ""


def _let_lapse(verdict: DriftVerdict, situation: Situation, log: DecisionLog) -> None:
    """Settle the request that waits if nobody will do it any more, or nobody needs it."""
    request = log.pending()
    if request is None:
        return
    if request.champion != verdict.model_version:
        log.settle(request, f"version {verdict.model_version} serves by now")
    elif situation.last_retrain and situation.last_retrain > request.instant:
        log.settle(request, f"the retrain of {_at(situation.last_retrain)} came later")
    elif abs(_instant(verdict) - request.instant) >= COOLDOWN:  # also after a clock that ran ahead was set right
        log.settle(request, f"not done in {_hours(COOLDOWN)}")


def _catch_up(as_of: datetime, situation: Situation, slot: datetime, log: DecisionLog) -> _Answer:
    """The answer while a slot is missed: it goes before anything that an early retrain could do."""
    if situation.running:
        return _Answer(f"The slot of {_at(slot)} was missed, but a retrain runs ({situation.running})", cause="slot")
    asked = [d for d in log.asked() if d.cause == "slot" and datetime.fromisoformat(d.retrain_as_of) == slot]
    if asked and abs(as_of - asked[-1].instant) < COOLDOWN:
        by = _at(asked[-1].instant)
        return _Answer(
            f"The slot of {_at(slot)} was missed; its retrain was asked for by the check of {by}", cause="slot"
        )
    return _Answer(f"The slot of {_at(slot)} was missed: it is caught up", "retrain", "slot", slot)


def _refusal(as_of: datetime, situation: Situation, log: DecisionLog) -> str:
    """Why no early retrain is asked for though there is a reason; empty if one is."""
    waiting = log.pending()
    if waiting:
        return f"a retrain is already asked for (by the check of {_at(waiting.instant)})"
    early = [d for d in log.asked() if d.early]
    near = next((d for d in reversed(early) if abs(as_of - d.instant) < COOLDOWN), None)
    if near:
        return f"a retrain was asked for less than {_hours(COOLDOWN)} ago (by the check of {_at(near.instant)})"
    spent = [d for d in early if abs(as_of - d.instant) < BUDGET_SPAN]
    if len(spent) >= BUDGET:
        return f"the budget of {BUDGET} early retrains in {BUDGET_SPAN.days} days is spent"
    if situation.next_slot - as_of <= SLOT_NEAR:
        return f"the slot of {_at(situation.next_slot)} is at most {_hours(SLOT_NEAR)} away"
    last = situation.last_retrain
    if last and timedelta(0) <= as_of - last < SLOT_NEAR:
        return f"the retrain of {_at(last)} learned up to less than {_hours(SLOT_NEAR)} ago"
    return ""


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(columns[:3]) + (f" and {len(columns) - 3} more" if len(columns) > 3 else "")


def _not_yet(verdict: DriftVerdict) -> str:
    """Why a check whose data is whole asks for nothing."""
    if _moved(verdict) or _lost(verdict):
        return f"{verdict.reason}; in one of the last {CHECKS} checks only: not acted on before it persists"
    return verdict.reason


def _key(verdict: DriftVerdict, answer: _Answer) -> str:
    """One champion asks at most once a day, one slot is one request."""
    return (
        f"slot@{answer.slot:%Y-%m-%dT%H:%M}" if answer.slot else f"{verdict.model_version}@{_instant(verdict):%Y-%m-%d}"
    )


def _identity(verdict: DriftVerdict) -> str:
    """Hash of what a check found. Scores stay out: summed in another order, they differ in their last digits."""
    found: list[object] = [
        verdict.model_version,
        verdict.as_of,
        verdict.rows,
        verdict.kind,
        sorted(verdict.drifted_columns),
    ]
    found += [sorted(verdict.broken), sorted(t.name for t in verdict.data if not t.passed), _lost(verdict)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _instant(verdict: DriftVerdict) -> datetime:
    return datetime.fromisoformat(verdict.as_of).astimezone(UTC)


def _at(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _hours(span: timedelta) -> str:
    return f"{span.total_seconds() / 3600:.0f} h"


def persistent(verdict: DriftVerdict, recent: Sequence[DriftVerdict]) -> tuple[str, ...]:
    """Columns that drifted in this check and in at least one of the two checks of the same model before it.

    A check of broken data says nothing of the world: it confirms no drift, but takes its place among the three.

    Args:
        verdict: The check.
        recent: Checks before it, in any order; other models and later checks are passed over.

    Returns:
        Names, worst first; empty where the data of this check is broken.
    """
    before = {name for earlier in _last(verdict, recent) for name in _moved(earlier)}
    return tuple(name for name in _moved(verdict) if name in before)


def quality_persists(verdict: DriftVerdict, recent: Sequence[DriftVerdict]) -> bool:
    """Whether quality is lost in this check and in at least one of the two checks of the same model before it."""
    return _lost(verdict) and any(_lost(earlier) for earlier in _last(verdict, recent))


def broken_data(verdict: DriftVerdict) -> str:
    """What is wrong with the window's data, in one line; empty if nothing is."""
    if verdict.broken:
        name, why = next(iter(verdict.broken.items()))
        return f"{name} {why}"
    if verdict.kind == "broken":
        return verdict.evidence[0] if verdict.evidence else verdict.reason
    return next((test.text for test in verdict.data if not test.passed), "")


def _last(verdict: DriftVerdict, recent: Sequence[DriftVerdict]) -> list[DriftVerdict]:
    """The checks of the same model just before this one, newest first; one an instant."""
    instant = datetime.fromisoformat(verdict.as_of)
    same = {datetime.fromisoformat(v.as_of): v for v in recent if v.model_version == verdict.model_version}
    return [same[at] for at in sorted(same, reverse=True) if at < instant][: CHECKS - 1]


def _moved(verdict: DriftVerdict) -> tuple[str, ...]:
    return verdict.drifted_columns if verdict.drifted and not broken_data(verdict) else ()


def _lost(verdict: DriftVerdict) -> bool:
    return verdict.outcome is not None and verdict.outcome.lost and not broken_data(verdict)
