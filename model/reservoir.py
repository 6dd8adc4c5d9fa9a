"""A bounded, user-stratified memory of past requests that travels with the model from update to update.

Which requests are kept is a function of all requests that were ever offered, of the seed and of the capacity: neither
their order nor the slots that they came in matter. Each user's requests are ranked by a hash of (seed, request id);
kept are the first `capacity` in the order (rank within the user, hash). So every user keeps an equal number, as far as
there are so many, and those are a uniform sample of the user's past (the bottom-k sampling of Cohen and Kaplan 2007,
stratified). A request that falls out cannot come back: another request can only push it further down.

A kept request holds what the content vectors said about it when it was new (`Seen`). The vectors of today were learned
from its labels, and a model trained to read those would trust them more than they deserve on requests to come.

Shapes: R requests, N candidates, L actions, C content width, S signals.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from engagement.table import RankingTable, TableSpec, concatenate, hash_ids
from model.data import Batch, Batcher
from model.interest import Interest
from model.ranker import Ranker

RESERVOIR, EXAM = "reservoir", "exam"  # prefixes in a bundle's memory: requests trained on, and held out (`model.exam`)
_CHUNK = 256  # requests whose interest is looked up at a time


def choose(request_id: np.ndarray, user_id: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """Which requests to keep: their indices, ascending.

    Args:
        request_id: (R,) bytes; a request that is offered twice counts once.
        user_id: (R,) bytes.
        capacity: Most requests to keep.
        seed: Of the hash.
    """
    hashed = hash_ids(request_id, seed)
    _, first = np.unique(request_id, return_index=True)
    first = first[np.lexsort((hashed[first], user_id[first]))]
    starts = np.flatnonzero(np.r_[True, user_id[first][1:] != user_id[first][:-1]]) if len(first) else first
    rank = np.arange(len(first)) - np.repeat(starts, np.diff(np.r_[starts, len(first)]))
    return np.sort(first[np.lexsort((hashed[first], rank))[:capacity]])


@dataclass(frozen=True)
class Seen:
    """What the content vectors said about requests when they were new; see `model.interest.Interest`.

    Shapes are those of the requests' table: (R, C), (R, C), (N, C), (N, S); float32.
    """

    batch_RC: np.ndarray
    now_RC: np.ndarray
    item_NC: np.ndarray
    signals_NS: np.ndarray

    @classmethod
    def by(cls, ranker: Ranker, table: RankingTable) -> "Seen":
        """What the ranker's content vectors say now."""
        batcher, parts = Batcher(table, ranker.config), []
        for start in range(0, table.requests, _CHUNK):
            requests = np.arange(start, min(start + _CHUNK, table.requests))
            interest = ranker.content(batcher.of_requests(requests).to(ranker.table.weight.device))
            parts.append((interest.batch_BC, interest.now_BC, interest.item_NC, interest.signals_NS))
        return cls(*(torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True)))

    def in_place_of(self, interest: Interest, batch: Batch, requests: np.ndarray) -> Interest:
        """The interest of a batch of these requests, with what was seen in place of what is known now."""
        device, rows = batch.rows.device, batch.rows.cpu().numpy()
        known = (self.batch_RC[requests], self.now_RC[requests], self.item_NC[rows], self.signals_NS[rows])
        batch_BC, now_BC, item_NC, signals_NS = (torch.from_numpy(k).to(device) for k in known)
        return replace(interest, batch_BC=batch_BC, now_BC=now_BC, item_NC=item_NC, signals_NS=signals_NS)


