"""The online rows of one entity, encoded: what a request takes from the store or from memory, as columns of its table.

A row of a room holds the columns of the ranking table that its views fill, when each view's values became true (so that
they expire at the instant of the request, not when they were read), and the columns that are no features.

Shapes: n rows, N candidates, V views, C hashed and D numeric columns of the room.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engagement.table import MISSING, Level, TableSpec
from feature_repo.encode import encode, hashes
from feature_repo.features import JOIN_KEY, Entity, views
from feature_repo.online_cache import RowCache
from feature_repo.packed import NEVER, Codec

Packed = Sequence[Sequence[bytes | None]]  # a list a view, with a packed row a key
_SINGLES = 2_000  # users whose rows are kept unpacked; some 15 MB where all have a history of a hundred actions
_NO_VIEW = -1  # owns the column of the id, which never expires


class Room:
    """The views of one entity, and what was read of them.

    Attributes:
        codecs: Of the views.
        cache: Rows by key.

    Args:
        spec: The declaration.
        entities: What a row is about.
        capacity: How many rows are remembered.
    """

    def __init__(self, spec: TableSpec, entities: tuple[Entity, ...], capacity: int) -> None:
        self.codecs = [Codec(v) for v in views(spec) if v.entities == entities]
        self._spec = spec
        self._level: Level = "request" if entities == ("user",) else "candidate"
        self._key = JOIN_KEY[entities[0]] if len(entities) == 1 else ""
        self._cat, self._cat_view = self._columns(hashed=True)
        self._num, self._num_view = self._columns(hashed=False)
        features = {f.name for f in spec.features}
        columns = [(f"{c.view.name}__{n}", t, i) for i, c in enumerate(self.codecs) for n, t in c.view.columns]
        # Name, kind and view of the columns that are no features.
        self._hidden = [column for column in columns if column[0] not in features]
        self._ttl_us = np.array([c.view.ttl // timedelta(microseconds=1) for c in self.codecs], np.int64)
        wide = [
            ("event", "<i8", len(self.codecs)),
            ("cat", "<i8", len(self._cat_view)),
            ("num", "<f4", len(self._num_view)),
        ]
        fields = [(name, kind, (width,)) for name, kind, width in wide]
        hidden = [(name, "<i8" if kind == "int" else "O") for name, kind, _ in self._hidden]
        # A user who asks again has mostly the same bytes in the store as before; they are read, but not unpacked again.
        own = weakref.proxy(self)  # no cycle: a generation that was left takes its memory with it
        self._single = lru_cache(maxsize=_SINGLES)(lambda keys, packed: own._unpacked(keys, packed))
        self.cache = RowCache("_".join(entities), np.dtype([*fields, *hidden]), capacity)

    def encoded(self, keys: Sequence[bytes], packed: Packed) -> np.ndarray:
        """(n,) rows, not to be written to; a key without packed rows has its id and nothing else."""
        if len(keys) == 1:
            return self._single((keys[0],), tuple((column[0],) for column in packed))
        return self._unpacked(keys, packed)

    def _unpacked(self, keys: Sequence[bytes], packed: Packed) -> np.ndarray:
        rows = np.empty(len(keys), self.cache.dtype)
        raw: dict[str, pa.Array | np.ndarray] = {}
        for i, (codec, column) in enumerate(zip(self.codecs, packed, strict=True)):
            rows["event"][:, i], values = codec.columns(column)
            raw |= {f"{codec.view.name}__{n}": v for n, v in values.items()}
        if self._key:
            raw[self._key] = pa.array([key.decode() for key in keys], pa.string())
        cat, num = encode(self._spec, self._level, raw, len(keys))
        rows["cat"], rows["num"] = cat[:, self._cat], num[:, self._num]
        for name, kind, _ in self._hidden:
            column = cast(pa.Array, raw[name])
            if kind == "int":
                rows[name] = pc.fill_null(column, NEVER).to_numpy(zero_copy_only=False)
            elif kind == "string":
                rows[name] = column.to_numpy(zero_copy_only=False)
            else:
                rows[name][:] = list(_pieces(column))
        return rows

    def expire(self, rows: np.ndarray, at_us: int) -> None:
        """Take out what is older than its view's time to live at `at_us`; in place."""
        dead_nV = (self._ttl_us > 0) & (rows["event"] < at_us - self._ttl_us)
        if not dead_nV.any():
            return
        dead_nV = np.column_stack([dead_nV, np.zeros(len(rows), bool)])  # of `_NO_VIEW`
        rows["cat"][dead_nV[:, self._cat_view]] = MISSING
        rows["num"][dead_nV[:, self._num_view]] = np.nan
        for name, kind, view in self._hidden:
            rows[name][dead_nV[:, view]] = NEVER if kind == "int" else None

    def write(self, rows: np.ndarray, where: np.ndarray | slice, cat: np.ndarray, num: np.ndarray) -> None:
        """Write the room's columns of a level's blocks, of the rows `where`."""
        cat[where, self._cat], num[where, self._num] = rows["cat"], rows["num"]

    def _columns(self, hashed: bool) -> tuple[slice, np.ndarray]:
        """Which of a level's hashed or numeric columns are the room's, and which view fills each."""
        view = {codec.view.name: i for i, codec in enumerate(self.codecs)} | {self._key: _NO_VIEW}
        every = [f.name.split("__")[0] for f in self._spec.of(self._level, hashed) for _ in range(f.width)]
        own = [i for i, name in enumerate(every) if name in view]
        columns = slice(own[0], own[-1] + 1) if own else slice(0)
        assert own == list(range(columns.start or 0, columns.stop)), "a declaration keeps an entity's columns together"
        return columns, np.array([view[every[i]] for i in own], np.int64)


