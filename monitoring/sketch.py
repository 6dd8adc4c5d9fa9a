"""What a window of requests looks like: counts by bucket, that add up, and small enough to travel with a model.

The counts themselves are in `monitoring/counts.py`, embeddings in `monitoring/vectors.py`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from engagement.table import MISSING, Feature, Level, RankingTable
from monitoring.counts import (
    CHUNK,
    NO_NUMBER,
    OTHER,
    Counts,
    Tally,
    added,
    aligned,
    categories,
    counted,
    drawn,
    drawn_categories,
    numbers,
    points,
    trimmed,
)
from monitoring.vectors import Vectors, VectorTally, all_vectors

__all__ = [
    "NO_NUMBER",
    "OTHER",
    "Counts",
    "Sketch",
    "Vectors",
    "Vocabulary",
    "added",
    "aligned",
    "categories",
    "centres_of",
    "drawn",
    "drawn_categories",
    "feature_blocks",
    "joined",
    "numbers",
    "points",
    "sketch",
    "together",
    "trimmed",
    "unseen",
    "vocabulary",
]

VOCABULARY = 16_384  # hashes kept of each vocabulary
IDS = ("user_id", "item_id")  # only their vocabulary is looked at
SCORE = "score_"  # and the action: the columns of predictions
_ALL = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Vocabulary:
    """A sample of the distinct values that occurred, by their hash, so that samples of several windows add up.

    Attributes:
        hashes: (up to `VOCABULARY`,) int64, the smallest that occurred, ascending.
        bound: Every value whose hash is below occurred if it is among them; `2 ** 63 - 1` if all are.
    """

    hashes: np.ndarray
    bound: int

    @property
    def distinct(self) -> float:
        """How many distinct values there were, from how densely the smallest hashes lie (KMV; Bar-Yossef, 2002)."""
        return float(len(self.hashes)) if self.bound == _ALL else len(self.hashes) * (_ALL / self.bound)


def vocabulary(values: np.ndarray) -> Vocabulary:
    """The vocabulary of a hashed column (N,) int64."""
    words = Words()
    for start in range(0, len(values), CHUNK):
        words.add(values[start : start + CHUNK])
    return words.held


class Words:
    """Gathers the vocabulary of many parts of one column; what can no longer be among the smallest costs little."""

    def __init__(self) -> None:
        self.held = Vocabulary(np.zeros(0, np.int64), _ALL)

    def add(self, values: np.ndarray) -> None:
        """One more part (N,) int64, repetitions and `MISSING` included."""
        below = values[values < self.held.bound] if self.held.bound < _ALL else values
        found = pl.Series(np.ascontiguousarray(below)).unique().to_numpy()
        self.held = joined([self.held, Vocabulary(found[found != MISSING], self.held.bound)])


def joined(parts: Iterable[Vocabulary]) -> Vocabulary:
    """The vocabulary of several windows together."""
    held = list(parts)
    bound = min((p.bound for p in held), default=_ALL)
    found = np.sort(np.concatenate([p.hashes for p in held] or [np.zeros(0, np.int64)]))
    found = found[np.diff(found, prepend=-1) > 0]  # hashes are never negative; faster than NumPy's `unique` by far
    if bound < _ALL:
        found = found[: np.searchsorted(found, bound)]
    if len(found) <= VOCABULARY:
        return Vocabulary(found, bound)
    return Vocabulary(found[:VOCABULARY], int(found[VOCABULARY]))


def unseen(known: Vocabulary, values: np.ndarray) -> float:
    """Share of rows with a value that a window did not have, judged on the values whose hash it would have kept.

    NaN where no row can tell.
    """
    told = new = 0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        part = part[(part != MISSING) & (part < known.bound)]
        place = np.searchsorted(known.hashes, part)
        place[place == len(known.hashes)] = -1
        told += len(part)
        new += int((known.hashes[place] != part).sum()) if len(known.hashes) else len(part)
    return new / told if told else float("nan")


@dataclass(frozen=True)
class Sketch:
    """A window in small.

    Attributes:
        requests: Requests.
        rows: Candidates.
        columns: Counts by name of a column: declared features that are no ids and no vectors, and `score_<action>`.
            A request's feature counts once a request, a candidate's once a candidate.
        vocabularies: By name of a hashed column, ids included.
        vectors: By name of an embedding.
    """

    requests: int
    rows: int
    columns: Mapping[str, Counts]
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    vectors: Mapping[str, Vectors] = field(default_factory=dict)


def sketch(table: RankingTable, centres: Mapping[str, float], scores: np.ndarray | None = None) -> Sketch:
    """Sketch a window, whatever its size, in bounded memory: `CHUNK` rows at a time, and what was counted so far.

    One thread: counting holds Python's lock, so that two were no faster; Polars counts the categories on all cores.

    Args:
        table: The window.
        centres: By name of a numeric feature, where its buckets are finest: `centres_of` the reference.
        scores: (N, A) predicted probabilities; with them, only the predictions are sketched.
    """
    if scores is not None:
        predicted = {SCORE + a: numbers(scores[:, i], 0.0) for i, a in enumerate(table.spec.actions)}
        return Sketch(table.requests, table.rows, predicted)
    counts: dict[str, Tally] = {}
    words: dict[str, Words] = {}
    vectors: dict[str, VectorTally] = {}
    for feature, part in _parts(table):
        name = feature.name
        if name in IDS:
            words.setdefault(name, Words()).add(part.ravel())
        elif feature.hashed:
            found = counted(_values(part))
            counts.setdefault(name, Tally()).add(found)
            words.setdefault(name, Words()).add(found.keys)
        elif feature.kind == "embedding":
            vectors.setdefault(name, VectorTally(feature.width)).add(part)
        else:
            counts.setdefault(name, Tally()).add(numbers(part[0], centres.get(name, 0.0)))
    return Sketch(
        table.requests,
        table.rows,
        {name: tally.counts() for name, tally in counts.items()},
        {name: gathered.held for name, gathered in words.items()},
        {name: tally.vectors() for name, tally in vectors.items()},
    )


def _values(part: np.ndarray) -> np.ndarray:
    # Of a list of categories, what fills it up is nothing that is missing; a row with none at all is.
    if len(part) == 1:
        return part[0]
    known = part != MISSING
    return np.concatenate([part[known], np.full(int((~known.any(axis=0)).sum()), MISSING)])


def _parts(table: RankingTable) -> Iterator[tuple[Feature, np.ndarray]]:
    """Each declared feature, again and again, with (width, up to `CHUNK`) of its rows; at least once."""
    for features, block in _blocks(table):
        starts = np.cumsum([0, *(f.width for f in features)])
        for row in range(0, max(1, len(block)), CHUNK):
            columns = np.ascontiguousarray(block[row : row + CHUNK].T)
            for feature, start in zip(features, starts, strict=False):
                yield feature, columns[start : start + feature.width]


def _blocks(table: RankingTable) -> Iterator[tuple[tuple[Feature, ...], np.ndarray]]:
    levels: tuple[Level, ...] = ("request", "candidate")
    blocks = {
        ("request", True): table.request_cat,
        ("request", False): table.request_num,
        ("candidate", True): table.item_cat,
        ("candidate", False): table.item_num,
    }
    for level in levels:
        for hashed in (True, False):
            yield table.spec.of(level, hashed), blocks[level, hashed]


def feature_blocks(table: RankingTable) -> Iterator[tuple[Feature, np.ndarray]]:
    """Each declared feature with its columns (R or N rows, width), a view."""
    for features, block in _blocks(table):
        start = 0
        for feature in features:
            yield feature, block[:, start : start + feature.width]
            start += feature.width


def centres_of(table: RankingTable, rows: int = 100_000) -> dict[str, float]:
    """The median of each numeric feature over evenly spaced rows: where `sketch` shall count finest."""
    found = {}
    for feature, block in feature_blocks(table):
        if feature.kind == "numeric":
            some = np.asarray(block[:: max(1, len(block) // rows), 0], np.float64)
            known = some[np.isfinite(some)]
            found[feature.name] = float(np.median(known)) if len(known) else 0.0
    return found


def together(parts: Iterable[Sketch]) -> Sketch:
    """The sketch of several windows together."""
    held = list(parts)
    columns = {n: added(p.columns[n] for p in held if n in p.columns) for n in _names(p.columns for p in held)}
    return Sketch(
        sum(p.requests for p in held),
        sum(p.rows for p in held),
        columns,
        {
            n: joined(p.vocabularies[n] for p in held if n in p.vocabularies)
            for n in _names(p.vocabularies for p in held)
        },
        {n: all_vectors([p.vectors[n] for p in held if n in p.vectors]) for n in _names(p.vectors for p in held)},
    )


def _names(columns: Iterable[Mapping[str, object]]) -> dict[str, None]:
    return dict.fromkeys(name for held in columns for name in held)
