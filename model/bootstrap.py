"""Studentised bootstrap of ratios over users, stratified, vectorised over all quantities at once.

A metric and a relative difference are both ratios of two sums over requests, theta = sum x / sum y (hits / requests;
hits gained / hits of the champion). Requests of one user are dependent, so whole users are drawn, within strata of
equal activity, and one draw serves all quantities: what is paired stays paired.

With few users a percentile interval is too narrow (docs/results/gate.md), so each resample is studentised (Efron and
Tibshirani 1993, ch. 12.5; Davison and Hinkley 1997, ch. 2.4):

    theta - t*(1 - tail) * se  <=  theta_true  <=  theta - t*(tail) * se,      t* = (theta* - theta) / se*

and no bound is nearer than Student's t for as many users would put it. se is that of a ratio from clusters in strata
by linearisation (Cochran 1977, ch. 11), with e_u = x_u - theta * y_u:

    se^2 = sum over strata h of n_h / (n_h - 1) * sum over u in h of (e_u - mean_h e)^2 / (sum y)^2

Shapes: B resamples, Q requests, U users (beyond `MOST` groups of users), H of one stratum, M quantities.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

MOST = 2000
"""Users beyond this number are pooled at random into this many groups, which are independent as users are; a standard
error from 2,000 groups is good to 2 %, and the work no longer grows with the data."""

STRATA = 3  # light, medium and heavy users
MIN_STRATUM = 10  # users; a smaller stratum joins its neighbour


@dataclass(frozen=True)
class Estimate:
    """A ratio with its uncertainty; bounds are infinite where they cannot be told.

    Attributes:
        value: theta.
        low: Lower bound.
        high: Upper bound.
        error: Standard error.
    """

    value: float
    low: float
    high: float
    error: float


@dataclass(frozen=True)
class Ratios:
    """M ratios and their resamples.

    Attributes:
        value_M: theta; NaN where the denominator is zero.
        error_M: Standard errors.
        t_BM: Studentised resamples.
        drawn_BM: theta of each resample.
        users: U.
    """

    value_M: np.ndarray
    error_M: np.ndarray
    t_BM: np.ndarray
    drawn_BM: np.ndarray
    users: int

    def bounds(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """(M,) lower and (M,) upper bounds of two-sided confidence; infinite where the resamples do not tell."""
        tail = (1 - confidence) / 2
        # An order statistic, not an interpolation: what lies between a number and infinity is infinity.
        t_2M = np.quantile(self.t_BM, [1 - tail, tail], axis=0, method="inverted_cdf")
        least = float(stats.t.ppf(1 - tail, max(1, self.users - 1)))
        t_2M = np.stack([np.maximum(t_2M[0], least), np.minimum(t_2M[1], -least)])
        with np.errstate(invalid="ignore"):
            step_2M = np.where(self.error_M > 0, t_2M * self.error_M, 0.0)
        unknown_M = ~np.isfinite(self.error_M) | np.isnan(self.value_M)
        low_M, high_M = self.value_M - step_2M[0], self.value_M - step_2M[1]
        return np.where(unknown_M, -np.inf, low_M), np.where(unknown_M, np.inf, high_M)

    def estimates(self, confidence: float) -> list[Estimate]:
        """The ratios as numbers."""
        columns = (self.value_M, *self.bounds(confidence), self.error_M)
        return [Estimate(*map(float, row)) for row in zip(*columns, strict=True)]


def sums_by_user(values_QM: np.ndarray, user: np.ndarray) -> np.ndarray:
    """(U, M) float64 sums over each user's requests; `user` holds codes 0..U-1."""
    columns = [np.bincount(user, values_QM[:, m]) for m in range(values_QM.shape[1])]
    return np.column_stack(columns)


def strata_of(requests_U: np.ndarray) -> np.ndarray:
    """(U,) codes 0.. of light, medium and heavy users: thirds of the users by their number of requests.

    Equal numbers are never parted, and a stratum of fewer than `MIN_STRATUM` users joins its neighbour.
    """
    cuts = np.quantile(requests_U, np.arange(1, STRATA) / STRATA, method="lower")
    stratum_U = np.searchsorted(np.unique(cuts), requests_U, side="left")
    while True:
        stratum_U = np.unique(stratum_U, return_inverse=True)[1]
        sizes = np.bincount(stratum_U)
        small = int(sizes.argmin())
        if sizes[small] >= MIN_STRATUM or len(sizes) == 1:
            return stratum_U
        stratum_U[stratum_U == small] = small - 1 if small else 1


