"""The judge's thresholds, and its rules: each looks at the facts and says pass, fail or inconclusive, and why.

Error control. A rule fails when a one-sided bound that is valid at all times shows harm beyond its `fails` margin; the
bounds of all rules share `alpha` equally (`TESTS`), so that a healthy model is rolled back by mistake with probability
<= `alpha` in a whole rollout, however often it is looked at (union bound). A rule passes when the harm that `excluded`
names is excluded at the level `miss`, again valid at all times. Between the two it is inconclusive.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from serving.judge_facts import ANYTHING, Events, Facts, Latency, Margins
from serving.sequential import GroupedMean, rate_bounds

Outcome = Literal["pass", "fail", "inconclusive"]

TESTS = 18
"""Tests that can fail by chance and share `alpha`: errors 3 (shadow, live, alone), constant 1, latency's shift and tail
4 (shadow, live), memory 1, split 3 (one a stage), score 4 (both sides of level and spread), quality 1; one to spare."""

CONSTANT_ANSWERS = 5
"""Constant when all of the challenger's answers are, and there are at least 5 (>= 5); or, with a champion beside it,
when constant answers are shown more frequent than the champion's by more than `error_ratio`."""

LEAST_BEYOND = 30
"""A latency tail of fewer than 30 requests (< 30) says nothing: its mean is not near normal."""

LEAST_PROVEN = 200
"""A mean over fewer than 200 requests (< 200) excludes nothing: so few may happen to be all alike."""

PAIRS_TUNED, ARMS_TUNED, MEMORY_TUNED = 2000.0, 1000.0, 100.0
"""Where the bounds are tightest: shadow requests, requests of the challenger, squared MB. They hold everywhere."""


@dataclass(frozen=True)
class Guardrails:
    """What a challenger must keep to; every margin is `(fails, excluded)` as in the module's head, unless said.

    Attributes:
        looks: Looks a stage; after so many inconclusive ones (>=) the caller gives up.
        requests: A stage is inconclusive with fewer (<) requests to the challenger (shadow requests while dark); below
            5 % of the users in proportion, see `needed`.
        proven: Passing needs the bound to exclude harm; else the estimate alone must (<) be better than `excluded`.
        alpha: Probability of a false rollback by chance, all rules and stages together.
        miss: Probability that a rule passes a model that is at its `excluded` margin.
        error_ratio: Fails when failed requests are shown to be more frequent than the champion's times this (>).
        error_excess: Excluded: a rate of failed requests above the champion's by this (>=); the first below 10 % of
            the users live, where requests are few, the second elsewhere.
        error_rate: The same without a champion beside it: fails when shown to be above (>), passes when below (<).
        shift: Ratio of geometric mean latencies, challenger to champion.
        tail: Ratio of p99 latencies; `ANYTHING`: not judged.
        leak: MB per thousand requests that memory grows beyond the champion's; `ANYTHING`: not judged.
        score: Ratio of mean primary scores, or its inverse where that is larger.
        spread: Ratio of the mean primary scores' variances over requests, or its inverse where that is larger.
        quality: Ratio of HIT@3/save, challenger to champion: fails when shown below the first (<), passes when shown
            above the second (>); 0 as the second: only shown harm counts.
        users: The split is inconclusive with fewer (<) distinct users in a stage.
    """

    looks: int
    requests: int
    proven: bool
    alpha: float
    miss: float
    error_ratio: float
    error_excess: tuple[float, float]
    error_rate: float
    shift: tuple[float, float]
    tail: tuple[float, float]
    leak: tuple[float, float]
    score: tuple[float, float]
    spread: tuple[float, float]
    quality: tuple[float, float]
    users: int

    def needed(self, percent: int) -> int:
        """Fewest requests to the challenger at a stage."""
        return math.ceil(self.requests * percent / 5) if 0 < percent < 5 else self.requests

    @property
    def margins(self) -> Margins:
        """What the statistics must know."""
        return Margins(self.tail, self.leak)


