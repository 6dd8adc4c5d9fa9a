"""Replay: slot after slot over history, test what every strategy has learned, then train it on.

Test-then-train (Monolith, Liu et al. 2022, arXiv 2209.07663, algorithm 1): the first model of a seed is trained on all
that was known before the first slot and is shared by all strategies; at each later slot a strategy's newest models are
tested on the window since the slot before, then it learns that window. Lineages go on whatever the gate would say;
what it would say is recorded. One request in ten is held out from all training and stays an exam for every later model.
"""

from datetime import datetime
from typing import Any

from components.plan import code_version
from engagement.errors import EvergreenError
from engagement.slots import slots
from engagement.store import EngagementStore
from evergreen.settings import Settings
from model.config import STRATEGY_NAMES
from pipelines.replay_plan import Named, Replay
from pipelines.replay_result import collect
from pipelines.replay_run import TaskFailed, Told, run

__all__ = ["TaskFailed", "plan", "replay"]


def replay(
    settings: Settings, start: datetime, end: datetime, strategies: list[str], seeds: int, jobs: int, tell: Told
) -> dict[str, Any]:
    """Replay every slot in [start, end] with each strategy and seed.

    What is finished is kept under the home: a killed replay goes on where it was, the same one again only reads.

    Args:
        settings: The home, the recipe, the first seed.
        start: First instant.
        end: Last instant.
        strategies: Names, with a strength where one is wanted: `ewc+distill`, `ewc@100`.
        seeds: Number of lineages a strategy.
        jobs: Processes at once.
        tell: Called with what is running, tasks done and tasks in all.

    Returns:
        What `pipelines.replay_result.collect` gives: plain JSON data.

    Raises:
        EvergreenError: A strategy is unknown, fewer than two slots lie in the range, there is no data before the first
            or none after it; `TaskFailed`, if a task failed.
    """
    planned = plan(settings, start, end, strategies, seeds)
    run(planned, jobs, tell)
    return collect(planned)


def plan(settings: Settings, start: datetime, end: datetime, strategies: list[str], seeds: int) -> Replay:
    """Fix what is replayed; raises what `replay` raises for a wrong call."""
    named = {name: Named.parse(name, STRATEGY_NAMES) for name in strategies}
    store, instants = EngagementStore(settings.data), tuple(slots(start, end))
    if not instants:
        raise EvergreenError(
            f"no slot lies between {start} and {end}",
            "Slots are Monday and Thursday 03:00 UTC; widen the range",
        )
    if len(instants) == 1:
        raise EvergreenError(
            f"only one slot lies between {start} and {end}",
            "The first slot trains, those after it test; widen the range",
        )
    first, last = store.time_range()
    if first >= instants[0]:
        raise EvergreenError(
            f"there is no history before {instants[0]:%Y-%m-%d %H:%M} to train on, the log begins at "
            f"{first:%Y-%m-%d %H:%M}",
            "Choose a later --from",
        )
    if last < instants[0]:
        raise EvergreenError(
            f"there is nothing to test on after {instants[0]:%Y-%m-%d %H:%M}, the log ends at {last:%Y-%m-%d %H:%M}",
            "Choose an earlier --from",
        )
    return Replay(
        settings=settings,
        slots=instants,
        start=first,
        snapshots=tuple(store.snapshot(t).digest for t in instants),
        strategies=named,
        seeds=tuple(range(settings.seed, settings.seed + seeds)),
        code=code_version(),
    )
