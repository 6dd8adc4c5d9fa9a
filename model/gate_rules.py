"""The gate's thresholds. Every number that decides about promotion is here, with its exact rule.

The gate asks whether the challenger is *not worse*, not whether it is better: a retrain on three days of new
engagement keeps the ranker fresh, and its gain on the very next requests is usually smaller than what a few hundred
of them can show. So the burden of proof is non-inferiority: the interval must exclude a loss of `MARGIN`.
"""

CONFIDENCE = 0.95
"""Two-sided confidence of every interval (percentile bootstrap over users)."""

RESAMPLES = 2000
"""Bootstrap resamples; the bounds' own noise is then about a tenth of the interval's width."""

MIN_REQUESTS = 100
"""The evidence suffices if it holds **≥** this many requests with more than three candidates …"""

MIN_USERS = 20
"""… by **≥** this many users; fewer cannot be re-drawn in enough ways for an interval to mean anything."""

MARGIN = 0.05
"""The challenger is not worse if the lower bound of its relative difference in HIT@3/<primary> is **>** -MARGIN.

5 % is what a few hundred paired requests can exclude when two models are nearly equal; 1 % needs some 38,000."""

NEGATIVE_MARGIN = 0.20
"""A negative action is not worse if the lower bound of its relative difference is **≤** this.

Negative actions are rare, so the burden of proof is the other way round: only a proven rise holds a challenger."""


def enough(requests: int, users: int) -> bool:
    """Whether there is enough evidence to judge at all."""
    return requests >= MIN_REQUESTS and users >= MIN_USERS


def above_random(upper: float) -> bool:
    """Whether a model's HIT@3/<primary> minus that of a random order is not proven negative: `upper ≥ 0`."""
    return upper >= 0


def not_worse(lower: float) -> bool:
    """Whether a loss of `MARGIN` is excluded: `lower > -MARGIN`."""
    return lower > -MARGIN


def proven_worse(upper: float) -> bool:
    """Whether a loss is certain rather than merely possible: `upper < 0`."""
    return upper < 0


def negative_not_worse(lower: float) -> bool:
    """Whether a rise of a negative action by more than `NEGATIVE_MARGIN` is unproven: `lower ≤ NEGATIVE_MARGIN`."""
    return lower <= NEGATIVE_MARGIN