def homefeed() -> Guardrails:
    """Millions of requests a day: every harm that is named must be excluded with confidence before a stage passes."""
    return Guardrails(
        looks=100,
        requests=100,
        proven=True,
        alpha=0.01,
        miss=0.001,
        error_ratio=1.5,
        error_excess=(0.01, 0.004),
        error_rate=0.01,
        shift=(1.05, 1.12),
        tail=(1.25, 1.6),
        leak=(0.1, 0.8),
        score=(1.25, 1.5),
        spread=(2.0, 3.0),
        quality=(1.0, 0.95),
        users=100,
    )


def laptop() -> Guardrails:
    """Some 60 replayed requests a stage, on a machine that others use: harm that is shown fails, the rest by estimate.

    So few requests exclude no loss of quality and no rare error, and a neighbour's work looks like a slow or growing
    model. What is demanded: answers to nearly all requests (failures at most 1 % above the champion's, as measured),
    none of them invalid, in a time and with scores not out of all proportion (3 times the latency, 4 times the mean
    score). Quality, p99 and memory are not; a loss of quality that is shown fails all the same.
    """
    return Guardrails(
        looks=3,
        requests=5,
        proven=False,
        alpha=0.01,
        miss=0.01,
        error_ratio=1.5,
        error_excess=(0.01, 0.01),
        error_rate=0.01,
        shift=(3.0, 3.0),
        tail=(ANYTHING, ANYTHING),
        leak=(ANYTHING, ANYTHING),
        score=(2.0, 4.0),
        spread=(4.0, 16.0),
        quality=(1.0, 0.0),
        users=0,
    )


