"""How large a drift score gets by chance, for the very windows at hand.

Rows are not independent: one user brings many requests, one request many candidates, and all of them share
the user's features. So the floor re-draws *users*: the users of both windows are put in one pot and dealt out
again, in the same numbers, `ROUNDS` times. The largest score that this gives is the floor: if nothing but
chance separates the windows, the real score exceeds it once in `ROUNDS + 1` checks (a permutation test with
clusters; Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, chapter 3). A user who is in
both windows counts as two, which errs on the side of silence.

N rows of both windows together, G users, B rounds, K categories.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 200
_CHUNK = 20  # rounds at once: 20 x 40,000 rows of float64 are 6 MB


@dataclass(frozen=True)
class Deal:
    """Users dealt out anew into two windows.

    Attributes:
        user: (N,) int64, the user of each row, reference rows first.
        current: (B, G) bool, whether a user is dealt to the current window.
    """

    user: np.ndarray
    current: np.ndarray

    @classmethod
    def of(cls, reference_users: np.ndarray, current_users: np.ndarray, seed: int = 0) -> "Deal":
        """Deal the users of two windows, given one user id a row (any dtype that sorts)."""
        _, ref = np.unique(reference_users, return_inverse=True)
        _, cur = np.unique(current_users, return_inverse=True)
        n_ref, n_cur = int(ref.max(initial=-1)) + 1, int(cur.max(initial=-1)) + 1
        rng = np.random.default_rng(seed)
        order = rng.random((ROUNDS, n_ref + n_cur)).argsort(axis=1)
        return cls(np.concatenate([ref, cur + n_ref]), order >= n_ref)

    def wasserstein(self, values: np.ndarray) -> float:
        """Floor of the normed Wasserstein distance of one numeric column.

        Args:
            values: (N,) float64; NaN where there is no value.
        """
        known = np.flatnonzero(~np.isnan(values))
        order = known[np.argsort(values[known], kind="stable")]
        x = values[order] - values[known].mean()  # centred, so that the sums below keep their precision
        user, gaps, rank = self.user[order], np.diff(x), np.arange(1, len(x))
        floor = 0.0
        for start in range(0, ROUNDS, _CHUNK):
            taken = self.current[start : start + _CHUNK][:, user]
            below = np.cumsum(taken, axis=1, dtype=np.float64)
            n_cur = below[:, -1:]
            n_ref = len(x) - n_cur
            ok = ((n_cur > 0) & (n_ref > 0)).ravel()
            if not ok.any():
                continue
            below, taken, n_cur, n_ref = below[ok, :-1], taken[ok], n_cur[ok], n_ref[ok]
            distance = np.abs(below * (1 / n_cur + 1 / n_ref) - rank / n_ref) @ gaps
            mean = (x.sum() - taken @ x)[:, None] / n_ref
            square = (np.square(x).sum() - taken @ np.square(x))[:, None] / n_ref
            spread = np.sqrt(np.maximum(square - np.square(mean), 0)).ravel()
            floor = max(floor, float((distance / np.maximum(spread, 0.001)).max()))
        return floor

    def jensenshannon(self, codes: np.ndarray) -> float:
        """Floor of the Jensen-Shannon distance of one categorical column.

        Args:
            codes: (N,) int64 in [0, K).
        """
        k, users = int(codes.max()) + 1, self.current.shape[1]
        counts = np.bincount(self.user * k + codes, minlength=users * k).reshape(users, k).astype(np.float64)
        current = self.current.astype(np.float64) @ counts
        return float(jensenshannon(counts.sum(axis=0) - current, current).max(initial=0.0))


def jensenshannon(reference: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance (natural logarithm) of counts (..., K); 0 where one side is empty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = reference / reference.sum(axis=-1, keepdims=True)
        q = current / current.sum(axis=-1, keepdims=True)
        m = (p + q) / 2
        left = np.where(p > 0, p * np.log(p / m), 0.0).sum(axis=-1)
        right = np.where(q > 0, q * np.log(q / m), 0.0).sum(axis=-1)
    divergence = np.where(np.isnan(p).any(axis=-1) | np.isnan(q).any(axis=-1), 0.0, (left + right) / 2)
    return np.sqrt(np.maximum(divergence, 0.0))
