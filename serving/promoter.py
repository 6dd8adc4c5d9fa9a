"""`python -m serving.promoter`: does what people wish in the registry; keeps registry, traffic and ledger agreed.

A level-triggered reconciler: it looks at what is so (`_observe`), decides on one action (`promoter_rules.decide`),
acts, and looks again until all agrees. Every action may be killed at any instant and is repaired by the next look. A
webhook only makes it look sooner.

One promoter acts in a home: it holds a lease that the kernel gives back when it dies. Whoever else changes what serves
(a pipeline, `evergreen promote`, `rollback`) holds the serving lock; the promoter stands back meanwhile.
"""

import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import Settings, get_settings
from serving.agreement import PUT_BACK, REFUSED, Agreed, Order
from serving.files import read_json, write_json
from serving.plane import Plane
from serving.planes import permanent_plane
from serving.promoter_metrics import DECISIONS, FAILURES, ROUNDS
from serving.promoter_rules import (
    Action,
    Conclude,
    Conform,
    Drop,
    GoBack,
    Observed,
    PutBack,
    Refuse,
    Rest,
    RollOut,
    Settle,
    TakeUp,
    Wish,
    decide,
    obstacle,
)
from serving.promotions import Promotions
from serving.registry import CANDIDATE, CHAMPION, PREVIOUS, PROMOTION, REQUESTED_BY, NotRegistered, Registry
from serving.rollback import carry_out, stopped, take_back
from serving.rollout_state import Journal, RolloutResult
from serving.signing import NotGenuine
from serving.stack import Busy, serving_lock
from serving.webhook import Hooks, register

if TYPE_CHECKING:
    from serving.traffic import Asked

UNKNOWN = "MLflow UI (unknown: MLflow does not record it)"
AT_ONCE = 50  # actions in one round; all schedules need fewer than ten

# Rolls a version out: registry, version, again, wanted, why.
Roll = Callable[[Registry, str, bool, Callable[[], bool], str], RolloutResult]
Tell = Callable[[str], None]


