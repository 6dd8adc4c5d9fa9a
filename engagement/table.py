"""The ranking table: requests with their candidates as memory-mapped columns.

It is the one shape in which features reach the ranker. `feature_repo` writes it (from the offline store for
training, from the online store for one served request); `model` reads it and knows nothing of where it came from.

Shapes: R requests, N candidates (rows), H actions in all users' histories, A action types,
C hashed categorical columns and D numeric columns, at request level or at candidate level.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from engagement.errors import EvergreenError

Level = Literal["request", "candidate"]
Kind = Literal["categorical", "categories", "numeric", "embedding"]
MISSING = 0  # the hash of "no value"; padding too, so it must never influence a score


def hash_id(field: str, value: str) -> int:
    """Stable 63-bit hash of one categorical value; never `MISSING`.

    The field name is part of the hash, so that user "7" and item "7" do not meet in the merged table.
    """
    return (xxhash.xxh3_64_intdigest(f"{field}={value}".encode()) >> 1) or 1


def hash_ids(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """uint64 hashes of ids (bytes), the same on every machine: to order or to split by."""
    return np.fromiter((xxhash.xxh3_64_intdigest(i, seed=seed) for i in ids.tolist()), np.uint64, len(ids))


@dataclass(frozen=True)
class Feature:
    """One declared feature.

    Attributes:
        name: Unique name; the column name everywhere.
        level: `request` for the user and the context (one value a request), `candidate` for the item.
        kind: `categorical` (one string), `categories` (up to `width` strings, pooled by the model),
            `numeric` (one number) or `embedding` (`width` numbers).
        width: Number of columns that it takes.
        transform: Applied to numbers before they are stored: `none` or `log1p`.
    """

    name: str
    level: Level
    kind: Kind
    width: int = 1
    transform: Literal["none", "log1p"] = "none"

    @property
    def hashed(self) -> bool:
        """Whether the feature is looked up in the embedding table."""
        return self.kind in ("categorical", "categories")


@dataclass(frozen=True)
class TableSpec:
    """What the columns of a ranking table mean, in order."""

    features: tuple[Feature, ...]
    actions: tuple[str, ...]
    primary_action: str
    negative_actions: tuple[str, ...] = ()

    def of(self, level: Level, hashed: bool) -> tuple[Feature, ...]:
        """The features that make up one of the four column blocks, in column order."""
        return self._blocks[level, hashed]

    @cached_property
    def _blocks(self) -> dict[tuple[Level, bool], tuple[Feature, ...]]:
        levels: tuple[Level, ...] = ("request", "candidate")
        return {
            (level, hashed): tuple(f for f in self.features if f.level == level and f.hashed == hashed)
            for level in levels
            for hashed in (True, False)
        }

    def width(self, level: Level, hashed: bool) -> int:
        """Number of columns of one block."""
        return sum(f.width for f in self.of(level, hashed))

    def to_json(self) -> dict:
        """A JSON form that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "TableSpec":
        """The inverse of `to_json`."""
        return cls(
            features=tuple(Feature(**f) for f in data["features"]),
            actions=tuple(data["actions"]),
            primary_action=data["primary_action"],
            negative_actions=tuple(data["negative_actions"]),
        )


