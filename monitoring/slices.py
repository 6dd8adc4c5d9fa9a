"""In which parts of a window it moved: the slices without which the rest would look more like the reference.

The reference knows each column by itself, not within each slice. So a slice is judged by what is left when it is taken
out: where a new market moved a column, the rest without that market is as it was; where everything moved, no slice
explains it.

Shapes: N rows (requests, for a request's column), K bins of a column, S values of the feature that slices.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engagement.table import MISSING, Feature, RankingTable
from monitoring.compare import Comparison, Pair, Window
from monitoring.counts import DROPPED_BITS, NO_NUMBER, points
from monitoring.distance import jensenshannon, wasserstein
from monitoring.reference import Reference
from monitoring.sketch import IDS, SCORE, feature_blocks
from monitoring.verdict import SliceDrift

MOST = 10
MOST_ROWS = 200_000  # evenly spaced requests up to so many candidates are looked at
MOST_VALUES = 40  # a feature with more values than this does not slice
MOST_COLUMNS = 12  # the worst of the drifted columns
LEAST_ROWS, LEAST_REQUESTS = 100, 25  # of a slice: of a column of candidates, of one of requests
LEAST_SHARE = 0.02
MOST_SHARE = 0.8  # a slice that is nearly everything explains nothing
EXPLAINED = 0.25
"""A slice is told of if without it a column's score is lower by at least this share of the score."""


@dataclass(frozen=True)
class _Slice:
    """One value of one feature: `place` is its code."""

    names: tuple[str, ...]
    codes: np.ndarray  # (N,) which slice each row is in, -1 for none
    candidate: bool


def slices(reference: Reference, window: Window, comparison: Comparison) -> tuple[SliceDrift, ...]:
    """Where the drifted columns and the predictions moved, the slice that explains most of it first.

    Slices are the values of request's and candidate's categories with few values, new users and new items.

    Args:
        reference: The model's.
        window: What was compared.
        comparison: What `compare` found.

    Returns:
        At most `MOST`, each slice once, with the column that it explains most of and the column's score within it.
    """
    drifted = {c.name: c for c in comparison.columns if c.drifted}
    pairs = sorted((p for p in comparison.pairs if p.name in drifted), key=lambda p: -drifted[p.name].ratio)
    found: dict[str, tuple[float, SliceDrift]] = {}
    features, predictions = [p for p in pairs if not _predicted(p)][:MOST_COLUMNS], [p for p in pairs if _predicted(p)]
    for wanted, (table, scores) in (
        (features, _some(window.table, None)),
        (predictions, _some(window.part, window.scores)),
    ):
        if not wanted or not table.requests:
            continue
        cuts = list(_cuts(reference, window, table))
        for pair in wanted:
            for explained, drift in _explained(table, scores, pair, cuts):
                if explained > found.get(drift.slice, (0.0, drift))[0]:
                    found[drift.slice] = explained, drift
    best = sorted(found.values(), key=lambda f: (-f[0], f[1].slice))
    return tuple(drift for _, drift in best[:MOST])


def _predicted(pair: Pair) -> bool:
    return pair.name.startswith(SCORE)