@dataclass(frozen=True)
class Reservoir:
    """Past requests in time order, with what was seen about them; None for requests that are never trained on."""

    table: RankingTable
    seen: Seen | None = None

    def joined(self, other: "Reservoir | None", capacity: int, seed: int, history: int) -> "Reservoir":
        """The best `capacity` requests of both, in time order; histories are cut to the newest `history` actions."""
        parts = [r for r in (other, self) if r is not None and r.table.requests]
        if not parts:
            return self
        request_id = np.concatenate([r.table.request_id for r in parts])
        kept = choose(request_id, np.concatenate([r.table.user_id for r in parts]), capacity, seed)
        ends = np.cumsum([r.table.requests for r in parts])
        chosen = np.split(kept, np.searchsorted(kept, ends[:-1]))
        reduced = [r._select(c - e + r.table.requests) for r, c, e in zip(parts, chosen, ends, strict=True)]
        table = concatenate([_own_history(r.table, history) for r in reduced])
        seen = None
        if all(r.seen for r in reduced):
            seen = Seen(*(np.concatenate([getattr(r.seen, f.name) for r in reduced]) for f in fields(Seen)))
        return Reservoir(table, seen)._select(np.argsort(table.time, kind="stable"))

    def without(self, users: np.ndarray) -> "Reservoir":
        """Without the requests of some users (ids as bytes)."""
        return self._select(np.flatnonzero(~np.isin(self.table.user_id, users)))

    def _select(self, requests: np.ndarray) -> "Reservoir":
        rows, table, s = self.table.rows_of(requests), self.table.select(requests), self.seen
        return Reservoir(
            table, s and Seen(s.batch_RC[requests], s.now_RC[requests], s.item_NC[rows], s.signals_NS[rows])
        )

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """A flat form that `from_tensors` reads back."""
        arrays = {f.name: getattr(self.table, f.name) for f in fields(self.table) if f.name != "spec"}
        arrays |= {f"seen.{f.name}": getattr(self.seen, f.name) for f in fields(Seen)} if self.seen else {}
        return {f"{prefix}.{name}": torch.from_numpy(_plain(array)) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str, spec: TableSpec) -> "Reservoir | None":
        """The inverse of `to_tensors`; None where there is nothing of that prefix among the tensors.

        Args:
            tensors: A bundle's memory.
            prefix: As it was stored.
            spec: Of the bundle.
        """
        mine = {k.removeprefix(prefix + "."): v.numpy() for k, v in tensors.items() if k.startswith(prefix + ".")}
        if not mine:
            return None
        text = {n: _bytes(mine[n]) for n in ("request_id", "user_id", "item_id")}
        table = {f.name: mine[f.name] for f in fields(RankingTable) if f.name not in ("spec", *text)}
        seen = {f.name: mine[f"seen.{f.name}"] for f in fields(Seen) if f"seen.{f.name}" in mine}
        return cls(RankingTable(spec=spec, **text, **table), Seen(**seen) if seen else None)


def without_users(
    memory: dict[str, Tensor], spec: TableSpec, forgotten: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Tensor]:
    """A bundle's memory without the past requests of some users.

    Args:
        memory: The bundle's.
        spec: The bundle's.
        forgotten: Tells which user ids (bytes) are theirs, a bool each.
    """
    changed = dict[str, Tensor]()
    for prefix in (RESERVOIR, EXAM):
        past = Reservoir.from_tensors(memory, prefix, spec)
        if past:
            changed |= past.without(past.table.user_id[forgotten(past.table.user_id)]).to_tensors(prefix)
    return memory | changed


def _own_history(table: RankingTable, length: int) -> RankingTable:
    """The same requests with no more of the histories than they can see: the newest `length` actions of each."""
    start = np.maximum(table.history_start, table.history_end - length)
    used = np.zeros(len(table.history_time) + 1, np.int64)
    np.add.at(used, start, 1)
    np.add.at(used, table.history_end, -1)
    kept = np.cumsum(used[:-1]) > 0  # requests of one user overlap, and share what they share
    place = np.concatenate([[0], np.cumsum(kept)])
    columns = {n: getattr(table, n)[kept] for n in ("history_time", "history_item", "history_actions")}
    return replace(table, history_start=place[start], history_end=place[table.history_end], **columns)


def _plain(array: np.ndarray) -> np.ndarray:
    """Contiguous, and text as a matrix of bytes."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint8).reshape(len(array), array.dtype.itemsize) if array.dtype.kind == "S" else array


def _bytes(matrix: np.ndarray) -> np.ndarray:
    width = matrix.shape[1] if matrix.ndim == 2 else 1
    return np.ascontiguousarray(matrix).view(f"S{max(1, width)}").reshape(-1)
