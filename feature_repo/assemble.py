"""From raw values to a ranking table: the last step of the offline join."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import xxhash

from engagement.table import RankingTable, TableSpec
from feature_repo.encode import candidate_values, encode, hashes, request_values
from feature_repo.features import ITEM_CREATED

SAMPLE_ROWS = 20_000
_CREATED = f"item_profile__{ITEM_CREATED}"


@dataclass(frozen=True)
class RawTable:
    """Requests with their candidates before hashing and transforming; R requests, N candidates, H actions.

    Attributes:
        spec: The declaration.
        request_id: (R,) text.
        user_id: (R,) text.
        time: (R,) int64, microseconds.
        offsets: (R + 1,) int64.
        request: (R,) values of the user's and the context's features, by name.
        item_id: (N,) text.
        candidate: (N,) values of the items' features, by name, and when each item became available.
        labels: (N, A) uint8.
        sampled: (N,) bool.
        history_start: (R,) int64.
        history_end: (R,) int64.
        history_time: (H,) int64, microseconds.
        history_item: (H,) item ids.
        history_actions: (H,) int64, bit masks.
    """

    spec: TableSpec
    request_id: pa.Array
    user_id: pa.Array
    time: np.ndarray
    offsets: np.ndarray
    request: Mapping[str, pa.Array]
    item_id: pa.Array
    candidate: Mapping[str, pa.Array]
    labels: np.ndarray
    sampled: np.ndarray
    history_start: np.ndarray
    history_end: np.ndarray
    history_time: np.ndarray
    history_item: pa.Array
    history_actions: np.ndarray

    @cached_property
    def request_of_row(self) -> np.ndarray:
        """(N,) int64."""
        return np.repeat(np.arange(len(self.time)), np.diff(self.offsets))

    @cached_property
    def request_raw(self) -> dict[str, pa.Array]:
        """Every request-level feature, (R,) each."""
        last = np.full(len(self.time), np.nan)
        seen = self.history_end > self.history_start
        last[seen] = self.history_time[self.history_end[seen] - 1]
        return {**self.request, "user_id": self.user_id, **request_values(self.time, last)}

    @cached_property
    def candidate_raw(self) -> dict[str, pa.Array]:
        """Every candidate-level feature, (N,) each."""
        age = candidate_values(self.time[self.request_of_row], self.candidate[_CREATED])
        return {**self.candidate, "item_id": self.item_id, **age}

    def table(self) -> RankingTable:
        """The encoded table."""
        request_cat, request_num = encode(self.spec, "request", self.request_raw, len(self.time))
        item_cat, item_num = encode(self.spec, "candidate", self.candidate_raw, len(self.item_id))
        return RankingTable(
            spec=self.spec,
            request_id=_bytes(self.request_id),
            user_id=_bytes(self.user_id),
            time=self.time,
            offsets=self.offsets,
            history_start=self.history_start,
            history_end=self.history_end,
            request_cat=request_cat,
            request_num=request_num,
            item_id=_bytes(self.item_id),
            item_cat=item_cat,
            item_num=item_num,
            labels=self.labels,
            sampled=self.sampled,
            history_time=self.history_time,
            history_item=hashes("item_id", self.history_item),
            history_actions=self.history_actions,
        )

    def sample(self, since: int | None = None, rows: int = SAMPLE_ROWS) -> pa.Table:
        """Raw values of up to `rows` candidates, of whole requests since `since` (microseconds), by their ids' hash.

        Columns: request_id, item_id, row (int64, index into the table), then each declared feature by name.
        """
        order = np.argsort([xxhash.xxh3_64_intdigest(r.encode()) for r in self.request_id.to_pylist()], kind="stable")
        if since is not None:
            order = order[self.time[order] >= since]
        fits = np.cumsum(np.diff(self.offsets)[order]) <= rows
        chosen = np.zeros(len(self.time), bool)
        chosen[order[fits]] = True
        row = np.flatnonzero(chosen[self.request_of_row])
        owner, index = pa.array(self.request_of_row[row]), pa.array(row)
        columns = {"request_id": self.request_id.take(owner), "item_id": self.item_id.take(index), "row": index}
        for feature in self.spec.features:
            raw, at = (self.request_raw, owner) if feature.level == "request" else (self.candidate_raw, index)
            if feature.name in raw:
                columns[feature.name] = raw[feature.name].take(at)
        return pa.table({n: c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for n, c in columns.items()})


def _bytes(values: pa.Array) -> np.ndarray:
    """(n,) fixed-width bytes of text; each distinct value is encoded once."""
    coded = values.dictionary_encode()
    known = np.array([v.encode() for v in coded.dictionary.to_pylist()] or [b""], dtype=np.bytes_)
    return known[coded.indices.to_numpy(zero_copy_only=False)]