@dataclass(frozen=True)
class RankingTable:
    """Requests with their candidates, and the users' action histories that they point into.

    Requests are in time order. Row `i` of request `r` is a candidate when `offsets[r] <= i < offsets[r + 1]`.
    Request `r` knows the actions `history_*[history_start[r]:history_end[r]]`, oldest first, all of them by the
    same user and known strictly before the request. Histories are stored once a user, not once a request.

    Attributes:
        spec: What the columns mean.
        request_id: (R,) bytes.
        user_id: (R,) bytes.
        time: (R,) int64, microseconds since 1970 UTC: the instant at which the request was ranked.
        offsets: (R + 1,) int64.
        history_start: (R,) int64.
        history_end: (R,) int64.
        request_cat: (R, C) int64, hashed; `MISSING` where there is no value.
        request_num: (R, D) float32, transformed; NaN where there is no value.
        item_id: (N,) bytes.
        item_cat: (N, C) int64.
        item_num: (N, D) float32.
        labels: (N, A) uint8, in the order of `spec.actions`.
        sampled: (N,) bool, True for candidates that were drawn rather than logged.
        history_time: (H,) int64, microseconds.
        history_item: (H,) int64, the item's hash in the same space as the `item_id` feature.
        history_actions: (H,) int64, bit `a` set for `spec.actions[a]`.
    """

    spec: TableSpec
    request_id: np.ndarray
    user_id: np.ndarray
    time: np.ndarray
    offsets: np.ndarray
    history_start: np.ndarray
    history_end: np.ndarray
    request_cat: np.ndarray
    request_num: np.ndarray
    item_id: np.ndarray
    item_cat: np.ndarray
    item_num: np.ndarray
    labels: np.ndarray
    sampled: np.ndarray
    history_time: np.ndarray
    history_item: np.ndarray
    history_actions: np.ndarray

    @property
    def requests(self) -> int:
        """Number of requests, R."""
        return len(self.time)

    @property
    def rows(self) -> int:
        """Number of candidates, N."""
        return len(self.item_id)

    @cached_property
    def request_of_row(self) -> np.ndarray:
        """(N,) int64: the request that each candidate belongs to."""
        return np.repeat(np.arange(self.requests), np.diff(self.offsets))

    def rows_of(self, requests: np.ndarray) -> np.ndarray:
        """The candidates of the given requests, request after request."""
        sizes = np.diff(self.offsets)[requests]
        ends = np.cumsum(sizes)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.offsets[requests] - (ends - sizes), sizes)

    def select(self, requests: np.ndarray) -> "RankingTable":
        """The given requests (indices, in the order given) with their candidates; histories are shared, not copied."""
        requests = np.asarray(requests, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[requests])]).astype(np.int64)
        rows = self.rows_of(requests)
        by_request = {n: getattr(self, n)[requests] for n in _REQUEST_COLUMNS}
        by_row = {n: getattr(self, n)[rows] for n in _ROW_COLUMNS}
        return replace(self, offsets=offsets, **by_request, **by_row)

    def between(self, start_us: int, end_us: int) -> "RankingTable":
        """Requests with `start_us <= time < end_us` (a view where memory-mapped)."""
        a, b = np.searchsorted(self.time, [start_us, end_us])
        lo, hi = int(self.offsets[a]), int(self.offsets[b])
        by_request = {n: getattr(self, n)[a:b] for n in _REQUEST_COLUMNS}
        by_row = {n: getattr(self, n)[lo:hi] for n in _ROW_COLUMNS}
        return replace(self, offsets=self.offsets[a : b + 1] - lo, **by_request, **by_row)

    def save(self, directory: Path) -> str:
        """Write one `.npy` file a column and `table.json`; returns the content digest (hex SHA-256)."""
        directory.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(self.spec.to_json(), sort_keys=True).encode())
        for name in _COLUMNS:
            array = np.ascontiguousarray(getattr(self, name))
            np.save(directory / f"{name}.npy", array, allow_pickle=False)
            digest.update(name.encode())
            digest.update(str((array.dtype.str, array.shape)).encode())
            digest.update(array.data if array.size else b"")
        meta = {
            "spec": self.spec.to_json(),
            "digest": digest.hexdigest(),
            "requests": self.requests,
            "rows": self.rows,
        }
        (directory / "table.json").write_text(json.dumps(meta, indent=1))
        return digest.hexdigest()

    @classmethod
    def load(cls, directory: Path) -> "RankingTable":
        """Memory-map a saved table.

        Raises:
            EvergreenError: The directory holds no complete table.
        """
        try:
            meta = json.loads((directory / "table.json").read_text())
            arrays = {n: _load(directory / f"{n}.npy") for n in _COLUMNS}
        except (OSError, ValueError) as error:
            raise EvergreenError(
                f"no readable ranking table in {directory} ({error})", "Run the retrain again"
            ) from error
        return cls(spec=TableSpec.from_json(meta["spec"]), **arrays)


def _load(path: Path) -> np.ndarray:
    # An empty array cannot be memory-mapped.
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)


_COLUMNS = tuple(f.name for f in fields(RankingTable) if f.name != "spec")
_REQUEST_COLUMNS = (
    "request_id",
    "user_id",
    "time",
    "history_start",
    "history_end",
    "request_cat",
    "request_num",
)
_ROW_COLUMNS = ("item_id", "item_cat", "item_num", "labels", "sampled")


def concatenate(tables: Sequence[RankingTable]) -> RankingTable:
    """All requests of tables of one spec, one table after the other; in time order only if they are."""
    joined: dict[str, Any] = {n: np.concatenate([getattr(t, n) for t in tables]) for n in _COLUMNS}
    rows, actions = (np.cumsum([0, *(len(getattr(t, n)) for t in tables)]) for n in ("item_id", "history_time"))
    joined["offsets"] = np.concatenate([[0], *(t.offsets[1:] + r for t, r in zip(tables, rows, strict=False))])
    for name in ("history_start", "history_end"):
        joined[name] = np.concatenate([getattr(t, name) + a for t, a in zip(tables, actions, strict=False)])
    return replace(tables[0], **joined)


def micros(instant: datetime) -> int:
    """An aware instant as the integer that tables hold: microseconds since 1970 UTC."""
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