class Promoter:
    """The reconciler of one home. Who calls it holds the lease.

    Args:
        settings: The home.
        plane: What serves; None where nothing serves permanently.
        roll: Rolls a version out.
        tell: Called with one line when something happens.
    """

    def __init__(
        self, settings: Settings, plane: Callable[[], Plane | None], roll: Roll, tell: Tell = lambda line: None
    ) -> None:
        self._settings = settings
        self._registry = Registry(settings)
        self._agreement = self._registry.agreement
        self._plane, self._roll, self._tell = plane, roll, tell
        self._journal = Journal(settings.serving)
        self._wish_file = settings.serving / "wish.json"
        self._promotions = Promotions(settings, self._registry)
        self._missed = ""  # champion that was found to be deleted, so that it is told once

    def reconcile(self) -> None:
        """Act until all agrees, and make the ledger readable in MLflow.

        Raises:
            Busy: Somebody else is changing what serves.
            EvergreenError: Something cannot be had now (MLflow is down, a rollout has no requests): try again later.
        """
        ROUNDS.inc()
        for _ in range(AT_ONCE):
            action = decide(self._observe())
            if isinstance(action, Rest):
                break
            if isinstance(action, RollOut):  # takes the serving lock itself
                self._roll_out(action)
                continue
            with serving_lock(self._settings):
                self._act(decide(self._observe()))
        self._promotions.publish()

    def _observe(self) -> Observed:
        registry, wish = self._registry, self._wish()
        aliases, agreed = registry.aliases(), registry.agreed()
        deleted = self._deleted(aliases, agreed)
        state, plane = self._journal.load(), self._plane()
        answered = wish is not None and self._agreement.about(wish.id, wish.version) is not None
        # Killed between a rollout's end and the decision: the wish would be dropped, or rolled out once more.
        mute = state and wish and not answered and wish.version == state.version and wish.before != state.id
        unfinished = state.version if state and (mute or not state.final) else ""
        return Observed(
            aliases=aliases,
            agreed=agreed,
            shown=self._agreement.shown,
            serving=plane.serving() if plane else None,
            unfinished=unfinished,
            wish=wish,
            answered=answered,
            obstacle=self._obstacle(wish.version) if wish and not answered and wish.version != unfinished else "",
            deleted=deleted,
        )

    def _deleted(self, aliases: Mapping[str, str], agreed: Agreed) -> frozenset[str]:
        """Agreed versions that somebody deleted in MLflow. A champion serves on all the same, and it is told once."""
        there = {(CHAMPION, agreed.champion), (PREVIOUS, agreed.previous)} & set(aliases.items())
        absent = {agreed.champion, agreed.previous} - {version for _, version in there} - {""}
        deleted = frozenset(version for version in absent if not self._registry.has(version))
        missed = agreed.champion if agreed.champion in deleted else ""
        if missed and missed != self._missed:
            self._tell(f"champion v{missed} was deleted in MLflow: it serves on until another is promoted")
        self._missed = missed
        return deleted

    def _obstacle(self, version: str) -> str:
        """Why a version must not be rolled out; its files are fetched and verified for it."""
        if version == self._agreement.now().champion:
            return "it is champion already"
        try:
            return unfit(self._registry, version)
        except NotRegistered as error:
            return error.problem

    def _act(self, action: Action) -> None:
        """One action. Effects come in an order in which each prefix is repaired by the next look."""
        match action:
            case Conform() | Settle():
                carry_out(self._registry, self._plane())
            case GoBack(version):
                self._tell(f"champion was moved back to v{version}: rolling back")
                self._agreement.go_back(Order(by=self._asker(version)))
                carry_out(self._registry, self._plane())
            case PutBack(wished):
                self._put_back(wished)
            case TakeUp(version):
                state = self._journal.load()
                wish = Wish(uuid.uuid4().hex[:12], version, self._asker(version), state.id if state else "")
                write_json(self._wish_file, asdict(wish))
                self._tell(f"v{version} is wished for by {wish.by}")
            case Drop(wish):
                self._tell(f"the wish for v{wish.version} was taken back")
                self._wish_file.unlink(missing_ok=True)
            case Refuse(wish, why):
                self._tell(f"v{wish.version} is refused: {why}")
                self._agreement.decide(REFUSED, wish.version, why, _order(wish))
            case Conclude(wish):
                self._conclude(wish)

    def _put_back(self, wished: str) -> None:
        """`champion` tells what serves again; the version that it was moved to becomes a wish."""
        agreed = self._registry.agreed()
        if wished:
            self._registry.wish(wished)
        where = f"moved to v{wished}, which is a wish" if wished else "deleted"
        self._tell(f"alias champion was {where}: put back to v{agreed.champion or '-'}")
        by = self._asker(wished) if wished else UNKNOWN
        self._agreement.decide(PUT_BACK, wished or agreed.champion, f"it was {where}", Order(by=by))
        self._registry.conform()

    def _roll_out(self, action: RollOut) -> None:
        wish, version = action.wish, action.version
        registry = Registry(self._settings, _order(wish) if wish else Order())
        if not registry.has(version):  # deleted in mid-canary, and the promoter killed
            with serving_lock(self._settings):
                take_back(registry, self._journal, self._plane(), version, "it was deleted")
            return
        state = self._journal.load()
        resumed = state is not None and state.version == version and (wish is None or state.id != wish.before)
        why = f"wished for by {wish.by}" if wish else "left unfinished"
        wanted = partial(self._wanted, version, wish is not None)
        try:
            result = self._roll(registry, version, not resumed, wanted, why)
        except Busy:
            raise
        except EvergreenError as error:
            with suppress(EvergreenError):
                registry.tag(version, PROMOTION, f"waiting: {error.problem}")
            raise
        # A rollout that had nothing to do has decided nothing. (Who is champion already is refused by the next look; to
        # promote it here, where the lock is given back, would undo a rollback that waited for the lock.)
        if result.outcome != "champion":
            registry.reject(version, result.reason)

    def _wanted(self, version: str, wished: bool) -> bool:
        """Whether the version in the canary is still wanted; one that was `wished` for has to be wished for still.

        While the registry is away nobody said otherwise.
        """
        if stopped(self._settings):
            return False
        try:
            aliases, agreed = self._registry.aliases(), self._registry.agreed()
            champion = aliases.get(CHAMPION, "")
            if champion != agreed.champion and (champion or agreed.champion not in self._deleted(aliases, agreed)):
                if champion == agreed.previous and champion:
                    return False  # a rollback by hand: it follows when the challenger is back
                self._put_back(champion)
                aliases = self._registry.aliases()
        except EvergreenError:
            return True
        return not wished or aliases.get(CANDIDATE) == version

    def _conclude(self, wish: Wish) -> None:
        made = self._agreement.about(wish.id, wish.version)
        assert made is not None
        DECISIONS.labels(made["decision"]).inc()
        self._registry.tag(wish.version, PROMOTION, f"{made['decision']}: {made['why']}")
        self._registry.unset(CANDIDATE, wish.version)
        self._wish_file.unlink(missing_ok=True)
        self._tell(f"v{wish.version}: {made['decision']}, {made['why']}")

    def _wish(self) -> Wish | None:
        found = read_json(self._wish_file)
        return Wish(**found) if found else None

    def _asker(self, version: str) -> str:
        """Who wishes it, as far as anybody knows: one line of what the version's tag says."""
        said = " ".join(self._registry.get(version).tags.get(REQUESTED_BY, "").split())
        return said[:200] or UNKNOWN


