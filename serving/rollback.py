"""The way back: one command, traffic first, the registry after.

The ledger's entry is the commit and the intent in one; it takes milliseconds. Then the previous champion, which stands
by, answers everybody; only then MLflow is even imported. Killed anywhere, the next look of the promoter (or the same
command again) carries the entry out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.agreement import BACK_BY_HAND, BACK_FAILED, Order
from serving.files import read_json, write_json
from serving.plane import Plane
from serving.planes import permanent_plane
from serving.registry import Registry
from serving.rollout_state import PROMOTED, ROLLED_BACK, Journal
from serving.stack import serving_lock

LOOK = 120.0  # seconds for the look of a canary that is under way to end, after which it comes back


def rollback(settings: Settings, plane: Plane | None = None) -> dict[str, Any]:
    """In mid-canary take the challenger back, else make the previous champion champion again.

    Args:
        settings: The home.
        plane: What serves; the default is what the settings name, where it serves permanently.

    Returns:
        `champion` now, who it `was`, and the `challenger` that was taken back, if one was.

    Raises:
        Busy: Something that is no canary holds the serving lock.
        EvergreenError: There is no previous champion, or it cannot be served; the champion serves on.
    """
    registry, journal = Registry(settings), Journal(settings.serving)
    plane = plane or permanent_plane(settings, registry)
    state = journal.load()
    if state is None or state.final:
        with serving_lock(settings):
            return _go_back(registry, plane)
    with _stopping(settings), serving_lock(settings, LOOK):
        return _stop_canary(registry, journal, plane)


def stopped(settings: Settings) -> bool:
    """Whether somebody who is still there wants the rollout under way to end (asked between looks)."""
    asked = read_json(_stop_file(settings))
    try:
        return bool(asked) and psutil.Process(asked["pid"]).create_time() == asked["started"]
    except psutil.NoSuchProcess:
        return False


def carry_out(registry: Registry, plane: Plane | None) -> None:
    """Bring traffic, then aliases, in line with the ledger. A rollback that cannot be served is taken back itself.

    Raises:
        EvergreenError: The champion cannot be served, or MLflow cannot be reached; what serves goes on.
    """
    agreed = registry.agreed()
    try:
        if plane:
            plane.settle(agreed.champion, agreed.previous)
    except EvergreenError as error:
        if agreed.turn != BACK_BY_HAND or plane is None or plane.serving().champion not in (agreed.was, ""):
            raise
        why = f"v{agreed.champion} cannot be served: {error.problem}"
        registry.agreement.decide(BACK_FAILED, agreed.champion, why, Order(), agreed.was, agreed.champion)
    try:
        registry.conform()
    except EvergreenError as error:
        raise EvergreenError(
            f"v{registry.agreed().champion or '-'} serves, but MLflow does not show it yet: {error.problem}",
            error.remedy,
        ) from error


def _go_back(registry: Registry, plane: Plane | None) -> dict[str, Any]:
    was = registry.agreed()
    champion = registry.agreement.go_back(Order())
    carry_out(registry, plane)
    agreed = registry.agreed()
    if agreed.turn == BACK_FAILED:
        last = registry.agreement.decisions()[-1]
        raise EvergreenError(last["why"], f"v{agreed.champion} serves on; choose another with `evergreen promote`")
    return {"champion": champion, "was": was.was if was.champion == champion else was.champion, "challenger": ""}


def _stop_canary(registry: Registry, journal: Journal, plane: Plane | None) -> dict[str, Any]:
    state, agreed = journal.load(), registry.agreed()
    assert state is not None
    if agreed.champion == state.version:  # it was promoted while this waited
        if not state.final:
            journal.move(journal.take_up(state), PROMOTED, "promoted", reason="promoted")
        return _go_back(registry, plane)
    take_back(registry, journal, plane, state.version, "stopped by hand")
    return {"champion": agreed.champion, "was": agreed.champion, "challenger": state.version}


def take_back(registry: Registry, journal: Journal, plane: Plane | None, version: str, reason: str) -> None:
    """End the rollout of a version that a crash left and that is not champion; one that has ended is left alone.

    Raises:
        EvergreenError: The champion cannot be served, or MLflow cannot be reached.
    """
    state, agreed = journal.load(), registry.agreed()
    if state is None or state.final or state.version != version:
        return
    if plane:
        plane.settle(agreed.champion, agreed.previous)
    journal.move(journal.take_up(state), ROLLED_BACK, reason, reason=reason)
    registry.reject(version, reason)


@contextmanager
def _stopping(settings: Settings) -> Iterator[None]:
    # A number alone may one day be another process's, and no canary would ever go on.
    write_json(_stop_file(settings), {"pid": os.getpid(), "started": psutil.Process().create_time()})
    try:
        yield
    finally:
        _stop_file(settings).unlink(missing_ok=True)


def _stop_file(settings: Settings) -> Path:
    return settings.serving / "stop.json"