@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: Its name.
        outcome: What it says.
        value: What was measured; NaN where there is nothing.
        low: Lower bound at the level `miss`, NaN where there is none.
        high: Upper bound, likewise.
        n: Requests (users, readings) it rests on.
        demanded: Whether the stage cannot pass without it.
        text: In words.
    """

    rule: str
    outcome: Outcome
    value: float
    low: float
    high: float
    n: int
    demanded: bool
    text: str


@dataclass(frozen=True)
class _Context:
    facts: Facts
    rules: Guardrails
    percent: int

    @property
    def level(self) -> float:
        """Error probability of one test that can fail."""
        return self.rules.alpha / TESTS


def findings(facts: Facts, rules: Guardrails, percent: int, first: bool) -> tuple[Finding, ...]:
    """What every rule says, the most serious first."""
    context = _Context(facts, rules, percent)
    applied = _ALONE if first else (*_ALONE, *_BESIDE)
    return tuple(finding for rule in applied if (finding := rule(context)) is not None)


def _invalid(c: _Context) -> Finding:
    """Fails at the first invalid answer: it came whole, so nothing on the way excuses it."""
    bad, n = c.facts.invalid, c.facts.answered
    outcome: Outcome = "fail" if bad else ("pass" if n else "inconclusive")
    return Finding("invalid", outcome, float(bad), np.nan, np.nan, n, True, f"{bad} of {n} answers are invalid")


def _enough(c: _Context) -> Finding:
    n, needed = c.facts.stage, c.rules.needed(c.percent)
    outcome: Outcome = "pass" if n >= needed else "inconclusive"
    return Finding("requests", outcome, float(n), np.nan, np.nan, n, True, f"{n} requests, {needed} are needed")


def _alone(c: _Context) -> Finding | None:
    """Errors where no champion answers beside the challenger: against a fixed rate."""
    n, bad = int(c.facts.own[0]), int(c.facts.own[1])
    if not n and c.percent < 100:
        return None
    limit = c.rules.error_rate
    low, high = rate_bounds(bad, n, c.rules.miss)
    shown = rate_bounds(bad, n, c.level)[0]
    good = high < limit if c.rules.proven else n > 0 and bad <= limit * n
    text = f"{bad} of {n} requests failed, {limit:.1%} are allowed"
    return Finding("errors alone", _outcome(shown > limit, good), bad / max(n, 1), low, high, n, True, text)


def _constant(c: _Context) -> Finding | None:
    n, bad = (int(k) for k in c.facts.flat)
    if not n:
        return None
    fails = (bad == n and n >= CONSTANT_ANSWERS) or c.facts.constant.bet.log_wealth >= -np.log(c.level)
    text = f"{bad} of {n} answers have constant scores"
    return Finding("constant", "fail" if fails else "pass", bad / n, np.nan, np.nan, n, False, text)


def _shadow_errors(c: _Context) -> Finding:
    return _errors("errors (shadow)", c, c.facts.shadow_errors, c.rules.error_excess[1])


def _live_errors(c: _Context) -> Finding | None:
    excess = c.rules.error_excess[0 if c.percent < 10 else 1]
    return _errors("errors", c, c.facts.live_errors, excess) if c.percent else None


def _errors(name: str, c: _Context, events: Events, excluded: float) -> Finding:
    """Failed requests against the champion's: the bet fails it, the excess of the rates passes it.

    Where it is proven, a user's first failure alone counts, so that a busy user whose requests fail with either version
    is not held against the arm it is in; by estimate all failures count.
    """
    (n_a, n_b), (bad_a, bad_b) = events.asked, events.bad
    low_b, high_b = rate_bounds(events.bet.challenger, int(n_b), c.rules.miss / 2)
    low_a, high_a = rate_bounds(events.bet.champion, int(n_a), c.rules.miss / 2)
    excess = float(bad_b / max(n_b, 1) - bad_a / max(n_a, 1))
    good = high_b - low_a < excluded if c.rules.proven else n_b > 0 and excess <= excluded
    fails = events.bet.log_wealth >= -np.log(c.level)
    text = f"{bad_b:.0f} of {n_b:.0f} requests failed, the champion's {bad_a:.0f} of {n_a:.0f}"
    return Finding(name, _outcome(fails, good), excess, low_b - high_a, high_b - low_a, int(n_b), True, text)


def _split(c: _Context) -> Finding | None:
    if not 0 < c.percent < 100:
        return None
    split, share = c.facts.split, c.percent / 100
    fails = split.log_wealth(share) >= -np.log(c.level) if split.n else False
    text = f"{split.challenger} of {split.n} users are the challenger's, {share:.0%} should be"
    outcome = _outcome(fails, split.n >= c.rules.users)
    return Finding("split", outcome, split.challenger / max(split.n, 1), np.nan, np.nan, split.n, True, text)


def _shadow_shift(c: _Context) -> Finding:
    return _shift("latency (shadow)", c, c.facts.shadow_latency.shift, PAIRS_TUNED, demanded=True)


def _live_shift(c: _Context) -> Finding | None:
    """Demanded from 10 % on: at 1 % a few busy users decide how slow an arm looks."""
    if not c.percent:
        return None
    return _shift("latency", c, c.facts.live_latency.shift, ARMS_TUNED, demanded=c.percent >= 10)


def _shift(name: str, c: _Context, stat: GroupedMean, tuned: float, demanded: bool) -> Finding:
    """Fails when shown above the first margin (>), passes when shown below the second (<)."""
    fails, excluded = np.log(c.rules.shift)
    low, high = stat.bounds(c.rules.miss, tuned)
    harm = stat.bounds(c.level, tuned)[0] > fails
    good = bool((_proven(stat, high) if c.rules.proven else stat.estimate) < excluded)
    with np.errstate(over="ignore"):  # a bound that is still astronomic
        value, low, high = (float(np.exp(x)) for x in (stat.estimate, low, high))
    text = f"{_number(value)} times the champion's latency on {stat.n} requests; fails above {c.rules.shift[0]:g}"
    return Finding(name, _outcome(harm, good), value, low, high, stat.n, demanded, text)


def _shadow_tail(c: _Context) -> Finding | None:
    return _tail("p99 (shadow)", c, c.facts.shadow_latency, PAIRS_TUNED, demanded=True)


def _live_tail(c: _Context) -> Finding | None:
    """Demanded from 10 % on: at 1 % there are too few slow requests."""
    if not c.percent:
        return None
    return _tail("p99", c, c.facts.live_latency, ARMS_TUNED, demanded=c.percent >= 10)


def _tail(name: str, c: _Context, latency: Latency, tuned: float, demanded: bool) -> Finding | None:
    fails, excluded = c.rules.tail
    if fails >= ANYTHING:
        return None
    enough = latency.beyond >= LEAST_BEYOND
    harm = enough and latency.tail_fail.bounds(c.level, tuned)[0] > 0
    low, high = latency.tail_pass.bounds(c.rules.miss, tuned)
    good = enough and (high < 0 if c.rules.proven else latency.tail_pass.estimate < 0)
    text = f"p99 more than {fails:g} times the champion's " + ("is shown" if harm else "is not shown")
    text += f", {excluded:g} times is {'excluded' if good else 'not excluded'}"
    n = latency.tail_pass.n
    return Finding(name, _outcome(harm, good), latency.tail_pass.estimate, low, high, n, demanded, text)


def _memory(c: _Context) -> Finding | None:
    """Demanded from 50 % on: a slow leak shows under load."""
    fails, excluded = c.rules.leak
    if fails >= ANYTHING:
        return None
    leak, sound = c.facts.memory.leak, c.facts.memory.sound
    harm = leak.n > 0 and leak.total > leak.radius(c.level, MEMORY_TUNED)
    good = sound.n > 0 and sound.total < (-sound.radius(c.rules.miss, MEMORY_TUNED) if c.rules.proven else 0.0)
    units = max(sound.units, 1e-9)
    value = sound.total / units + excluded if sound.n else np.nan
    radius = sound.radius(c.rules.miss, MEMORY_TUNED) / units
    text = (
        f"memory grows by {_number(value)} MB per 1,000 requests beyond the champion's, {excluded:g} must be excluded"
    )
    outcome = _outcome(harm, good)
    return Finding("memory", outcome, value, value - radius, value + radius, sound.n, c.percent >= 50, text)


def _score(c: _Context) -> Finding:
    return _within("scores", c, c.facts.score, c.rules.score, "times the champion's mean score")


def _spread(c: _Context) -> Finding:
    return _within("spread", c, c.facts.spread, c.rules.spread, "times the champion's variance of scores")


def _quality(c: _Context) -> Finding:
    stat, (fails, excluded) = c.facts.quality, c.rules.quality
    low, high = stat.bounds(c.rules.miss, PAIRS_TUNED)
    harm = stat.bounds(c.level, PAIRS_TUNED)[1] < fails
    good = bool((-_proven(stat, -low) if c.rules.proven else stat.estimate) > excluded)
    text = f"HIT@3/save is {_number(stat.estimate)} times the champion's on {stat.n} requests"
    text += f", a loss of {1 - excluded:.0%} is {'' if good else 'not '}excluded" if excluded else ""
    return Finding("quality", _outcome(harm, good), stat.estimate, low, high, stat.n, excluded > 0, text)


def _within(name: str, c: _Context, stat: GroupedMean, margins: tuple[float, float], what: str) -> Finding:
    """Fails when shown outside 1/m..m with the first margin, passes when shown inside with the second."""
    low, high = stat.bounds(c.rules.miss, PAIRS_TUNED)
    lowest, highest = stat.bounds(c.level, PAIRS_TUNED)
    harm = lowest > margins[0] or highest < 1 / margins[0]
    below, above = (-_proven(stat, -low), _proven(stat, high)) if c.rules.proven else (stat.estimate, stat.estimate)
    good = bool(below > 1 / margins[1] and above < margins[1])
    text = f"{_number(stat.estimate)} {what} on {stat.n} requests; fails beyond {margins[0]:.3g} times"
    return Finding(name, _outcome(harm, good), stat.estimate, low, high, stat.n, True, text)


def _proven(stat: GroupedMean, bound: float) -> float:
    """The upper bound, infinite while there are too few requests."""
    return bound if stat.n >= LEAST_PROVEN else np.inf


def _outcome(harm: bool, good: bool) -> Outcome:
    return "fail" if harm else "pass" if good else "inconclusive"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "unknown"


_ALONE: tuple[Callable[[_Context], Finding | None], ...] = (_invalid, _alone, _constant, _enough)
_BESIDE: tuple[Callable[[_Context], Finding | None], ...] = (
    _live_errors,
    _shadow_errors,
    _split,
    _live_shift,
    _shadow_shift,
    _live_tail,
    _shadow_tail,
    _memory,
    _score,
    _spread,
    _quality,
)
