"""First step of a scheduled run: which instant it is for, and whether anything is left to do for it.

Kubeflow does not tell a run its scheduled time (kubeflow/pipelines#12494), so a recurring run is started with an
empty `as_of`, and the newest instant up to now is meant. It is settled here once; all later steps are given it.
"""

import json
from datetime import UTC, datetime
from typing import Any

from components.base import step, tell
from components.conclude import held_for_data
from components.plan import NothingNew, evidence_start
from engagement.slots import latest_slot
from engagement.store import EngagementStore
from evergreen.settings import Settings

NONE = "none"  # there is nothing to do; a word of its own, as an empty output might be taken for a missing one


def result_at(settings: Settings, slot: datetime) -> dict[str, Any] | None:
    """The last result of a retrain at this very instant, whoever asked for it and whatever code it ran."""
    found = [json.loads(p.read_text()) for p in settings.runs.glob(f"{slot.astimezone(UTC):%Y%m%dT%H%M}-*/result.json")]
    return max(found, key=lambda r: str(r["finished_at"]), default=None)


def why_not(settings: Settings, slot: datetime, reason: str = "slot") -> str:
    """Why a retrain at a slot has nothing to do; empty if it has.

    A slot whose retrain ended, also by being held, is done; only where bad data held it the data is looked at again.
    A slot is done as well if a later retrain ended, which has learned all that it could, and without engagement that
    its champion has not learned and could be judged on.
    """
    from serving.registry import Registry

    ended = _ended_from(settings, slot)
    if ended and min(ended) <= slot:
        return f"the slot of {slot:%Y-%m-%d %H:%M} is done"
    if ended and reason == "slot":
        return f"the slot of {slot:%Y-%m-%d %H:%M} is past: the retrain of {max(ended):%Y-%m-%d %H:%M} has ended"
    champion = Registry(settings).champion()
    trained_to = datetime.fromisoformat(champion.tags["train_end"]) if champion else None
    try:
        evidence_start(EngagementStore(settings.data).snapshot(slot), trained_to, reason)
    except NothingNew as nothing:
        return nothing.problem
    return ""


def _ended_from(settings: Settings, slot: datetime) -> list[datetime]:
    """Instants, from this one to the clock's, of the retrains that ended and were not held for bad data."""
    first = slot.replace(second=0, microsecond=0)  # as runs are named
    found = {
        p: datetime.strptime(p.parent.name[:13] + "Z", "%Y%m%dT%H%M%z") for p in settings.runs.glob("*/result.json")
    }
    known = [p for p, at in found.items() if first <= at <= max(slot, settings.clock())]
    return [found[p] for p in known if not held_for_data(json.loads(p.read_text()))]


def settle_slot(settings: Settings, as_of: str, reason: str = "slot") -> str:
    """The instant of a scheduled retrain, ISO; `NONE` if there is nothing to do for it.

    Args:
        settings: The home.
        as_of: ISO instant; empty for the newest slot up to now.
        reason: What asked for it.
    """
    slot = datetime.fromisoformat(as_of) if as_of else latest_slot(settings.clock())
    nothing = why_not(settings, slot, reason)
    tell(nothing or f"slot of {slot:%Y-%m-%d %H:%M}")
    return NONE if nothing else slot.isoformat()


@step
def find_slot(as_of: str, reason: str) -> str:
    """The slot to retrain for, `none` if it is done: the given instant, or the newest slot up to now."""
    from components.base import begin
    from components.instant import settle_slot

    return settle_slot(begin(), as_of, reason)


@step
def find_hour(as_of: str) -> str:
    """The instant to look at: the given one, or the newest full hour up to now."""
    from components.base import begin
    from engagement.slots import latest_hour

    return as_of or latest_hour(begin().clock()).isoformat()
