"""The rollout of one version: pending, 10 %, 50 %, 100 %, champion; or rolled back, from anywhere.

At each step real requests are replayed through the gateway, users sticky by bucket, and the judge compares
what the challenger answered with what the registered model gives for the same features. State is on disk
after every
transition: a killed rollout is taken up by the next call where it was, and ends the same. While it runs, the
challenger dies with the rollout, so that no unwatched challenger ever answers anybody: the gateway then
gives its users to the champion.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.buckets import choose_salt, in_canary
from serving.gateway import Routing
from serving.judge import MIN_ANSWERS, Answer, Judgement, judge
from serving.processes import Process, free_port
from serving.protocol import RankRequest
from serving.registry import CHAMPION, ROLLOUT, Registry
from serving.replay import Client
from serving.rollout_state import PENDING, ROLLED_BACK, Final, Journal, RolloutResult, State, Step
from serving.scoring import Reader, Scorer, open_features
from serving.stack import PREDICTOR, Stack, backend, serving_lock

STEPS = (10, 50, 100)  # per cent of the users; a first model has nobody to share with and starts at the last
STEP_REQUESTS = 60  # replayed at each step, or all where there are fewer
ROUNDS = 3  # times a step is replayed before "inconclusive" means "no"

ReplayRequest = RankRequest
Progress = Callable[[str], None]


class _RejectedError(Exception):
    """The challenger is not fit to answer; its text says why."""


@dataclass(frozen=True)
class _Live:
    """What a canary works with: a client of the gateway and one of the challenger alone, and the truth to compare."""

    gateway: Client
    challenger: Client
    expected: Mapping[str, np.ndarray]
    primary: int


class Rollout:
    """Rolls versions out in one home.

    Args:
        settings: The home.
        registry: Its registry.
        stack: Where it serves; the default is the home's own.
        features: Opens the home's online features.
        scorer: Opens a bundle with them, to know what the challenger should answer.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        stack: Stack | None = None,
        features: Callable[[Settings], Reader] = open_features,
        scorer: Callable[[Path, Reader], Scorer] = Scorer,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._journal = Journal(settings.serving)
        self._stack = stack or Stack(settings, registry)
        self._features = features
        self._scorer = scorer

    def run(
        self,
        version: str,
        requests: Sequence[RankRequest],
        progress: Progress | None = None,
        again: bool = False,
    ) -> RolloutResult:
        """Roll a version out, or finish a rollout that was killed. Call it from the main thread.

        Args:
            version: Registered version.
            requests: Real requests to replay; each step takes the next `STEP_REQUESTS` of them, going round.
            progress: Called with one line when something happens.
            again: Try a version once more that was rolled back before.

        Raises:
            EvergreenError: The version is unknown, there are no requests, another rollout runs, or champion, gateway
                or features cannot be had: nothing was decided then, and the same call may be made again.
        """
        tell = progress or (lambda text: None)
        with serving_lock(self._settings):
            registered = self._registry.get(str(version))
            state = self._journal.load()
            champion = self._registry.aliases().get(CHAMPION, "")
            ours = state is not None and state.version == registered.version
            if state is None or not ours or self._stale(state, champion):
                verdict, _, reason = registered.tags.get(ROLLOUT, "").partition(": ")
                if champion == registered.version:
                    return self._decided_before(champion, "champion", champion, "it is champion already")
                if verdict == ROLLED_BACK and not again and not (ours and state and not state.final):
                    return self._decided_before(registered.version, "rolled_back", champion, reason)
                state = self._begin(registered.version, champion, state)
            elif state.stage == ROLLED_BACK and again:
                state = self._begin(registered.version, champion, state)
            if not state.final:
                if not requests:
                    raise EvergreenError(
                        "there are no requests to replay", "Import engagement up to the rollout's time"
                    )
                state = self._decide(state, requests, tell)
            return self._settle(state)

    def _stale(self, state: State, champion: str) -> bool:
        """Whether the recorded rollout says nothing about the present: the champion changed under it."""
        if state.stage == CHAMPION:
            return champion != state.version
        return champion not in (state.champion, state.version)

    def _begin(self, version: str, champion: str, before: State | None) -> State:
        if before is not None and not before.final and before.version != version:
            if champion == before.version:  # killed right after its promotion
                self._settle(self._journal.move(before, CHAMPION, "promoted", reason=_last_reason(before)))
            else:
                reason = f"given up for version {version}"
                self._settle(self._journal.move(before, ROLLED_BACK, reason, reason=reason))
        state = self._journal.move(State(version, champion), PENDING, "rollout begins")
        self._registry.offer(version)
        return state

    def _decide(self, state: State, requests: Sequence[RankRequest], tell: Progress) -> State:
        """Run the steps that are left; the returned state says how it ended, the registry may not know yet."""
        last = state.steps[-1] if state.steps else None
        if self._registry.aliases().get(CHAMPION) == state.version:  # killed right after the promotion
            return self._journal.move(state, CHAMPION, "promoted", reason=_last_reason(state))
        if last and last.verdict != "pass":  # killed on the way back
            return self._journal.move(state, ROLLED_BACK, last.reason, reason=last.reason)
        windows = {p: _window(requests, i) for i, p in enumerate(_steps(state))}
        if not state.salt:
            users = [(percent, [r.user_id for r in part]) for percent, part in windows.items()]
            state = replace(state, salt=choose_salt(state.version, users, MIN_ANSWERS))
        try:
            with self._serving(state, windows, tell) as live:
                for percent in windows:
                    if percent not in state.passed:
                        state = self._step(state, percent, windows[percent], live, tell)
                    if percent not in state.passed:
                        self._stack.gateway.shift(0)
                        raise _RejectedError(state.steps[-1].reason)
                self._registry.promote(state.version)
                self._take_over(state)
        except _RejectedError as error:
            tell(f"v{state.version} is rolled back: {error}")
            return self._journal.move(state, ROLLED_BACK, str(error), reason=str(error))
        return self._journal.move(state, CHAMPION, "promoted", reason=_last_reason(state))

    def _step(self, state: State, percent: int, window: Sequence[RankRequest], live: _Live, tell: Progress) -> State:
        """Open the canary to a percentage, replay, judge."""
        if state.stage != str(percent):
            why = "previous step passed" if state.steps else "ready"
            state = self._journal.move(state, str(percent), why, salt=state.salt)
        tell(f"v{state.version} at {percent} %: replaying {len(window)} requests")
        self._stack.gateway.shift(percent)
        wanted = [_wanted(state, percent, request) for request in window]
        answers: list[Answer] = []
        for _ in range(ROUNDS):
            answers += live.gateway.replay(window, wanted, state.salt)
            answers = _explain(answers, window, state, live)
            judgement = judge(answers, live.expected, state.version, live.primary)
            if judgement.outcome != "inconclusive":
                break
        step = _summary(percent, answers, state.version, judgement)
        tell(f"v{state.version} at {percent} %: {step.verdict}, {step.reason}")
        return self._journal.move(state, state.stage, f"{step.verdict}: {step.reason}", steps=(*state.steps, step))

    @contextmanager
    def _serving(self, state: State, windows: Mapping[int, Sequence[RankRequest]], tell: Progress) -> Iterator[_Live]:
        """Champion, challenger and gateway, in the stack of `evergreen up` where it runs, else for the time being."""
        stack, settings = self._stack, self._settings
        permanent = stack.permanent
        tell(f"starting v{state.version}" + (f" beside v{state.champion}" if state.champion else ""))
        try:
            if permanent:
                stack.serve_champion()
            old = stack.predictor(state.champion, temporary=not permanent) if state.champion else None
            new = self._start_challenger(state)
            scorer, expected = self._expect(state, windows)  # while they start
            if old:
                stack.processes.wait(old)
            try:
                stack.processes.wait(new)
            except EvergreenError as error:
                raise _RejectedError(error.problem) from error
            routing = Routing(backend(old) if old else None, backend(new), 0, state.salt)
            if permanent:
                stack.gateway.apply(routing)
            else:
                stack.gateway.start(routing, free_port(), temporary=True)
            door = stack.gateway.process
            assert door is not None
            actions = scorer.spec.actions
            yield _Live(
                Client(door.ports["http"], settings.model_name, actions),
                Client(new.ports["http"], settings.model_name, actions),
                expected,
                actions.index(scorer.spec.primary_action),
            )
        finally:
            if permanent:
                stack.serve_champion()
            else:
                stack.gateway.stop()
                stack.stop_predictors()

    def _start_challenger(self, state: State) -> Process:
        try:
            return self._stack.predictor(state.version, temporary=True)
        except EvergreenError as error:
            raise _RejectedError(error.problem) from error

    def _expect(
        self, state: State, windows: Mapping[int, Sequence[RankRequest]]
    ) -> tuple[Scorer, dict[str, np.ndarray]]:
        """Scores by the registered challenger for each request that it will be asked."""
        features = self._features(
            self._settings
        )  # without them nobody can be judged, which is not the challenger's fault
        asked = {
            request.request_id: request
            for percent, window in windows.items()
            for request in window
            if percent not in state.passed and _wanted(state, percent, request) == state.version
        }
        try:
            scorer = self._scorer(self._registry.fetch(state.version), features)
            return scorer, {name: scorer(request) for name, request in asked.items()}
        except EvergreenError as error:
            raise _RejectedError(error.problem) from error

    def _take_over(self, state: State) -> None:
        """The challenger's process becomes the champion's: it goes on answering without a restart."""
        process = self._stack.processes.get(PREDICTOR + state.version)
        if self._stack.permanent and process:
            self._stack.processes.keep(process)

    def _settle(self, state: State) -> RolloutResult:
        """Make registry, stack and record agree with a final state; all of it may be done already."""
        if state.stage == CHAMPION:
            self._registry.promote(state.version)
            self._registry.tag(state.version, ROLLOUT, CHAMPION)
        else:
            self._registry.reject(state.version, state.reason)
        if self._stack.permanent:
            self._stack.serve_champion()
        serving = self._registry.aliases().get(CHAMPION, "")
        outcome: Final = "champion" if state.stage == CHAMPION else "rolled_back"
        result = RolloutResult(state.version, outcome, state.steps, serving, state.reason)
        self._journal.record(result)
        return result

    def _decided_before(self, version: str, outcome: Final, champion: str, reason: str) -> RolloutResult:
        """Nothing to do but to let the champion serve; the steps are those on record."""
        if self._stack.permanent:
            self._stack.serve_champion()
        before = self._journal.recorded(version)
        steps = before.steps if before and before.outcome == outcome else ()
        result = RolloutResult(version, outcome, steps, champion, reason)
        self._journal.record(result)
        return result


