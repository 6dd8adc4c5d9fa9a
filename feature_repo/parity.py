"""Train/serve parity: what serving reads for a request is what training reads for the same instant, or why not.

The same requests are read twice: from the online store as it stands, and from the offline store as of each request's
own instant. Values are compared after encoding, so that one that the ranker cannot tell apart is no difference. Where
they differ, a third reading, offline but with only what the last materialisation knew, tells the cause:

    stale             the online value is the one that was right when the store was last materialised
    missing online    offline has a value, the store has none, and it should
    missing offline   the other way round
    different         both have a value, and nothing explains it

Shapes: R requests, N candidates in all.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import numpy as np

from engagement.snapshot import Snapshot
from engagement.table import MISSING, Level, RankingTable, TableSpec
from feature_repo.online import OnlineReader
from feature_repo.repo import FeatureRepo
from feature_repo.requests import Asked

HISTORY = "user_history"
STALE, MISSING_ONLINE, MISSING_OFFLINE, DIFFERENT = "stale", "missing online", "missing offline", "different"


@dataclass(frozen=True)
class Skew:
    """One feature whose online and offline values differ.

    Attributes:
        feature: Its declared name, or `user_history` for the action sequence.
        unequal: Values that differ; one a request or a candidate, by the feature's level.
        values: Values compared.
        causes: How many differ for which cause.
    """

    feature: str
    unequal: int
    values: int
    causes: dict[str, int]

    def __str__(self) -> str:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in sorted(self.causes.items()))
        return f"{self.unequal:,} of {self.values:,} values differ ({causes})"


@dataclass(frozen=True)
class Parity:
    """The outcome for a sample of requests.

    Attributes:
        online_as_of: ISO instant of the last materialisation.
        requests: R.
        candidates: N.
        values: Values compared, all features together.
        skews: The features that differ, the most unequal first.
    """

    online_as_of: str
    requests: int
    candidates: int
    values: int
    skews: tuple[Skew, ...]

    @property
    def share(self) -> float:
        """Share of all values that differ."""
        return sum(s.unequal for s in self.skews) / max(1, self.values)

    @property
    def unexplained(self) -> tuple[Skew, ...]:
        """Features that differ for another cause than the age of the last materialisation."""
        return tuple(s for s in self.skews if set(s.causes) != {STALE})

    def to_json(self) -> dict:
        """A JSON form; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Parity":
        """The inverse of `to_json`."""
        return cls(**{**data, "skews": tuple(Skew(**s) for s in data["skews"])})


def check(repo: FeatureRepo, reader: OnlineReader, snapshot: Snapshot, asked: Sequence[Asked]) -> Parity:
    """Compare the online store as it stands with the offline store as of each request's instant.

    Args:
        repo: The features of a home.
        reader: Reads its online store.
        snapshot: What was known by the latest request; its views are built if they are not.
        asked: The requests.

    Raises:
        EvergreenError: A request has no candidate, or the online store does not answer.
    """
    online = [reader.read(a.user_id, list(a.item_ids), dict(a.context), a.at) for a in asked]
    return compare(repo, snapshot, asked, online, [reader.as_of] * len(asked))


def compare(
    repo: FeatureRepo,
    snapshot: Snapshot,
    asked: Sequence[Asked],
    online: Sequence[RankingTable],
    as_of: Sequence[datetime],
) -> Parity:
    """The same for values that were read as the requests were served.

    Args:
        repo: The features of a home.
        snapshot: What was known by the latest request, or later.
        asked: R requests.
        online: What was read for each, one table a request.
        as_of: For each, the instant of the materialisation that was served then.
    """
    then = repo.as_asked(snapshot, asked)
    served = _values(online, then.spec)
    right = _values([then], then.spec)
    unequal = {name: ~_same(served[name], right[name]) for name in right}
    skews: list[Skew] = []
    if any(rows.any() for rows in unequal.values()):
        old = _values([repo.as_asked(snapshot, asked, known_by=as_of)], then.spec)
        skews = [_skew(n, served[n], right[n], old[n]) for n, rows in unequal.items() if rows.any()]
    found = sorted(skews, key=lambda s: (-s.unequal / s.values, s.feature))
    values = sum(len(rows) for rows in unequal.values())
    return Parity(max(as_of).isoformat(), then.requests, then.rows, values, tuple(found))


def _values(tables: Sequence[RankingTable], spec: TableSpec) -> dict[str, np.ndarray]:
    """By feature: (R or N, width) encoded values of all tables; the histories as (R, 1) objects."""
    found: dict[str, np.ndarray] = {}
    blocks: dict[tuple[Level, bool], str] = {
        ("request", True): "request_cat",
        ("request", False): "request_num",
        ("candidate", True): "item_cat",
        ("candidate", False): "item_num",
    }
    for (level, hashed), column in blocks.items():
        block, at = np.concatenate([getattr(t, column) for t in tables]), 0
        for feature in spec.of(level, hashed):
            found[feature.name] = block[:, at : at + feature.width]
            at += feature.width
    found[HISTORY] = np.array([h for t in tables for h in _histories(t)], dtype=object)[:, None]
    return found


def _histories(table: RankingTable) -> list[bytes]:
    spans = [slice(a, b) for a, b in zip(table.history_start, table.history_end, strict=True)]
    columns = [np.asarray(getattr(table, f"history_{n}")) for n in ("time", "item", "actions")]
    return [b"".join(c[span].tobytes() for c in columns) for span in spans]


def _skew(name: str, served: np.ndarray, right: np.ndarray, old: np.ndarray) -> Skew:
    unequal = ~_same(served, right)
    stale = unequal & _same(served, old)
    rest = unequal & ~stale
    no_online, no_offline = _missing(served), _missing(right)
    causes = Counter(
        {
            STALE: int(stale.sum()),
            MISSING_ONLINE: int((rest & no_online).sum()),
            MISSING_OFFLINE: int((rest & ~no_online & no_offline).sum()),
            DIFFERENT: int((rest & ~no_online & ~no_offline).sum()),
        }
    )
    return Skew(name, int(unequal.sum()), len(right), dict(+causes))


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    equal = a == b
    if a.dtype.kind == "f":
        equal |= np.isnan(a) & np.isnan(b)
    return equal.all(axis=1)


def _missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.isnan(values).all(axis=1)
    if values.dtype.kind == "O":
        return np.array([not v for v in values[:, 0]], dtype=bool)
    return (values == MISSING).all(axis=1)
