"""Row weights of the training loss, computed as batches are cut: memory grows with users, never with rows."""

from dataclasses import dataclass, replace

import numpy as np

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.config import TrainConfig

_CHUNK = 1 << 16  # requests looked at together


@dataclass(frozen=True)
class RowWeights:
    """Weights with mean 1 over a table: less for sampled candidates and, by a power, for very active users.

    Attributes:
        table: The table.
        sampled: Weight of a sampled candidate against a logged one.
        users: Sorted ids of the users whose activity counts; empty where it does not.
        by_user: (users,) weight of each user's requests.
        mean: What all weights are divided by.
    """

    table: RankingTable
    sampled: float
    users: np.ndarray
    by_user: np.ndarray
    mean: float = 1.0

    def of(self, rows: np.ndarray, requests: np.ndarray) -> np.ndarray:
        """(N,) float32 for candidate rows and the request that each belongs to."""
        weight = np.where(self.table.sampled[rows], self.sampled, 1.0) / self.mean
        if len(self.users):
            weight *= self.by_user[np.searchsorted(self.users, self.table.user_id[requests])]
        return weight.astype(np.float32)


def row_weights(table: RankingTable, config: TrainConfig) -> RowWeights:
    """Weights by the configuration: a request weighs (requests of its user) ** -`user_weight_power`.

    Raises:
        EvergreenError: No row has any weight.
    """
    users, by_user = np.zeros(0, table.user_id.dtype), np.zeros(0)
    if config.user_weight_power:
        counts: dict[bytes, int] = {}
        for start in range(0, table.requests, _CHUNK):
            found, times = np.unique(table.user_id[start : start + _CHUNK], return_counts=True)
            for user, count in zip(found.tolist(), times.tolist(), strict=True):
                counts[user] = counts.get(user, 0) + count
        users = np.array(sorted(counts), table.user_id.dtype)
        by_user = np.array([counts[u] for u in users.tolist()], np.float64) ** -config.user_weight_power
    raw = RowWeights(table, config.sampled_weight, users, by_user)
    total = 0.0
    for start in range(0, table.requests, _CHUNK):
        requests = np.arange(start, min(start + _CHUNK, table.requests))
        rows = np.arange(table.offsets[start], table.offsets[requests[-1] + 1])
        sizes = np.diff(table.offsets[start : requests[-1] + 2])
        total += float(raw.of(rows, np.repeat(requests, sizes)).sum(dtype=np.float64))
    if not total > 0:
        raise EvergreenError("every training row has weight 0", "Give sampled candidates a weight above 0")
    return replace(raw, mean=total / table.rows)
