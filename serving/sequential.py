"""Always-valid statistics: they may be looked at after every portion without more false alarms than after one.

Each statistic is a small state of sums. Users stay in their arm, so requests of one user are dependent; two ways deal
with it. `GroupedMean` hashes users into `GROUPS` groups, keeps a sum for each over all portions, and takes the
variance from between the groups ("random groups": Wolter, Introduction to Variance Estimation, 2007, chapter 2), which
holds whatever the dependence within a user and over time is. Rare events (`CountRatio`, `Split`) count a user once
(`Distinct`).

Why a bound over time stays valid when portions share users: with S the centred sum and V its variance, portions that
depend positively make Cov(S_s, S_t) >= V_s, so the standardised process is more correlated over time than Brownian
motion, and by Slepian's inequality (1962) crosses a one-sided bound at most as often.

Shapes: N requests, A and B those of champion and challenger, G groups of users, J alternatives of a mixture.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln, ndtr, stdtrit

_T = TypeVar("_T")

GROUPS = 64
_MOST_USERS = 4096
_HASH_BITS = 53  # so that a hash is an exact JSON number
_RATIOS_J = np.array([1.3, 2.0, 4.0, 8.0, 20.0, 60.0, 200.0])  # alternatives of `CountRatio`, in units of its null


def mixed(user_N: np.ndarray) -> np.ndarray:
    """Users' ids mixed to uniform integers below 2^53 (Stafford's variant 13 of MurmurHash3's finaliser), uint64."""
    x_N = np.asarray(user_N, np.int64).astype(np.uint64)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x_N ^ (x_N >> np.uint64(31))) >> np.uint64(64 - _HASH_BITS)


def multiplier(time: float, tuned: float, alpha: float) -> float:
    """One-sided bound in standard errors that holds at all times at once, with probability `1 - alpha`.

    Asymptotic confidence sequence, one-sided: |error| <= sqrt(2 (1 + 1/(t r²)) log(1 + sqrt(t r² + 1) / (2 alpha)))
    standard errors, r² = (-2 log(alpha) + log(-2 log(alpha)) + 1) / tuned (Waudby-Smith, Arbour, Sinha, Kennedy,
    Ramdas, Time-uniform central limit theory and asymptotic confidence sequences, 2021, appendix on one-sided
    sequences; the boundary is the one-sided normal mixture of Howard, Ramdas, McAuliffe, Sekhon, Annals of Statistics
    49(2), 2021).

    Args:
        time: Units seen so far, t.
        tuned: Units at which the bound is to be tightest; it holds everywhere.
        alpha: Error probability, in (0, 0.5].
    """
    log = -2.0 * np.log(alpha)
    scaled = time / tuned * (log + np.log(log) + 1.0)
    return float(np.sqrt(2.0 * (1.0 + 1.0 / scaled) * np.log1p(np.sqrt(scaled + 1.0) / (2.0 * alpha))))


@dataclass
class GroupedMean:
    """A mean, a ratio of totals or a difference of means with a confidence sequence; users may be dependent.

    The estimate is sum(top) / sum(base) over groups; its standard error comes from the groups' residuals
    top - estimate x base (linearised ratio estimator), with Student's quantile for the few groups.

    Attributes:
        top_G: Numerator by group.
        base_G: Denominator by group.
        used_G: 1 where the group has requests (of the challenger's arm where there are two).
        time: Requests, or for two arms their harmonic count.
        n: Requests of the challenger.
    """

    top_G: np.ndarray = field(default_factory=lambda: np.zeros(GROUPS))
    base_G: np.ndarray = field(default_factory=lambda: np.zeros(GROUPS))
    used_G: np.ndarray = field(default_factory=lambda: np.zeros(GROUPS))
    time: float = 0.0
    n: int = 0

    def add(self, top_N: np.ndarray, base_N: np.ndarray, user_N: np.ndarray) -> None:
        """Add requests: the estimate is sum(top) / sum(base)."""
        group_N = _group(user_N)
        self.top_G = self.top_G + np.bincount(group_N, top_N, GROUPS)
        self.base_G = self.base_G + np.bincount(group_N, base_N, GROUPS)
        self._count(group_N, float(len(group_N)))

    def add_arms(self, a_A: np.ndarray, user_A: np.ndarray, b_B: np.ndarray, user_B: np.ndarray) -> None:
        """Add one portion of two concurrent arms: the estimate is mean(b) - mean(a), portion by portion.

        Portions are strata with weights w = A B / (A + B), so that what moves both arms at once (a slow hour, a
        growing share) cancels. A portion without one of the arms is left out.
        """
        if not len(a_A) or not len(b_B):
            return
        a_G, b_G = _group(user_A), _group(user_B)
        groups_a, groups_b = (int((np.bincount(g) > 0).sum()) for g in (a_G, b_G))
        mean_a, mean_b = float(np.mean(a_A)), float(np.mean(b_B))
        weight = len(a_A) * len(b_B) / (len(a_A) + len(b_B))
        spread_G = np.bincount(b_G, b_B - mean_b, GROUPS) / len(b_B) * _bessel(groups_b)
        spread_G -= np.bincount(a_G, a_A - mean_a, GROUPS) / len(a_A) * _bessel(groups_a)
        self.top_G = self.top_G + weight * (spread_G + (mean_b - mean_a) / GROUPS)
        self.base_G = self.base_G + weight / GROUPS
        self._count(b_G, weight)

    def _count(self, group_N: np.ndarray, time: float) -> None:
        self.used_G = np.maximum(self.used_G, np.bincount(group_N, minlength=GROUPS) > 0).astype(float)
        self.time += time
        self.n += len(group_N)

    @property
    def estimate(self) -> float:
        """NaN while there is nothing to divide by."""
        base = float(self.base_G.sum())
        return float(self.top_G.sum()) / base if base else float("nan")

    def bounds(self, alpha: float, tuned: float) -> tuple[float, float]:
        """Lower and upper bound, each alone valid at all times with probability `1 - alpha`; infinite while unknown."""
        base, used = float(self.base_G.sum()), int(self.used_G.sum())
        if not base > 0 or used < 2:
            return -np.inf, np.inf
        residual_G = self.top_G - self.estimate * self.base_G
        error = float(np.sqrt(used / (used - 1) * (residual_G**2).sum())) / base
        normal = multiplier(self.time, tuned, alpha)
        radius = error * -float(stdtrit(used - 1, ndtr(-normal)))
        return self.estimate - radius, self.estimate + radius


