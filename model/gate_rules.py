"""The gate's thresholds. Every number that decides about promotion is here, with its exact rule.

To be promoted a challenger must be *not worse* (a loss of `MARGIN` is excluded) and *worth it*: better, or cheaper, or
fresher. "Not worse" carries the burden of proof; the guards behind it (slices, negative actions, forgetting) hold a
challenger that is proven worse, because on their few requests nothing else could ever be proven.

Why fresher counts. A scheduled update learns a few days more than the champion. Its gain on the next few hundred
requests is a percent or so, and to show one percent takes thousands of them, so a gate that insists on "better" holds
nearly every update, the champion ages, and what it loses adds up. docs/results/gate.md simulates a year of gates:
fresher ends ahead of superiority there. Two models trained to the same instant cannot be fresher than each other; they
pass by being better or cheaper only.
"""

from model.config import RECIPES, Recipe

CONFIDENCE = 0.95
"""Two-sided confidence of every interval, so a bound is wrong in 2.5 % of the cases. The nominal error of the whole
gate is 5 %; the other half is room for evidence by few users, where intervals are a little too narrow."""

RESAMPLES = 2000
"""Bootstrap resamples; the bounds' own noise is then about a tenth of a standard error."""

MIN_REQUESTS = 100
"""The evidence suffices if it holds **≥** this many requests with more than three candidates …"""

MIN_USERS = 20
"""… by **≥** this many users; fewer cannot be re-drawn in enough ways for an interval to mean anything."""

FLOOR_AUC = 0.5
"""The challenger's AUC of the primary action is **≥** this, champion or none."""

MARGIN = 0.05
"""The challenger is not worse if the lower bound of its relative difference in HIT@3/<primary> is **>** -MARGIN.

5 % is what a few hundred paired requests can exclude when two models are nearly equal; 1 % needs some 10,000."""

POWER = 0.80
"""Chance of passing that "requests missing" aims at, for two models that are equal."""

SEED_STD = {RECIPES["laptop"]().digest(): 0.010 / 1.159}
"""Relative standard deviation of HIT@3/<primary> from seed to seed, by recipe (docs/results/ranker.md, five seeds on
MovieLens; KuaiRand's is smaller). Looked up by the digest of the recipe that a model was really trained with, so any
other one is unknown. Measure again when the recipe changes."""

CHEAPER = 0.90
"""Cheaper: latency or memory is **≤** this share of the champion's …"""

NOT_HIGHER = 1.02
"""… and the other **≤** this share; two measurements of one model differ by so much."""

SLICE_MARGIN = 0.10
"""A slice is worse if its relative loss in HIT@3 is proven to exceed this: Holm-adjusted p **<** SLICE_ALPHA."""

SLICE_ALPHA = 0.05
"""Chance that any slice at all is called worse when none is (one-sided, all slices together)."""

MIN_SLICE_REQUESTS = 50
"""A slice is tested if it holds **≥** this many comparable requests …"""

MIN_SLICE_USERS = 20
"""… by **≥** this many users; context values with fewer are not slices at all."""

NEGATIVE_MARGIN = 0.20
"""A negative action holds if HIT@3 of it minus (1 + this) times the champion's has a lower bound **>** 0.

Negative actions are rare, so the burden of proof is the other way round: only a proven rise holds a challenger."""

FORGETTING_BUDGET = 0.05
"""On held-out requests of past windows, a relative difference whose upper bound is **<** -this holds."""

ECE_BUDGET = 0.05
"""Calibration is within its budget if the primary head's expected calibration error is **≤** this plus what a perfectly
calibrated model would show on as many rows, by chance …"""

ECE_SLACK = 0.01
"""… or **≤** the champion's on the same rows plus this."""

PSI_LIMIT = 0.25
"""Scores are close to the champion's if the population stability index over its deciles is **≤** this, the customary
mark of a major shift; a larger shift is explained if the challenger is the better calibrated of the two."""

LATENCY_MS = 50.0
"""CPU time of one request is **≤** this …"""

LATENCY_RATIO = 1.5
"""… and **≤** this many times the champion's."""

MEMORY_BYTES = 4 * 2**30
"""Peak memory of loading and scoring is **≤** this, the weights file too …"""

MEMORY_RATIO = 2.0
"""… and both **≤** this many times the champion's: new ids add rows to the table with every update."""


def enough(requests: int, users: int) -> bool:
    """Whether there is enough evidence to judge at all."""
    return requests >= MIN_REQUESTS and users >= MIN_USERS


def above_floor(random_high: float, auc: float) -> bool:
    """Whether HIT@3/<primary> minus a random order's is not proven negative (`high ≥ 0`), and the AUC suffices."""
    return random_high >= 0 and auc >= FLOOR_AUC


def not_worse(low: float) -> bool:
    """Whether a loss of `MARGIN` is excluded: `low > -MARGIN`."""
    return low > -MARGIN


def proven_worse(high: float) -> bool:
    """Whether a loss is certain rather than merely possible: `high < 0`."""
    return high < 0


def seed_std(recipe: Recipe) -> float | None:
    """How much HIT@3/<primary> differs from seed to seed, relatively; None if nobody has measured it."""
    return SEED_STD.get(recipe.digest())


def better(value: float, low: float, std: float | None) -> bool:
    """Reproducible superiority: `low > 0`, and `value > std`, the known deviation between seeds."""
    return low > 0 and std is not None and value > std


def cheaper(latency_ratio: float, memory_ratio: float) -> bool:
    """One at least a tenth lower, the other not higher."""
    first, second = sorted((latency_ratio, memory_ratio))
    return first <= CHEAPER and second <= NOT_HIGHER


def fresher(newer: bool, value: float, std: float | None) -> bool:
    """Trained to a later instant, and measured no further below the champion than seeds differ: `value ≥ -std`."""
    return newer and value >= -(std or 0.0)


def slice_worse(adjusted_p: float) -> bool:
    """Whether a slice's loss of more than `SLICE_MARGIN` is proven: `p < SLICE_ALPHA`."""
    return adjusted_p < SLICE_ALPHA


def negative_not_worse(excess_low: float) -> bool:
    """Whether a rise of a negative action beyond `NEGATIVE_MARGIN` is unproven: `low ≤ 0`."""
    return excess_low <= 0


def remembers(high: float) -> bool:
    """Whether a loss beyond `FORGETTING_BUDGET` on the past is unproven: `high ≥ -FORGETTING_BUDGET`."""
    return high >= -FORGETTING_BUDGET


def calibrated(ece: float, chance: float, champion: float | None) -> bool:
    """Whether the calibration error is within its absolute budget, or near the champion's."""
    return ece <= ECE_BUDGET + chance or (champion is not None and ece <= champion + ECE_SLACK)


def scores_close(psi: float) -> bool:
    """Whether the distribution of scores has not shifted: `psi ≤ PSI_LIMIT`."""
    return psi <= PSI_LIMIT


def latency_fits(milliseconds: float, ratio: float) -> bool:
    """Whether one request is scored fast enough, in CPU time and beside the champion."""
    return milliseconds <= LATENCY_MS and ratio <= LATENCY_RATIO


def memory_fits(most_bytes: int, ratio: float) -> bool:
    """Whether weights and peak are small enough, in bytes and beside the champion."""
    return most_bytes <= MEMORY_BYTES and ratio <= MEMORY_RATIO
