"""Power analysis: how much evidence a decision takes.

The standard error comes from the measured requests, paired and clustered by user, so it holds the design effect of
users with many requests; it shrinks with the square root of the number of requests as long as further requests come
from users like these.
"""

import math

from scipy import stats


def power(error: float, gap: float, users: int, confidence: float) -> float:
    """Chance that a two-sided interval excludes a value that lies `gap` below the truth.

    Args:
        error: Standard error of the estimate.
        gap: Distance from the truth to the value to be excluded, above 0.
        users: Independent clusters behind the error.
        confidence: Of the interval.
    """
    return float(stats.norm.cdf(gap / error - _quantile(users, confidence))) if error > 0 else 1.0


def requests_needed(error: float, gap: float, requests: int, users: int, confidence: float, aim: float) -> float:
    """Requests at which `power` reaches `aim`: n * (error * (t + z) / gap)^2 (e.g. Chow, Shao and Wang 2008, ch. 3).

    Args:
        error: Standard error measured on `requests` requests by `users` users.
        gap: As in `power`; with none or a negative one no number of requests suffices.
        requests: n.
        users: Independent clusters behind the error.
        confidence: Of the interval.
        aim: The power wanted.

    Returns:
        A whole number, or infinity.
    """
    if gap <= 0 or not math.isfinite(error):
        return math.inf
    return math.ceil(requests * (error * (_quantile(users, confidence) + float(stats.norm.ppf(aim))) / gap) ** 2)


def _quantile(users: int, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, max(1, users - 1)))
