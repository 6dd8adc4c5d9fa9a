"""The rollout of one version: pending, dark, 1, 10, 50, 100 %, champion; or rolled back, from anywhere.

The same states on a laptop and on a cluster: a `Plane` serves and splits, a `Traffic` gathers evidence, the judge
decides. In the dark both versions answer the same requests and nobody gets the challenger; then users do, sticky by
bucket. A stage is looked at until it passes or fails; what is still inconclusive after the judge's limit goes back.

State is on disk after every transition and every look, with what the judge knows: a killed rollout is taken up by the
next call where it was, nothing is judged twice, and it ends the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.buckets import choose_salt
from serving.judge import Guardrails, Judge
from serving.plane import Doors, Plane, Unfit
from serving.planes import serving_plane
from serving.registry import ROLLOUT, Registry
from serving.rollout_state import (
    DARK,
    PROMOTED,
    ROLLED_BACK,
    Final,
    Journal,
    OvertakenError,
    RolloutResult,
    State,
)
from serving.sources import every_source, rules_of
from serving.stack import serving_lock
from serving.traffic import Asked, Stage, Traffic

STAGES = (0, 1, 10, 50, 100)  # per cent of the users
FIRST_STAGES = (0, 100)  # of a first model, which has nobody to share with

Progress = Callable[[str], None]
MakeTraffic = Callable[[Settings, Registry, Sequence[Asked]], Traffic]


class _RejectedError(Exception):
    """The challenger goes back; its text says why."""


class Rollout:
    """Rolls versions out in one home.

    Args:
        settings: The home.
        registry: Its registry.
        plane: Where versions run; the default is what the settings name.
        traffic: Makes the source of evidence from the requests that are known.
        rules: What the judge asks for; the default is what suits the plane.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        plane: Plane | None = None,
        traffic: MakeTraffic = every_source,
        rules: Guardrails | None = None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._journal = Journal(settings.serving)
        self._plane = plane or serving_plane(settings, registry)
        self._traffic = traffic
        self._rules = rules or rules_of(settings)

    def run(
        self,
        version: str,
        asked: Sequence[Asked],
        progress: Progress | None = None,
        again: bool = False,
        wanted: Callable[[], bool] = lambda: True,
        why: str = "",
    ) -> RolloutResult:
        """Roll a version out, or finish a rollout that was killed. Call it from the main thread.

        Args:
            version: Registered version.
            asked: Real requests that are known.
            progress: Called with one line when something happens.
            again: Try a version once more that was rolled back before.
            wanted: Asked between looks; when it says no, the challenger goes back.
            why: Why it is rolled out, in words, for the ledger.

        Raises:
            OvertakenError: Another controller took the rollout up; nothing was touched since.
            EvergreenError: The version is unknown, there are no requests, another rollout runs, or champion, gateway
                or features cannot be had: nothing was decided then, and the same call may be made again.
        """
        tell = progress or (lambda text: None)
        with serving_lock(self._settings):
            registered = self._registry.get(str(version))
            state = self._journal.load()
            champion = self._registry.agreed().champion  # not the alias: a person may be moving it
            ours = state is not None and state.version == registered.version
            if state is None or not ours or self._stale(state, champion):
                verdict, _, reason = registered.tags.get(ROLLOUT, "").partition(": ")
                if champion == registered.version:
                    return self._decided_before(champion, "champion", champion, "it is champion already")
                if verdict == ROLLED_BACK and not again and not (ours and state and not state.final):
                    return self._decided_before(registered.version, "rolled_back", champion, reason)
                state = self._begin(registered.version, champion, state, why)
            elif state.stage == ROLLED_BACK and again:
                state = self._begin(registered.version, champion, state, why)
            else:
                state = self._journal.take_up(state)
            if not state.final:
                if not asked:
                    raise EvergreenError(
                        "there are no requests to replay", "Import engagement up to the rollout's time"
                    )
                state = self._decide(state, asked, wanted, tell)
            return self._settle(state)

    def _stale(self, state: State, champion: str) -> bool:
        """Whether the recorded rollout says nothing about the present: the champion changed under it."""
        if state.stage == PROMOTED:
            return champion != state.version
        return champion not in (state.champion, state.version)

    def _begin(self, version: str, champion: str, before: State | None, why: str) -> State:
        if before is not None and not before.final and before.version != version:
            before = self._journal.take_up(before)
            if champion == before.version:  # killed right after its promotion
                before = self._promoted(before)
            else:
                reason = f"given up for version {version}"
                before = self._journal.move(before, ROLLED_BACK, reason, reason=reason)
            self._settle(before)
        state = self._journal.begin(State(version, champion, why=why or "rollout begins"), before)
        self._registry.offer(version)
        return state

    def _decide(self, state: State, asked: Sequence[Asked], wanted: Callable[[], bool], tell: Progress) -> State:
        """Go through the stages that are left; the returned state says how it ended, the registry may not know yet."""
        if self._registry.agreed().champion == state.version:  # killed right after the promotion
            return self._promoted(state)
        try:
            stages = STAGES if state.champion else FIRST_STAGES
            if not state.salt:
                users = [a.request.user_id for a in asked]
                enough = {p: self._rules.needed(p) for p in stages if 0 < p < 100}
                salt = choose_salt(state.version, users, enough)
                state = self._journal.save(state, salt=salt)
            last = state.steps[-1] if state.steps else None
            if last and last.verdict in ("fail", "stopped"):  # killed on the way back
                raise _RejectedError(last.reason)
            with self._open(state, tell) as doors:
                traffic = self._traffic(self._settings, self._registry, asked)
                for percent in stages:
                    if percent not in state.passed:
                        state = self._stage(state, percent, doors, traffic, wanted, tell)
                    if percent not in state.passed:
                        self._plane.split(0)
                        raise _RejectedError(state.steps[-1].reason)
                self._journal.check(state)
                if not wanted():  # the last look took its time
                    self._plane.split(0)
                    raise _RejectedError("no longer wanted")
                self._registry.promote(state.version, state.steps[-1].reason)
                return self._promoted(state)
        except Unfit as error:
            reason = error.problem
        except _RejectedError as error:
            reason = str(error)
        tell(f"v{state.version} is rolled back: {reason}")
        return self._journal.move(state, ROLLED_BACK, reason, reason=reason)

    def _stage(
        self,
        state: State,
        percent: int,
        doors: Doors,
        traffic: Traffic,
        wanted: Callable[[], bool],
        tell: Progress,
    ) -> State:
        """Open the canary to a percentage and look until it is decided; the last step of the new state says how."""
        name = _name(percent)
        if state.stage != name:
            why = f"{_shown(state.steps[-1].percent)} passed" if state.steps else "ready"
            state = self._journal.move(state, name, why)
        self._journal.check(state)
        self._plane.split(percent)
        stage = Stage(state.champion, state.version, percent, state.salt, doors)
        judge = Judge.from_json(state.judge) if state.judge else Judge(self._rules, first=not state.champion)
        tell(f"v{state.version} {_shown(percent)}: gathering evidence")
        while True:
            if not wanted():
                step = replace(state.step(percent), verdict="stopped", reason="no longer wanted")
                return self._journal.save(state, steps=state.having(step))
            portion = traffic.look(stage, state.mark)
            judgement = judge.look(portion.evidence)
            step = replace(
                state.step(percent).plus(portion.evidence),
                verdict=judgement.outcome,
                rule=judgement.rule,
                reason=judgement.reason,
                findings=judgement.findings,
            )
            if judgement.exhausted:
                step = replace(step, verdict="fail")
            state = self._journal.save(state, steps=state.having(step), judge=judge.to_json(), mark=portion.mark)
            if step.verdict != "inconclusive":
                tell(f"v{state.version} {_shown(percent)}: {step.verdict}, {step.reason}")
                return state

    @contextmanager
    def _open(self, state: State, tell: Progress) -> Iterator[Doors]:
        """Both versions, ready; afterwards what was before, unless the rollout was taken out of our hands."""
        tell(f"starting v{state.version}" + (f" beside v{state.champion}" if state.champion else ""))
        try:
            yield self._plane.open(state.champion, state.version, state.salt)
        except (OvertakenError, Unfit, _RejectedError):
            raise
        except BaseException:
            agreed = self._registry.agreement.now()  # not the state: MLflow may have gone right after the promotion
            self._plane.settle(agreed.champion, agreed.previous)
            raise

    def _promoted(self, state: State) -> State:
        reason = state.steps[-1].reason if state.steps else "promoted"
        return self._journal.move(state, PROMOTED, "promoted", reason=reason)

    def _settle(self, state: State) -> RolloutResult:
        """Make registry, plane and record agree with a final state; all of it may be done already."""
        if state.stage == PROMOTED:
            self._registry.promote(state.version)
            self._registry.tag(state.version, ROLLOUT, PROMOTED)
        else:
            self._registry.reject(state.version, state.reason)
        serving = self._rest()
        outcome: Final = "champion" if state.stage == PROMOTED else "rolled_back"
        steps = tuple(s.to_json() for s in state.steps)
        result = RolloutResult(state.version, outcome, steps, serving, state.reason, state.id)
        self._journal.record(result)
        return result

    def _rest(self) -> str:
        """Let the registry's champion serve alone, the one before standing by; returns the champion."""
        agreed = self._registry.agreed()
        self._plane.settle(agreed.champion, agreed.previous)
        self._plane.close()
        return agreed.champion

    def _decided_before(self, version: str, outcome: Final, champion: str, reason: str) -> RolloutResult:
        """Nothing to do but to let the champion serve; the steps are those on record."""
        self._rest()
        before = self._journal.recorded(version)
        same = before is not None and before.outcome == outcome
        steps, rollout = (before.steps, before.rollout) if before and same else ((), "")
        result = RolloutResult(version, outcome, steps, champion, reason, rollout)
        self._journal.record(result)
        return result


def _name(percent: int) -> str:
    return str(percent) if percent else DARK


def _shown(percent: int) -> str:
    return f"at {percent} %" if percent else "in the dark"