def _group(user_N: np.ndarray) -> np.ndarray:
    return (mixed(user_N) % np.uint64(GROUPS)).astype(np.int64)


def _bessel(groups: int) -> float:
    """What deviations from a mean of so many groups are too small by; of a single group nothing is known."""
    return float(np.sqrt(groups / max(groups - 1, 1)))


@dataclass
class CountRatio:
    """Betting that rare events are more frequent in the challenger's arm than the champion's by more than a ratio.

    Given that an event happens in a portion, it is the challenger's with probability p = r B / (A + r B), where A and
    B are the arms' exposures and r the ratio of rates. The wealth is the mixture over alternatives r' > r of
    prod (p' / p)^b ((1 - p') / (1 - p))^a; under any ratio <= r it is a non-negative supermartingale (monotone
    likelihood ratio), so that wealth >= 1/alpha ever happens with probability <= alpha (Ville 1939). Tests for 2 x 2
    tables as e-processes: Turner, Ly, Grünwald, Generic E-variables for exact sequential k-sample tests, 2021.
    Sampling without replacement only makes it safer (Hoeffding 1963, theorem 4: the wealth is convex in b).

    Attributes:
        log_J: Logarithm of the wealth by alternative.
        champion: Events of the champion.
        challenger: Events of the challenger.
    """

    log_J: np.ndarray = field(default_factory=lambda: np.zeros(len(_RATIOS_J)))
    champion: int = 0
    challenger: int = 0

    def add(self, champion: int, challenger: int, exposed: tuple[float, float], ratio: float) -> None:
        """Add one portion's events and exposures; the null hypothesis is a ratio of rates <= `ratio`."""
        a, b = exposed
        if a <= 0 or b <= 0:
            return
        other_J = ratio * _RATIOS_J
        shrink_J = np.log((a + other_J * b) / (a + ratio * b))
        self.log_J = self.log_J + challenger * np.log(_RATIOS_J) - (champion + challenger) * shrink_J
        self.champion += int(champion)
        self.challenger += int(challenger)

    @property
    def log_wealth(self) -> float:
        """Reject at level alpha when >= log(1/alpha)."""
        most = float(self.log_J.max())
        return most + float(np.log(np.exp(self.log_J - most).mean()))


@dataclass
class Split:
    """Sample-ratio mismatch: are new users split as they should be?

    Dirichlet-multinomial e-process of Lindon and Malek (Anytime-valid inference for multinomial count data, NeurIPS
    2022) with two arms: after c of n users with the challenger, whose share should be p, the Bayes factor is
    B(k p + c, k (1 - p) + n - c) / (B(k p, k (1 - p)) p^c (1 - p)^(n - c)), k the prior's weight.

    Attributes:
        challenger: Distinct users with the challenger.
        n: Distinct users.
    """

    challenger: int = 0
    n: int = 0

    def log_wealth(self, share: float, weight: float = 200.0) -> float:
        """Of the bet that the challenger's share is not `share`; reject at level alpha when >= log(1/alpha)."""
        a, b, c, rest = weight * share, weight * (1 - share), self.challenger, self.n - self.challenger
        fair = c * np.log(share) + rest * np.log1p(-share)
        return float(betaln(a + c, b + rest) - betaln(a, b) - fair)


