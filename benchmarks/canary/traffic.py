"""Simulated traffic of a canary: users who stay in their arm, two versions that answer, one of them perhaps harmful.

A look is five minutes. Users' activity is lognormal (the busiest hundredth asks for a fifth); requests follow the hour;
latencies are lognormal with a user's, a request's and an answer's part, and now and then both versions slow down
together. Fixed rates are named below; what a scenario changes is in `Scenario`.

Shapes: N requests of a look, P shadow pairs, U users.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from serving.evidence import Arm, Evidence, Pairs

REQUESTS = 6000  # a look, on average: 1.7 million a day
SHADOW = 0.2  # of the requests are scored by both versions
USERS = 30_000
LABEL_DELAY = 6  # looks until saves are known: half an hour
BASE_ERRORS = 0.0005
PRONE_USERS, PRONE_ERRORS = 0.0005, 0.2  # users whose requests often fail, whoever answers
BASE_MS = 30.0
READING_MB = 2.0  # noise of one memory reading


@dataclass(frozen=True)
class Scenario:
    """What is the matter with a challenger (or its surroundings).

    Attributes:
        name: Shown in the tables.
        harmful: Whether it must not be promoted.
        latency: Factor of its latency.
        errors: Rate of failed requests that it adds.
        hits: Factor of its HIT@3/save.
        leak: MB per thousand requests.
        invalid: Share of its answers that lack a prediction.
        nan_slice: Share of users whose answers hold a NaN.
        crash: Share of requests with an item on which it crashes; a crash takes ten other requests with it.
        constant: All scores are the same.
        lost: Share of its users whom the split gives the champion instead.
        live_only: The harm does not show on shadow requests.
        noisy: Neighbours slow both down five times as often, and each alone by 2 % from look to look.
        incident: The champion has a bad quarter of an hour at this look: 3 % errors, twice the latency; -1: never.
    """

    name: str
    harmful: bool = True
    latency: float = 1.0
    errors: float = 0.0
    hits: float = 1.0
    leak: float = 0.0
    invalid: float = 0.0
    nan_slice: float = 0.0
    crash: float = 0.0
    constant: bool = False
    lost: float = 0.0
    live_only: bool = False
    noisy: bool = False
    incident: int = -1


@dataclass(frozen=True)
class Look:
    """One look's evidence, and what only a rival reads: HIT@3 of the arms' own requests, known after the delay."""

    evidence: Evidence
    hits: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass
class World:
    """One canary's users and versions; `look` draws the next five minutes.

    Args:
        scenario: What is the matter.
        seed: Of everything that is drawn.
    """

    scenario: Scenario
    seed: int
    late_pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    late_arms: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng(self.seed)
        activity_U = np.cumsum(rng.lognormal(0, 1.2, USERS))
        self.asks = np.searchsorted(activity_U / activity_U[-1], (np.arange(1 << 18) + 0.5) / (1 << 18))
        self.bucket_U = rng.integers(0, 10_000, USERS)
        self.slow_U = 0.15 * rng.standard_normal(USERS)
        self.prone_U = rng.random(USERS) < PRONE_USERS
        self.slice_U = rng.random(USERS) < self.scenario.nan_slice
        self.lost_U = rng.random(USERS) < self.scenario.lost
        self.taste_U = rng.beta(3, 5, USERS)
        self.start = rng.random()
        self.time = 0
        self.memory = np.array([1500.0, 1350.0])
        self.warm = rng.uniform(30, 120)

    def look(self, percent: int) -> Look:
        """Five minutes at a share of the users; the share may stay or grow."""
        s, rng = self.scenario, self.rng
        hour = np.sin(2 * np.pi * (self.start + self.time / 288))
        n = int(rng.poisson(REQUESTS * (1 + 0.4 * hour)))
        user_N = self.asks[rng.integers(0, len(self.asks), n)]
        slow = rng.exponential(0.5) if rng.random() < (0.25 if s.noisy else 0.05) else 0.0
        alone = 0.02 * rng.standard_normal(2) if s.noisy else np.zeros(2)
        if 0 <= self.time - s.incident < 3 and s.incident >= 0:
            alone[0] += np.log(2)
        share_N = np.log(BASE_MS) + 0.05 * hour + self.slow_U[user_N] + 0.25 * rng.standard_normal(n)
        share_N += slow * (rng.random(n) < 0.5)
        ours_N = (self.bucket_U[user_N] < percent * 100) & ~(self.lost_U[user_N] & (percent < 100))
        champion = self._arm(user_N[~ours_N], share_N[~ours_N] + alone[0], 0)
        challenger = self._arm(user_N[ours_N], share_N[ours_N] + alone[1], 1)
        shadow_N = rng.random(n) < SHADOW
        pairs = self._pairs(user_N[shadow_N], share_N[shadow_N], alone)
        self._grow(len(challenger) + int(shadow_N.sum()))
        self.late_arms.append((user_N[~ours_N], user_N[ours_N]))
        self.time += 1
        memory = self.memory + READING_MB * rng.standard_normal(2)
        evidence = Evidence(percent, champion, challenger, pairs, (float(memory[0]), float(memory[1])))
        return Look(evidence, self._late_hits)

    def _late_hits(self) -> tuple[np.ndarray, np.ndarray]:
        """HIT@3 of both arms' requests of half an hour ago, each request by itself."""
        if len(self.late_arms) <= LABEL_DELAY:
            return np.empty(0), np.empty(0)
        user_A, user_B = self.late_arms[-1 - LABEL_DELAY]
        return self._hits(user_A, 1.0), self._hits(user_B, self.scenario.hits)

    def _bad(self, user_N: np.ndarray, version: int, shadow: bool) -> tuple[np.ndarray, np.ndarray]:
        """Which requests fail, and which are answered with something invalid."""
        s, rng, n = self.scenario, self.rng, len(user_N)
        rate_N = BASE_ERRORS + PRONE_ERRORS * self.prone_U[user_N]
        if version == 0 and 0 <= self.time - s.incident < 3 and s.incident >= 0:
            rate_N = rate_N + 0.03
        invalid_N = np.zeros(n, bool)
        failed_N = rng.random(n) < rate_N
        if version == 1 and not (shadow and s.live_only):
            failed_N |= rng.random(n) < s.errors
            for at in np.flatnonzero(rng.random(n) < s.crash):
                failed_N[at : at + 1 + rng.poisson(10)] = True
            invalid_N = ((rng.random(n) < s.invalid) | self.slice_U[user_N]) & ~failed_N
        return failed_N, invalid_N

    def _latency(self, share_N: np.ndarray, version: int, shadow: bool, failed_N: np.ndarray) -> np.ndarray:
        log_N = share_N + 0.35 * self.rng.standard_normal(len(share_N))
        if version == 1 and not (shadow and self.scenario.live_only):
            log_N = log_N + np.log(self.scenario.latency)
        return np.where(failed_N, np.nan, np.exp(log_N))

    def _arm(self, user_N: np.ndarray, share_N: np.ndarray, version: int) -> Arm:
        n = len(user_N)
        failed_N, invalid_N = self._bad(user_N, version, shadow=False)
        constant_N = np.full(n, version == 1 and self.scenario.constant) & ~failed_N
        score_N = np.where(failed_N, np.nan, self._score(n, version))
        latency_N = self._latency(share_N, version, False, failed_N)
        return Arm(failed_N, invalid_N, constant_N, np.zeros(n, bool), latency_N, score_N, user_N)

    def _score(self, n: int, version: int) -> np.ndarray:
        constant = version == 1 and self.scenario.constant
        return np.full(n, 0.05) if constant else self.rng.gamma(4, 0.0125, n)

    def _hits(self, user_N: np.ndarray, factor: float) -> np.ndarray:
        return self.rng.binomial(3, np.minimum(self.taste_U[user_N] * factor, 1)).astype(float)

    def _pairs(self, user_P: np.ndarray, share_P: np.ndarray, alone: np.ndarray) -> Pairs:
        """Shadow pairs of this look, and those of half an hour ago with their hits."""
        rng, p, s = self.rng, len(user_P), self.scenario
        bad = [self._bad(user_P, version, shadow=True) for version in (0, 1)]
        failed_P2 = np.stack([b[0] for b in bad], 1)
        invalid_P2 = np.stack([b[1] for b in bad], 1)
        latency_P2 = np.stack([self._latency(share_P + alone[v], v, True, failed_P2[:, v]) for v in (0, 1)], 1)
        score_P = self._score(p, 0)
        theirs_P = self._score(p, 1) if s.constant else score_P * np.exp(0.1 * rng.standard_normal(p))
        score_P2 = np.where(failed_P2, np.nan, np.stack([score_P, theirs_P], 1))
        base_P = self._hits(user_P, 1.0)
        again_P = self._hits(user_P, 1 + max(s.hits - 1, 0) / 0.15)  # one request in seven is ranked otherwise
        other_P = np.where(rng.random(p) < 0.15, again_P, base_P)
        other_P = rng.binomial(other_P.astype(int), min(s.hits, 1)).astype(float)
        self.late_pairs.append((user_P, np.where(failed_P2.any(1)[:, None], np.nan, np.stack([base_P, other_P], 1))))
        none_P2 = np.full((p, 2), np.nan)
        pairs = Pairs(failed_P2, invalid_P2, latency_P2, score_P2, none_P2, user_P)
        if len(self.late_pairs) <= LABEL_DELAY:
            return pairs
        late_P, hits_P2 = self.late_pairs[-1 - LABEL_DELAY]
        never, unknown = np.zeros(hits_P2.shape, bool), np.full(hits_P2.shape, np.nan)
        both = np.concatenate
        return Pairs(
            both([failed_P2, never]),
            both([invalid_P2, never]),
            both([latency_P2, unknown]),
            both([score_P2, unknown]),
            both([none_P2, hits_P2]),
            both([user_P, late_P]),
        )

    def _grow(self, requests: int) -> None:
        """Memory after so many more requests to the challenger: caches fill, and what leaks stays."""
        filled = self.warm * (1 - np.exp(-requests / 3000.0))
        self.warm -= filled
        drift = 0.5 * self.rng.standard_normal(2)
        self.memory = self.memory + drift + [0.0, filled + self.scenario.leak * requests / 1000]