def _some(table: RankingTable, scores: np.ndarray | None) -> tuple[RankingTable, np.ndarray | None]:
    """Evenly spaced requests of a large window."""
    step = max(1, -(-table.rows // MOST_ROWS))
    if step == 1:
        return table, scores
    kept = np.arange(0, table.requests, step)
    return table.select(kept), None if scores is None else scores[table.rows_of(kept)]


def _cuts(reference: Reference, window: Window, table: RankingTable) -> Iterator[_Slice]:
    """Every way to slice a window."""
    for feature, block in feature_blocks(table):
        if feature.name in IDS:
            known = reference.vocabularies.get(feature.name)
            if known is None:
                continue
            values = block[:, 0]
            told = (values != MISSING) & (values < known.bound)  # of the others nobody knows whether they are new
            codes = np.where(told, np.where(np.isin(values, known.hashes), -1, 0), -1)
            yield _Slice((f"new {feature.name.removesuffix('_id')}s",), codes, feature.level == "candidate")
        elif feature.kind == "categorical":
            values, codes = np.unique(block[:, 0], return_inverse=True)
            if 2 <= len(values) <= MOST_VALUES:
                names = tuple(_name(reference, window, feature, int(v)) for v in values)
                yield _Slice(names, codes, feature.level == "candidate")


def _name(reference: Reference, window: Window, feature: Feature, value: int) -> str:
    if value == MISSING:
        return f"{feature.name} missing"
    names = {**reference.names.get(feature.name, {}), **window.names.get(feature.name, {})}
    return f"{feature.name}={names.get(value, f'#{value % 10**6:06d}')}"


def _explained(
    table: RankingTable, scores: np.ndarray | None, pair: Pair, cuts: list[_Slice]
) -> Iterator[tuple[float, SliceDrift]]:
    """How much of a column's score each slice explains, as a share of it, where it is enough to be told."""
    values, of_candidate = _values(table, scores, pair)
    at, like, bins = _bins(pair, values)
    everything = np.bincount(bins[bins >= 0], minlength=len(like)).astype(float)
    if not everything.sum() or not like.sum():
        return
    whole = _distance(pair, at, like, everything)
    for cut in cuts:
        if cut.candidate and not of_candidate or cut.names[0].startswith(f"{pair.name}="):
            continue
        codes = cut.codes if cut.candidate == of_candidate else cut.codes[table.request_of_row]
        inside = (codes >= 0) & (bins >= 0)
        counts = np.bincount(codes[inside] * len(like) + bins[inside], minlength=len(cut.names) * len(like))
        for name, part in zip(cut.names, counts.reshape(-1, len(like)), strict=True):
            share = part.sum() / everything.sum()
            if part.sum() < (LEAST_ROWS if of_candidate else LEAST_REQUESTS) or not LEAST_SHARE <= share <= MOST_SHARE:
                continue
            explained = 1 - _distance(pair, at, like, everything - part) / max(whole, 1e-12)
            if explained >= EXPLAINED:
                yield explained, SliceDrift(name, pair.name, _distance(pair, at, like, part), float(share))


def _values(table: RankingTable, scores: np.ndarray | None, pair: Pair) -> tuple[np.ndarray, bool]:
    """(N,) values of a column, and whether they are one a candidate."""
    if scores is not None:
        return scores[:, table.spec.actions.index(pair.name.removeprefix(SCORE))], True
    feature, block = next((f, b) for f, b in feature_blocks(table) if f.name == pair.name)
    return block[:, 0], feature.level == "candidate"


def _bins(pair: Pair, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(K,) where each bin lies, ascending, (K,) counts of the reference, (N,) the bin of each value, -1 for missing."""
    if pair.kind == "numeric":
        raw = (values.astype(np.float32) - np.float32(pair.centre)).view(np.uint32) >> np.uint32(DROPPED_BITS)
        keys = np.where(np.isfinite(values), raw.astype(np.int64), NO_NUMBER)
        gone = NO_NUMBER
    else:
        keys, gone = values, MISSING
    old = pair.reference.without(gone)
    every = np.union1d(old.keys, np.unique(keys[keys != gone]))
    where = points(every, pair.centre) if pair.kind == "numeric" else np.arange(len(every), dtype=float)
    order = np.argsort(where, kind="stable")
    rank = np.empty(len(every), np.int64)
    rank[order] = np.arange(len(every))
    like = np.zeros(len(every))
    like[rank[np.searchsorted(every, old.keys)]] = old.counts
    place = np.minimum(np.searchsorted(every, keys), max(len(every) - 1, 0))
    return where[order], like, np.where(keys == gone, -1, rank[place] if len(every) else -1)


def _distance(pair: Pair, at: np.ndarray, like: np.ndarray, now: np.ndarray) -> float:
    return wasserstein(at, like, now) if pair.kind == "numeric" else jensenshannon(like, now)