def _pieces(lists: pa.Array) -> Iterator[np.ndarray | None]:
    """Each list as an array; texts, which are ids of items, as the hashes that the table has for them."""
    flat = pc.list_flatten(lists)
    values = hashes("item_id", flat) if pa.types.is_string(flat.type) else flat.to_numpy(zero_copy_only=False)
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)).tolist()
    valid = lists.is_valid().to_pylist()
    return (values[a:b] if there else None for a, b, there in zip([0, *ends], ends, valid, strict=False))


@dataclass
class Wanted:
    """Rows (n,) of a room; those at the places `missing` have to be read first."""

    room: Room
    keys: list[bytes]
    rows: np.ndarray
    missing: np.ndarray

    @classmethod
    def unread(cls, room: Room, keys: list[bytes]) -> "Wanted":
        """All of them have to be read."""
        return cls(room, keys, np.empty(len(keys), room.cache.dtype), np.arange(len(keys)))

    @classmethod
    def cached(cls, room: Room, keys: list[bytes], state: int) -> "Wanted":
        """Those that are fresh in this state of the store need no reading."""
        rows, fresh = room.cache.get(keys, state)
        return cls(room, keys, rows, np.flatnonzero(~fresh))

    @classmethod
    def known(cls, room: Room, keys: list[bytes]) -> "Wanted":
        """None has to be read: what is not known of a key is no value."""
        rows, known = room.cache.known(keys)
        wanted = cls(room, keys, rows, np.flatnonzero(~known))
        absent = wanted.absent()
        wanted.take(absent, [[None] * len(absent)] * len(room.codecs))
        return wanted

    def absent(self) -> list[bytes]:
        """The keys that are missing, each once."""
        return list(dict.fromkeys(self.keys[i] for i in self.missing.tolist()))

    def take(self, absent: list[bytes], packed: Packed) -> np.ndarray:
        """Fill in what the absent keys have; returns their rows."""
        rows = self.room.encoded(absent, packed)
        place = {key: i for i, key in enumerate(absent)}
        self.rows[self.missing] = rows[[place[self.keys[i]] for i in self.missing.tolist()]]
        return rows
