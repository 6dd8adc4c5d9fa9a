"""Pairs of models with a known true difference: hits of both on the same requests, drawn by the thousand.

A request has three places; a place is a hit with a probability from how easy its user and the request are. Both models
share those, and mostly the very draw (two rankers put much the same items first), while a small taste of each model
for each user makes a user's differences alike. The numbers are set so that hits, their correlation between models and
within users, and the design effect are as between two real models on MovieLens (section `real`).

A challenger that is truly worse by m loses each of its hits with chance m; one that is truly better by g meets a
champion that keeps each hit with chance 1 / (1 + g). So the relative difference in expected HIT@3 is exactly m or g.

Shapes: U users, Q requests, S simulated pairs.
"""

from dataclasses import dataclass

import numpy as np

EASE, USER, REQUEST, TASTE = -0.5, 1.1, 1.3, 0.1  # mean and standard deviations on the logit scale
SHARED = 0.92  # chance that both models see the same draw for a place
ACTIVITY = 1.0  # log-normal spread of how many requests a user has
PER_USER = 3.7  # requests, as in the real evidence
PLACES = 3


@dataclass(frozen=True)
class Pairs:
    """Hits by request, of S pairs on the same users and requests.

    Attributes:
        counts: (U,) requests of each user; requests are in order of users.
        champion: (Q, S) int8.
        challenger: (Q, S) int8.
    """

    counts: np.ndarray
    champion: np.ndarray
    challenger: np.ndarray

    def by_user(self, hits_QS: np.ndarray) -> np.ndarray:
        """(U, S) sums."""
        starts = np.r_[0, np.cumsum(self.counts)[:-1]]
        return np.add.reduceat(hits_QS, starts, axis=0, dtype=np.float64)

    def with_difference(self, true: float, rng: np.random.Generator) -> "Pairs":
        """The same pairs, the challenger truly worse (`true` < 0) or better by this relative difference."""
        a, b = self.challenger, self.champion
        if true < 0:
            a = rng.binomial(a, 1 + true).astype(np.int8)
        elif true > 0:
            b = rng.binomial(b, 1 / (1 + true)).astype(np.int8)
        return Pairs(self.counts, b, a)


def draw(requests: int, users: int, pairs: int, rng: np.random.Generator) -> Pairs:
    """Pairs of equal models; users of unequal activity, each with a request at least."""
    weight_U = rng.lognormal(0, ACTIVITY, users)
    counts = 1 + rng.multinomial(requests - users, weight_U / weight_U.sum())
    user_Q = np.repeat(np.arange(users), counts)
    ease_QS = EASE + USER * rng.normal(size=(users, pairs)).astype(np.float32)[user_Q]
    ease_QS += REQUEST * rng.standard_normal((requests, pairs), np.float32)
    p = [1 / (1 + np.exp(-ease_QS - TASTE * rng.standard_normal((users, pairs), np.float32)[user_Q])) for _ in range(2)]
    hits = np.zeros((2, requests, pairs), np.int8)
    for _ in range(PLACES):
        first = rng.random((requests, pairs), np.float32)
        second = np.where(
            rng.random((requests, pairs), np.float32) < SHARED, first, rng.random(first.shape, np.float32)
        )
        hits[0] += first < p[0]
        hits[1] += second < p[1]
    return Pairs(counts, hits[0], hits[1])