def unfit(registry: Registry, version: str) -> str:
    """Why a version must not be rolled out, for a person who asks; empty when it may.

    Raises:
        EvergreenError: It is not registered, or MLflow cannot be reached.
    """
    try:
        return obstacle(registry.get(version).tags, registry.evidence(version))
    except NotGenuine as error:
        return error.problem


def _order(wish: Wish) -> Order:
    return Order(wish.id, wish.by)


# --- the process ---

POLL = 2.0  # seconds between two looks when no webhook wakes it
PATIENCE = 32.0  # seconds at most between two tries when something is away
LEASE = "promoter.lock"


def main() -> int:
    """Reconcile until stopped; 1 when the port for webhooks is in use, with one line on stderr."""
    settings, wake, state = get_settings(), threading.Event(), {"acting": False, "problem": ""}
    hooks = Hooks(settings, wake.set, lambda: state)
    try:
        hooks.start()
    except EvergreenError as error:
        print(error, file=sys.stderr)
        return 1
    settings.serving.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.serving / LEASE):  # a second promoter waits here, and takes over when the first dies
        state["acting"] = True
        plane = partial(permanent_plane, settings, Registry(settings))
        promoter = Promoter(settings, plane, partial(roll_with_known_requests, settings), _say)
        if settings.promoter_url:  # nobody runs `evergreen up` on a cluster
            try:
                register(settings, settings.tracking_uri)
            except EvergreenError as error:
                _say(f"polls only: {error.problem}")
        watch(promoter, wake, state)
    return 0


def watch(promoter: Promoter, wake: threading.Event, state: dict[str, Any]) -> None:
    """Look for ever: every `POLL` seconds, at once when woken, less often while something is away.

    Args:
        promoter: Who looks.
        wake: Set by webhooks.
        state: `problem` tells what is away; shown by `/healthz`.
    """
    pause = POLL
    while True:
        wake.clear()
        try:
            promoter.reconcile()
            problem = ""
        except Busy:
            problem = state["problem"]  # whoever it is, is quicker or slower than the pause; nothing to say
        except EvergreenError as error:
            problem = str(error)
        except Exception as error:  # whatever people write into a registry, the promoter goes on
            problem = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if problem != state["problem"]:
            _say(problem or "all is well again")
            state["problem"] = problem
        FAILURES.inc(bool(problem))
        pause = min(2 * pause, PATIENCE) if problem else POLL
        wake.wait(pause)


def roll_with_known_requests(
    settings: Settings,
    registry: Registry,
    version: str,
    again: bool,
    wanted: Callable[[], bool],
    why: str,
) -> RolloutResult:
    """A rollout on the requests that were known at the version's instant (a `Roll`, once the first is given)."""
    from serving.rollout import Rollout

    as_of = datetime.fromisoformat(registry.evidence(version)["as_of"])
    asked = known_requests(settings, registry, version, as_of)
    return Rollout(settings, registry).run(version, asked, _say, again, wanted, why)


def ask_promoter(settings: Settings, registry: Registry, version: str, tell: Tell) -> RolloutResult:
    """Wish for a version, and wait until the promoter has rolled it out or taken it back.

    Raises:
        EvergreenError: The promoter refuses the version.
    """
    tell(f"v{version} is wished for; waiting for the promoter")
    registry.wish(version)
    while registry.aliases().get(CANDIDATE) == version:
        time.sleep(POLL)
    said = registry.get(version).tags.get(PROMOTION, "")
    result = Journal(settings.serving).recorded(version)
    if said.startswith(REFUSED) or result is None:
        raise EvergreenError(f"the promoter did not roll v{version} out: {said or 'the wish was taken back'}")
    return result


def known_requests(settings: Settings, registry: Registry, version: str, as_of: datetime) -> "list[Asked]":
    """The latest requests up to an instant; outcomes where neither the version nor the champion trained on them."""
    from engagement.store import EngagementStore
    from serving.traffic import latest_requests

    models = {version, registry.agreed().champion or version}
    trained_to = [datetime.fromisoformat(registry.evidence(v)["train_end"]) for v in models]  # tags may be gone
    return latest_requests(EngagementStore(settings.data).snapshot(as_of), as_of, max(trained_to))


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
