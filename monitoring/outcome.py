"""How good the serving model is on what people did, once that is known; and how good one of its age should be.

HIT@3 depends on how easy a request is: with more saves to be had, any order hits more. So models are compared by their
*lift*, HIT@3 by that of a random order on the same requests (exact, `model.metrics.random_hit3`):

    expected = baseline's lift * age curve(age) * HIT@3 of a random order now

The baseline is what the gate measured when the model was admitted; the age curve is how the lift of earlier models fell
with their age. A model is old news only if it does worse than models of its age did.

Shapes: R requests, N candidates, A actions, Q comparable requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from engagement.table import RankingTable, micros
from model.bootstrap import ratios, sums_by_user
from model.metrics import Hits, hit3, hits, random_hit3
from monitoring.verdict import DriftVerdict, Outcome

MATURES = timedelta(hours=24)
"""A request's labels have matured when `event + MATURES <= as_of`. Younger ones count as immature, not as negative."""

LOOK_BACK = timedelta(days=3)
"""Matured requests of so long before are looked at: long enough to be sure, short enough to be news."""

MARGIN = 0.10
"""Quality is lost if the upper bound of HIT@3 is **<** what is expected, less this share of it.

A gate's evidence is a little too good, for what passed was chosen for it, and weekends differ from weekdays."""

UNKNOWN_MARGIN = 0.30
"""The margin while no age curve is known: then only against what the model had when it was fresh."""

CONFIDENCE = 0.98
"""Of the two-sided interval whose upper bound counts. A month has some ten windows that do not overlap, so 1 % each and
the margin, with two of three checks in the trigger, leave false alarms rare. Shown is the usual 95 %."""

LEAST_REQUESTS = 100
LEAST_USERS = 20
"""Quality is judged on **≥** so many comparable requests by so many users."""

BIN_HOURS = 24.0
"""Width of the age curve's bins."""

LEAST_MODELS = 3
"""Earlier models that must have been seen at an age for the curve to know it."""

RESAMPLES = 1000


@dataclass(frozen=True)
class Baseline:
    """What the gate measured of the model when it was admitted, of the primary action.

    Attributes:
        hit3: HIT@3.
        error: Its standard error.
        random: HIT@3 of a random order on the same requests.
    """

    hit3: float
    error: float
    random: float

    @classmethod
    def of(cls, gate: Mapping[str, Any]) -> "Baseline | None":
        """From a verdict of the gate as JSON; None where it measured nothing."""
        action = gate["primary_action"]
        challenger, chance = (gate["metrics"].get(who) for who in ("challenger", "random"))
        value = challenger and challenger["hit3"].get(action)
        random = chance and chance["hit3"].get(action)
        if not value or not random:
            return None
        low, high = challenger.get("interval", {}).get(action) or (value, value)
        error = (high - low) / (2 * 1.96) if low is not None and high is not None else 0.0
        return cls(value, error, random)

    @property
    def lift(self) -> float:
        """HIT@3 by that of a random order."""
        return self.hit3 / self.random