def rate_bounds(events: int, n: int, alpha: float) -> tuple[float, float]:
    """Confidence sequence for a rate, each side alone valid at all times with probability `1 - alpha`.

    All p with B(a + c, b + n - c) / B(a, b) < p^c (1 - p)^(n - c) / alpha: the beta-binomial mixture (Robbins, Annals
    of Mathematical Statistics 41, 1970; Howard et al. 2021), its prior a = 1/2, b = 50 made for rare events.
    """
    if n <= 0:
        return 0.0, 1.0
    a, b, tiny = 0.5, 50.0, 1e-12
    rate = min(max(events / n, tiny), 1 - tiny)
    weight = float(betaln(a + events, b + n - events) - betaln(a, b) + np.log(alpha))

    def excess(p: float) -> float:
        return weight - events * math.log(p) - (n - events) * math.log1p(-p)

    low = float(brentq(excess, tiny, rate)) if events else 0.0
    high = float(brentq(excess, rate, 1 - tiny)) if events < n else 1.0
    return low, high


@dataclass
class Growth:
    """Growth per unit of something that jumps (resident memory), with an exact bound.

    For increments that are symmetric about their mean, exp(l S - l² V / 2), S their centred sum and V the sum of their
    squares, is a supermartingale for every l (de la Peña, Annals of Probability 27(1), 1999), and the one-sided normal
    mixture bounds S by sqrt(2 (V + r) log(1 + sqrt((V + r) / r) / (2 alpha))) at all times (Howard et al. 2021).
    One jump, however high, stands in S and in sqrt(V) alike and proves nothing.

    Attributes:
        total: Sum of increments less the margin.
        squares: Sum of their squares.
        units: Units over which they grew.
        n: Increments.
    """

    total: float = 0.0
    squares: float = 0.0
    units: float = 0.0
    n: int = 0

    def add(self, increment: float, units: float, margin: float) -> None:
        """Add an increment over so many units; the null hypothesis is a growth of `margin` a unit."""
        self.total += increment - margin * units
        self.squares += (increment - margin * units) ** 2
        self.units += units
        self.n += 1

    def radius(self, alpha: float, tuned: float) -> float:
        """Bound on the centred sum, each side alone valid with probability `1 - alpha`; `tuned` is V at its best."""
        r = tuned / (-2.0 * np.log(alpha) + np.log(-2.0 * np.log(alpha)) + 1.0)
        v = self.squares + r
        return float(np.sqrt(2.0 * v * np.log1p(np.sqrt(v / r) / (2.0 * alpha))))


@dataclass
class Distinct:
    """Users that were seen, each once, in bounded memory.

    Holds the hashes below a limit; when there are too many the limit is halved, for everybody alike, so that who is
    counted never depends on the arm.

    Attributes:
        hash_N: Sorted hashes, at most `_MOST_USERS`.
        limit: Users whose hash is not below it are not counted.
    """

    hash_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    limit: int = 1 << _HASH_BITS

    def new(self, *users: np.ndarray) -> tuple[int, ...]:
        """How many of each arm's users are seen for the first time, and see them."""
        hashes = [mixed(user_N).astype(np.int64) for user_N in users]
        fresh = [np.setdiff1d(np.unique(h[h < self.limit]), self.hash_N, assume_unique=True) for h in hashes]
        self.hash_N = np.union1d(self.hash_N, np.concatenate(fresh)).astype(np.int64)
        while len(self.hash_N) > _MOST_USERS:
            self.limit //= 2
            self.hash_N = self.hash_N[self.hash_N < self.limit]
        return tuple(len(f) for f in fresh)


def pack(state: Any) -> Any:  # noqa: ANN401  (nested dataclasses of numbers, arrays and these)
    """A state as plain JSON values."""
    if is_dataclass(state):
        return {f.name: pack(getattr(state, f.name)) for f in fields(state)}
    return state.tolist() if isinstance(state, np.ndarray) else state


def unpack(empty: _T, packed: Any) -> _T:  # noqa: ANN401
    """The state that was packed, given a fresh one of its kind, whose types it takes."""
    if is_dataclass(empty):
        values = {f.name: unpack(getattr(empty, f.name), packed[f.name]) for f in fields(empty)}
        return cast(_T, type(cast(Any, empty))(**values))
    if isinstance(empty, np.ndarray):
        return cast(_T, np.asarray(packed, empty.dtype))
    return cast(_T, type(empty)(packed))  # type: ignore[call-arg]
