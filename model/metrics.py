"""HIT@3: how many of a request's first three candidates get an action (docs: "The metric"). And the usual others.

Requests with three candidates or fewer put all of them first whatever the model, so they are left out and counted.
One order serves all actions: that of the primary action's probability, which is the order a feed would show.

AUC, GAUC, log-loss and calibration error are of one action's labels and scores at a time, over N rows in G groups.
"""

import math
from collections.abc import Iterable, Sequence
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


def first(request_id: bytes, item_ids: Sequence[bytes], scores_C: np.ndarray) -> np.ndarray:
    """Rows of the first `K` candidates of one request, by the same rule as `ranks`."""
    seed = xxhash.xxh3_64_intdigest(request_id)
    keys_C = np.array([xxhash.xxh3_64_intdigest(item, seed=seed) for item in item_ids], np.uint64)
    place_C: np.ndarray = np.lexsort((keys_C, -scores_C))
    return place_C[:K]


def auc(labels_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in order, a tie counting half.

    Exact, from average ranks (Mann and Whitney 1947); NaN where one of the two labels is absent or a score is NaN.
    """
    return grouped_auc(labels_N, scores_N, np.zeros(len(labels_N), np.int64))


def grouped_auc(labels_N: np.ndarray, scores_N: np.ndarray, groups_N: np.ndarray) -> float:
    """GAUC (Zhou et al. 2018, arXiv 1706.06978): mean over users of the AUC within a user, weighted by impressions.

    Args:
        labels_N: 0 or 1.
        scores_N: Numbers to order by.
        groups_N: The user of each row, of any type that sorts.

    Returns:
        NaN where no user has both labels, or a score is NaN. Users with one label only count nowhere.
    """
    if np.isnan(scores_N).any():
        return math.nan
    _, group_N = np.unique(groups_N, return_inverse=True)
    order = np.lexsort((scores_N, group_N))
    group_N, score_N, positive_N = group_N[order], np.asarray(scores_N)[order], np.asarray(labels_N)[order] != 0
    count_G = np.bincount(group_N)
    positives_G = np.bincount(group_N, positive_N, len(count_G))
    starts = np.r_[True, (np.diff(group_N) != 0) | (np.diff(score_N) != 0)][: len(group_N)]  # of runs of ties
    first = np.flatnonzero(starts)
    last = np.r_[first[1:], len(group_N)] - 1
    rank_N = ((first + last) / 2)[np.cumsum(starts) - 1] - (np.cumsum(count_G) - count_G)[group_N]  # from 0
    # Ranks of the positives among all, less their ranks among themselves: the negatives below each of them.
    below_G = np.bincount(group_N, rank_N * positive_N, len(count_G)) - positives_G * (positives_G - 1) / 2
    pairs_G = positives_G * (count_G - positives_G)
    both = pairs_G > 0
    if not both.any():
        return math.nan
    return float(np.average(below_G[both] / pairs_G[both], weights=count_G[both]))


def log_loss(labels_N: np.ndarray, probabilities_N: np.ndarray) -> float:
    """Mean cross-entropy in nats; NaN without rows. Probabilities are cut to [e, 1 - e], e = 1.2e-7 (float32's)."""
    if not len(labels_N):
        return math.nan
    eps = float(np.finfo(np.float32).eps)
    p_N = np.clip(np.asarray(probabilities_N, np.float64), eps, 1 - eps)
    return float(-np.where(np.asarray(labels_N) != 0, np.log(p_N), np.log1p(-p_N)).mean())


def calibration_error(labels_N: np.ndarray, probabilities_N: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599), with bins of equal mass.

    ECE = sum over bins b of n_b / N * |mean label of b - mean probability of b|. The rows are cut by the rank of their
    probability into `bins` bins with as many rows each (of equal width, nearly all rows of a rare action would share
    one bin). Equal probabilities share a bin, so the order of rows does not matter. A perfect model has an ECE above
    0 by chance: `chance_error`.

    Returns:
        NaN without rows or where a probability is NaN.
    """
    p_N = np.asarray(probabilities_N, np.float64)
    if not len(p_N) or np.isnan(p_N).any():
        return math.nan
    bin_N = np.searchsorted(np.sort(p_N), p_N) * bins // len(p_N)
    return float(np.abs(np.bincount(bin_N, np.asarray(labels_N, np.float64) - p_N)).sum() / len(p_N))


def chance_error(labels_N: np.ndarray, bins: int = 15) -> float:
    """Calibration error of a perfect model, about: sqrt(2 * bins * p * (1 - p) / (pi * N)); 0 without rows."""
    p = float(np.mean(labels_N)) if len(labels_N) else 0.0
    return math.sqrt(2 * bins * p * (1 - p) / (math.pi * max(1, len(labels_N))))


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
