"""HIT@3: how many of a request's first three candidates get an action (docs: "The metric").

Requests with three candidates or fewer put all of them first whatever the model, so they are left out and counted.
One order serves all actions: that of the primary action's probability, which is the order a feed would show.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from engagement.table import RankingTable, TableSpec

K = 3


@dataclass(frozen=True)
class Hits:
    """HIT@3 counts by comparable request.

    Shapes: Q comparable requests, A actions.

    Attributes:
        actions: Names of the actions.
        requests: (Q,) indices of the requests in the table.
        user: (Q,) int64 codes; requests of one user share one.
        hits_QA: Rows with the action among the first three.
        expected_QA: What a random order would get: 3 * rows with the action / candidates.
        skipped: Requests left out because they have three candidates or fewer.
    """

    actions: tuple[str, ...]
    requests: np.ndarray
    user: np.ndarray
    hits_QA: np.ndarray
    expected_QA: np.ndarray
    skipped: int

    def column(self, action: str) -> np.ndarray:
        """(Q,) hits of one action."""
        return self.hits_QA[:, self.actions.index(action)]


def ranking_score(spec: TableSpec, scores_NA: np.ndarray) -> np.ndarray:
    """(N,): the number that candidates are ordered by, the probability of the primary action."""
    return scores_NA[:, spec.actions.index(spec.primary_action)]


def hits(table: RankingTable, scores: np.ndarray) -> Hits:
    """Count hits by request.

    Args:
        table: Requests with labels.
        scores: (N, A) probabilities, or (N,) numbers to order by.
    """
    by_row = scores if scores.ndim == 1 else ranking_score(table.spec, scores)
    sizes = np.diff(table.offsets)
    comparable = np.flatnonzero(sizes > K)
    rank = ranks(table, by_row)
    first = np.where((rank < K)[:, None], table.labels, 0)
    hits_RA, shown_RA = _sum_by_request(first, table), _sum_by_request(table.labels, table)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected_RA = K * shown_RA / sizes[:, None]
    _, user = np.unique(table.user_id[comparable], return_inverse=True)
    return Hits(
        actions=table.spec.actions,
        requests=comparable,
        user=user,
        hits_QA=hits_RA[comparable],
        expected_QA=expected_RA[comparable],
        skipped=len(sizes) - len(comparable),
    )


def hit3(h: Hits) -> dict[str, float]:
    """HIT@3 by action: hits summed over requests / requests; NaN where no request is comparable."""
    return _rates(h.actions, h.hits_QA)


def random_hit3(h: Hits) -> dict[str, float]:
    """HIT@3 by action that a random order has in expectation, exactly."""
    return _rates(h.actions, h.expected_QA)


def ranks(table: RankingTable, by_row: np.ndarray) -> np.ndarray:
    """(N,) place of every candidate in its request, from 0.

    Ties are broken by a hash of request and item, which shuffles the candidates the same way in every process and
    for every model, so that neither the logged position nor the order of rows can leak through equal scores. NaN
    comes last.
    """
    place = np.lexsort((_shuffle_keys(table), -by_row, table.request_of_row))
    rank = np.empty(len(place), np.int64)
    rank[place] = np.arange(len(place)) - np.repeat(table.offsets[:-1], np.diff(table.offsets))
    return rank


def _shuffle_keys(table: RankingTable) -> np.ndarray:
    seeds = [xxhash.xxh3_64_intdigest(r) for r in _bytes(table.request_id)]
    pairs = zip(_bytes(table.item_id), table.request_of_row.tolist(), strict=True)
    return np.fromiter((xxhash.xxh3_64_intdigest(item, seed=seeds[r]) for item, r in pairs), np.uint64, table.rows)


def _bytes(ids: np.ndarray) -> Iterable[bytes]:
    return np.asarray(ids).tolist()


def _sum_by_request(values_NA: np.ndarray, table: RankingTable) -> np.ndarray:
    ends = np.concatenate([np.zeros((1, values_NA.shape[1]), np.int64), np.cumsum(values_NA, 0, dtype=np.int64)])
    return ends[table.offsets[1:]] - ends[table.offsets[:-1]]


def _rates(actions: tuple[str, ...], values_QA: np.ndarray) -> dict[str, float]:
    means = values_QA.mean(0) if len(values_QA) else np.full(len(actions), np.nan)
    return {action: float(m) for action, m in zip(actions, means, strict=True)}