def ratios(x_UM: np.ndarray, y_UM: np.ndarray, requests_U: np.ndarray, resamples: int, seed: int) -> Ratios:
    """Bootstrap M ratios of sums over users.

    Args:
        x_UM: Each user's sums of the numerators.
        y_UM: Of the denominators.
        requests_U: Each user's number of requests, by which users are stratified.
        resamples: B.
        seed: Seed; equal arguments give equal results.
    """
    rng = np.random.default_rng(seed)
    parts = [_pooled(np.stack([x_UM[of], y_UM[of]]), len(requests_U), rng) for of in _members(strata_of(requests_U))]
    members = [part.shape[1] for part in parts]
    value_M, error_M = _ratio(_moments(parts), members)
    drawn_BM, errors_BM = _ratio(_moments(parts, [_weights(n, resamples, rng) for n in members]), members)
    with np.errstate(invalid="ignore", divide="ignore"):
        t_BM = (drawn_BM - value_M) / errors_BM
    return Ratios(
        value_M, error_M, np.nan_to_num(t_BM, nan=0.0, posinf=np.inf, neginf=-np.inf), drawn_BM, len(requests_U)
    )


def one_sided(x_U: np.ndarray, least: float = 0.0) -> float:
    """p-value of "the users' mean of x is at least `least`" against "it is less", by Student's t over users.

    A t-test needs no resamples, so a p-value may be as small as a correction for many tests demands.
    """
    spread = float(x_U.std(ddof=1)) if len(x_U) > 1 else np.inf
    gap = float(x_U.mean()) - least
    return float(stats.t.cdf(gap / spread * np.sqrt(len(x_U)), len(x_U) - 1)) if spread else float(gap >= 0)


def _members(stratum_U: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(stratum_U == h) for h in range(stratum_U.max() + 1)]


def _pooled(sums_2HM: np.ndarray, users: int, rng: np.random.Generator) -> np.ndarray:
    """The stratum's users, or random groups of as many of them as its share of `MOST` allows."""
    members = sums_2HM.shape[1]
    groups = members * MOST // users
    if users <= MOST:
        return sums_2HM
    group_H = rng.permutation(members) % groups
    pooled = np.zeros((2, groups, sums_2HM.shape[2]))
    for k in range(2):
        np.add.at(pooled[k], group_H, sums_2HM[k])
    return pooled


def _weights(members: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(B, H) how often each member is drawn."""
    drawn = rng.integers(0, members, (resamples, members)) + np.arange(resamples)[:, None] * members
    return np.bincount(drawn.ravel(), minlength=resamples * members).reshape(resamples, members).astype(np.float64)


def _moments(parts: list[np.ndarray], weights: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Of each stratum (5, [B,] M): sums of x, y, xx, xy, yy over its members, weighted where resampled."""
    found = []
    for i, (x_HM, y_HM) in enumerate(parts):
        terms = (x_HM, y_HM, x_HM * x_HM, x_HM * y_HM, y_HM * y_HM)
        found.append(np.stack([weights[i] @ t if weights else t.sum(0) for t in terms]))
    return found


def _ratio(moments: list[np.ndarray], members: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The ratio and its standard error; NaN and infinite where the denominator is zero or a stratum has one member."""
    x, y = (sum(m[k] for m in moments) for k in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(y != 0, x / y, np.nan)
        square = np.zeros_like(value)
        for (sx, sy, xx, xy, yy), n in zip(moments, members, strict=True):
            within = xx - 2 * value * xy + value**2 * yy - (sx - value * sy) ** 2 / n
            noise = 1e-12 * (xx + value**2 * yy)  # what rounding leaves where all members agree
            square = square + (n / (n - 1) if n > 1 else np.inf) * np.where(within > noise, within, 0.0)
        error = np.sqrt(square) / np.abs(y)
    return value, np.where(np.isnan(error), np.inf, error)