def _steps(state: State) -> tuple[int, ...]:
    return STEPS if state.champion else STEPS[-1:]


def _window(requests: Sequence[RankRequest], step: int) -> list[RankRequest]:
    """The step's share of the requests: each takes up where the one before left off, going round at the end."""
    size = min(STEP_REQUESTS, len(requests))
    return [requests[(step * size + i) % len(requests)] for i in range(size)]


def _wanted(state: State, percent: int, request: RankRequest) -> str:
    canary = percent >= 100 or not state.champion or in_canary(request.user_id, state.salt, percent)
    return state.version if canary else state.champion


def _explain(answers: list[Answer], window: Sequence[RankRequest], state: State, live: _Live) -> list[Answer]:
    """Where the champion stepped in for the challenger, ask the challenger alone once what ails it."""
    by_id = {r.request_id: r for r in window}
    for i, answer in enumerate(answers):
        if answer.wanted == state.version and answer.status == 200 and answer.failed and not answer.error:
            alone = live.challenger.ask(by_id[answer.request_id], state.version, state.salt)
            error = alone.error or "it did not answer in time"
            answers[i] = replace(answer, error=f"{error} (v{answer.version} stepped in)")
            break
    return answers


def _summary(percent: int, answers: Sequence[Answer], version: str, judgement: Judgement) -> Step:
    ours = [a.latency_ms for a in answers if a.wanted == version and not a.failed]
    p50, p99 = np.percentile(ours, [50, 99]) if ours else (0.0, 0.0)
    return Step(
        percent=percent,
        requests=len(answers),
        answered=len(ours),
        errors=sum(a.failed for a in answers),
        p50_ms=round(float(p50), 1),
        p99_ms=round(float(p99), 1),
        verdict=judgement.outcome,
        reason=judgement.reason,
    )


def _last_reason(state: State) -> str:
    return state.steps[-1].reason if state.steps else "promoted"