@dataclass(frozen=True)
class AgeCurve:
    """How lift falls with a model's age.

    Attributes:
        ages: (K,) hours, ascending: middles of the bins that are known.
        shares: (K,) lift as a share of the first bin's, never rising.
        models: How many earlier models told it.
    """

    ages: tuple[float, ...]
    shares: tuple[float, ...]
    models: int

    @classmethod
    def of(cls, history: Sequence[DriftVerdict], action: str) -> "AgeCurve":
        """Learn it from past checks.

        Each model is compared with itself: its lift in each bin of age by that in its first bin, which is common to all
        models (most hours a fresh model has are known of each). A bin's share is the median over models, and no bin is
        above a younger one.

        Args:
            history: Past checks of any model, in any order.
            action: The primary action.
        """
        lifts: dict[str, dict[int, list[float]]] = {}
        for check in history:
            told = check.outcome
            if told and told.requests >= LEAST_REQUESTS and told.hit3.get(action) and told.random.get(action):
                bins = lifts.setdefault(check.model_version, {})
                bins.setdefault(int(told.age_hours // BIN_HOURS), []).append(told.hit3[action] / told.random[action])
        curves = [{b: float(np.median(v)) for b, v in bins.items()} for bins in lifts.values()]
        first = _first_bin(curves)
        if first is None:
            return cls((), (), len(curves))
        known = [c for c in curves if first in c]
        ages, shares = [], []
        for b in sorted({b for c in known for b in c if b >= first}):
            found = [c[b] / c[first] for c in known if b in c]
            if len(found) >= LEAST_MODELS:
                ages.append((b + 0.5) * BIN_HOURS)
                shares.append(float(np.median(found)))
        return cls(tuple(ages), tuple(float(s) for s in np.minimum.accumulate(shares)), len(known))

    def at(self, age_hours: float) -> float | None:
        """The share that is left at an age; None while it is unknown. Beyond the oldest known age, that of it."""
        return float(np.interp(age_hours, self.ages, self.shares)) if self.ages else None


def _first_bin(curves: Sequence[Mapping[int, float]]) -> int | None:
    """The youngest bin that enough models have."""
    bins = sorted({b for c in curves for b in c})
    return next((b for b in bins if sum(b in c for c in curves) >= LEAST_MODELS), None)


def looked_at(as_of: datetime, trained_to: datetime) -> tuple[datetime, datetime]:
    """Start and end of the requests whose outcome a check at `as_of` needs, those not matured yet among them."""
    return min(as_of, max(trained_to, as_of - MATURES - LOOK_BACK)), as_of


def outcome(
    table: RankingTable,
    scores: np.ndarray,
    as_of: datetime,
    trained_to: datetime,
    baseline: Baseline | None,
    curve: AgeCurve,
    seed: int = 0,
) -> Outcome | None:
    """Measure a model on matured labels.

    Args:
        table: Requests of `looked_at`, with the labels known at `as_of`.
        scores: (N, A) the model's predicted chances.
        as_of: Instant of the check, aware.
        trained_to: End of the model's training window; what is older, it has learned and does not count.
        baseline: Of the model when it was admitted; None for one without evidence.
        curve: Of earlier models.
        seed: Of the bootstrap.

    Returns:
        None where no comparable request has matured.
    """
    start, ripe = micros(trained_to), micros(as_of - MATURES)
    time = np.asarray(table.time)
    chosen = np.flatnonzero((time >= start) & (time <= ripe))
    immature = int(((time > ripe) & (time < micros(as_of))).sum())
    matured, predicted = table.select(chosen), np.asarray(scores)[table.rows_of(chosen)]
    counted = hits(matured, predicted)
    if not len(counted.requests):
        return None
    actions, primary = table.spec.actions, table.spec.primary_action
    middle = float(time[chosen].min() + time[chosen].max()) / 2
    age = (middle - start) / 3.6e9
    measured, chance = hit3(counted), random_hit3(counted)
    shown, upper = _intervals(counted, seed)
    expected, lost, reason = _judged(counted, measured[primary], upper[primary], chance[primary], baseline, curve, age)
    rates = {a: float(matured.labels[:, i].mean()) for i, a in enumerate(actions)}
    guessed = {a: float(np.mean(predicted[:, i], dtype=np.float64)) for i, a in enumerate(actions)}
    return Outcome(
        requests=len(counted.requests),
        immature=immature,
        hit3=measured,
        interval=shown,
        predicted=guessed,
        observed=rates,
        calibration={a: guessed[a] / rates[a] for a in actions if rates[a] > 0},
        age_hours=age,
        expected=expected,
        lost=lost,
        reason=f"HIT@3/{primary} {measured[primary]:.3f} on {len(counted.requests):,} matured requests, {reason}",
        random=chance,
        primary=primary,
    )


def _intervals(counted: Hits, seed: int) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """By action the 95 % interval, as finite numbers, and the upper bound that decides."""
    per_user = sums_by_user(counted.hits_QA, counted.user)
    requests = np.bincount(counted.user).astype(np.float64)
    drawn = ratios(per_user, np.repeat(requests[:, None], per_user.shape[1], 1), requests, RESAMPLES, seed)
    low, high = (np.clip(bound, 0.0, 3.0) for bound in drawn.bounds(0.95))
    upper = drawn.bounds(CONFIDENCE)[1]
    shown = {a: (float(low[i]), float(high[i])) for i, a in enumerate(counted.actions)}
    return shown, {a: float(upper[i]) for i, a in enumerate(counted.actions)}


def _judged(
    counted: Hits,
    measured: float,
    upper: float,
    chance: float,
    baseline: Baseline | None,
    curve: AgeCurve,
    age: float,
) -> tuple[float | None, bool, str]:
    """What is expected, whether it is lost, and a clause that says why."""
    if baseline is None:
        return None, False, "nothing was measured of the model when it was admitted"
    share = curve.at(age)
    expected = None if share is None else baseline.lift * share * chance
    like = "models of its age" if share is not None else "it, when it was fresh,"
    aim = baseline.lift * (share or 1.0) * chance
    margin = MARGIN if share is not None else UNKNOWN_MARGIN
    told = f"and {like} would have {aim:.3f}"
    if len(counted.requests) < LEAST_REQUESTS or counted.user.max() + 1 < LEAST_USERS:
        return expected, False, f"too few to judge, {told}"
    # The baseline is an estimate too: its error widens the bound, as errors of independent numbers add up.
    reach = float(np.hypot(upper - measured, 2.33 * baseline.error / baseline.random * (share or 1.0) * chance))
    lost = measured + reach < aim * (1 - margin)
    worse = (
        f"more than {margin:.0%} below it beyond chance" if lost else f"not more than {margin:.0%} below beyond chance"
    )
    return expected, lost, f"{told}: {worse}"
