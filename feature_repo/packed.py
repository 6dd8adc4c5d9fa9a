"""One row of a view as bytes, packed and unpacked a whole table at a time.

    event_us i64 | created_us i64 | null bits | ints i64 | floats f64 | sizes u32 | payloads of the columns that vary

All numbers are little-endian. A payload is the column's numbers or its UTF-8 text; a list of texts has two, the length
of each text and then all of them together. Sizes count numbers, texts or bytes. What the columns are is not in the row:
`Codec.mark` says it and is kept with the generation that the rows belong to.

A null is kept apart from zero, from the empty text and from the empty list. Inside a list, a null text stays null, a
null float becomes NaN (no reader tells them apart), and a null int is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engagement.errors import EvergreenError
from feature_repo.features import ARROW, ColumnType, View

HEADER = 16  # bytes of event and created, by which two rows of one key are compared
NEVER = np.iinfo(np.int64).min  # the instant of what is not there
_NULL_TEXT = np.uint32(0xFFFFFFFF)  # stands for the length of a null inside a list of texts
_BLOCK = 50_000  # rows packed at a time; bounds the memory
_ITEM: dict[str, np.dtype] = {"ints": np.dtype("<i8"), "floats": np.dtype("<f4")}
# Numbers first, then lists of numbers, then text.
_ORDER: tuple[ColumnType, ...] = ("int", "float", "ints", "floats", "strings", "string")


class Codec:
    """Packs and unpacks the rows of one view.

    Args:
        view: The view; its columns are the layout.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        by_kind = {k: [n for n, t in view.columns if t == k] for k in _ORDER}
        self._ints, self._floats = by_kind["int"], by_kind["float"]
        self._ragged = [(n, k) for k in _ORDER[2:] for n in by_kind[k]]
        sizes = sum(2 if kind == "strings" else 1 for _, kind in self._ragged)
        self._head = np.dtype(
            [
                ("event", "<i8"),
                ("created", "<i8"),
                ("null", "u1", (-(-len(view.columns) // 8),)),
                ("ints", "<i8", (len(self._ints),)),
                ("floats", "<f8", (len(self._floats),)),
                ("sizes", "<u4", (sizes,)),
            ]
        )
        blank = np.zeros(1, self._head)
        blank["null"] = 0xFF
        self._blank = blank.tobytes()

    @property
    def mark(self) -> str:
        """Hex digest of the layout; rows may be read only by a codec with the mark that they were written with."""
        told = json.dumps([_ORDER, self.view.keys, self.view.columns])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def pack(self, table: pa.Table) -> list[bytes]:
        """Pack rows.

        Args:
            table: The view's columns, `event_timestamp` and perhaps `created_timestamp`; where that is not given or
                null, a row was known from its event on.

        Returns:
            One packed row a row of the table.

        Raises:
            EvergreenError: A row has no event timestamp, or a list of ints holds a null.
        """
        rows: list[bytes] = []
        for start in range(0, len(table), _BLOCK):
            rows += self._pack(table.slice(start, _BLOCK))
        return rows

    def unpack(self, rows: Sequence[bytes | None]) -> pa.Table:
        """The view's columns and `event_timestamp` (int64 microseconds), one row a packed row; nulls for None."""
        head, null, found = self._unpack(rows)
        found["event_timestamp"] = pa.array(head["event"], mask=np.array([r is None for r in rows], bool))
        for i, name in enumerate(self._floats):
            found[name] = pa.array(head["floats"][:, i], mask=null[name])
        return pa.table({n: found[n] for n in (*(c for c, _ in self.view.columns), "event_timestamp")})

    def columns(self, rows: Sequence[bytes | None]) -> tuple[np.ndarray, dict[str, pa.Array | np.ndarray]]:
        """For a reader in a hurry: (n,) event instants, `NEVER` for None, and the view's columns.

        Doubles are (n,) arrays with NaN for null.
        """
        head, null, found = self._unpack(rows)
        event = np.where([r is None for r in rows], NEVER, head["event"])
        floats = head["floats"].copy()
        for i, name in enumerate(self._floats):
            if null[name] is not None:
                floats[null[name], i] = np.nan
        return event, {**found, **{name: floats[:, i] for i, name in enumerate(self._floats)}}

    def _unpack(self, rows: Sequence[bytes | None]) -> tuple[np.ndarray, dict[str, np.ndarray | None], dict]:
        """(n,) heads, each column's (n,) nulls or None without any, and the columns but the doubles."""
        width = self._head.itemsize
        whole = [r or self._blank for r in rows]
        ends = _ends(np.fromiter(map(len, whole), np.int64, len(whole)))
        head = np.frombuffer(b"".join([r[:width] for r in whole]), self._head, len(whole))
        columns = len(self.view.columns)
        bits = np.unpackbits(head["null"], axis=1, count=columns, bitorder="little").astype(bool)
        some = np.logical_or.reduce(bits, axis=0).tolist()
        null = {n: bits[:, i] if some[i] else None for i, (n, _) in enumerate(self.view.columns)}
        found = {n: pa.array(head["ints"][:, i], mask=null[n]) for i, n in enumerate(self._ints)}
        sizes = _Sizes(head["sizes"], memoryview(b"".join(whole) if self._ragged else b""), ends[:-1] + width)
        for name, kind in self._ragged:
            found[name] = _UNPACK[kind](sizes, null[name])
        return head, null, found

    def _pack(self, table: pa.Table) -> list[bytes]:
        columns = {n: _plain(table.column(n), ARROW[t]) for n, t in self.view.columns}
        head = np.zeros(len(table), self._head)
        head["event"], head["created"] = _times(table)
        null = [pc.is_null(columns[n]).to_numpy(zero_copy_only=False) for n, _ in self.view.columns]
        head["null"] = np.packbits(np.stack(null, axis=1), axis=1, bitorder="little")
        for field, names in (("ints", self._ints), ("floats", self._floats)):
            for i, name in enumerate(names):
                head[field][:, i] = pc.fill_null(columns[name], 0).to_numpy(zero_copy_only=False)
        payloads: list[pa.Array] = []
        for name, kind in self._ragged:
            for size, payload in _payloads(kind, columns[name], name):
                head["sizes"][:, len(payloads)] = size
                payloads.append(payload)
        fixed = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(self._head.itemsize), len(head), [None, pa.py_buffer(head.tobytes())]
        )
        return _as_list(pc.binary_join_element_wise(fixed.cast(pa.binary()), *payloads, b""))


def row_keys(view: View, columns: pa.Table | Mapping[str, Sequence[str] | pa.Array]) -> list[bytes]:
    """The online key of each row: its UTF-8 text; of several join keys, all but the last after their lengths.

    Raises:
        EvergreenError: A join key is null.
    """
    parts: list[pa.Array] = []
    for name in view.keys:
        column = columns.column(name) if isinstance(columns, pa.Table) else columns[name]
        text = _plain(column if isinstance(column, pa.ChunkedArray | pa.Array) else pa.array(column), pa.string())
        if text.null_count:
            raise EvergreenError(f"a row of {view.name} has no {name}", "Give every row its join keys")
        if name != view.keys[-1]:
            length = pc.binary_length(text).to_numpy().astype("<u4")
            parts.append(_binary(np.arange(len(length) + 1) * 4, pa.py_buffer(length.tobytes())))
        parts.append(text.cast(pa.binary()))
    return _as_list(pc.binary_join_element_wise(*parts, b"") if len(parts) > 1 else parts[0])


def row_key(*parts: str) -> bytes:
    """The online key of one row, by its join keys; see `row_keys`."""
    *first, last = (part.encode() for part in parts)
    return b"".join(len(part).to_bytes(4, "little") + part for part in first) + last


def instants(rows: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """When each packed row became true and when it became known, microseconds."""
    both = np.frombuffer(b"".join([r[:HEADER] for r in rows]), "<i8").reshape(-1, 2)
    return both[:, 0].tolist(), both[:, 1].tolist()


def _plain(column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> pa.Array:
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return whole if whole.type == kind else whole.cast(kind)


def _as_list(values: pa.Array) -> list[bytes]:
    return values.to_numpy(zero_copy_only=False).tolist()


def _times(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    event = _us(table.column("event_timestamp"))
    if event.null_count:
        raise EvergreenError("a feature row has no event timestamp", "Give every row the time since when it is true")
    created = _us(table.column("created_timestamp")) if "created_timestamp" in table.column_names else event
    return event.to_numpy(), pc.coalesce(created, event).to_numpy()


def _us(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return _plain(column, pa.int64())


def _binary(offsets: np.ndarray, data: pa.Buffer | None) -> pa.Array:
    """The pieces of a buffer between (n + 1,) byte offsets."""
    ends = pa.py_buffer(offsets.astype(np.int32).tobytes())
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, ends, data or pa.py_buffer(b"")])


def _ends(sizes: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where n pieces of the given sizes begin and end."""
    ends = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    return ends


def _payloads(kind: ColumnType, column: pa.Array, name: str) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """(n,) sizes and the n pieces of bytes of each payload of a column."""
    if kind == "string":
        text = pc.fill_null(column, "").cast(pa.binary())
        yield pc.binary_length(text).to_numpy(), text
        return
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    flat, ends = pc.list_flatten(column), _ends(counts)
    if kind != "strings":
        if flat.null_count and kind == "ints":
            raise EvergreenError(f"a list in the column '{name}' holds a null", "Leave unknown numbers out of the list")
        item = _ITEM[kind]
        values = flat.to_numpy(zero_copy_only=False).astype(item)
        yield counts, _binary(ends * item.itemsize, pa.py_buffer(values.tobytes()))
        return
    text = pc.fill_null(flat, "")
    lengths = pc.binary_length(text).to_numpy().astype("<u4")
    marked = np.where(pc.is_null(flat).to_numpy(zero_copy_only=False), _NULL_TEXT, lengths)
    yield counts, _binary(ends * 4, pa.py_buffer(marked.tobytes()))
    # The text itself lies in one buffer already; only where each row's share of it ends is new.
    _, offsets, data = text.buffers()
    bounds = np.frombuffer(offsets, np.int32)[text.offset :][ends] if len(text) else ends
    yield np.diff(bounds), _binary(bounds, data)


class _Sizes:
    """Hands out the payloads of n rows one after another."""

    def __init__(self, sizes: np.ndarray, content: memoryview, at: np.ndarray) -> None:
        self._sizes, self._content, self._at, self._next = sizes, content, at, 0

    def take(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(n + 1,) ends and the bytes of the next payload, whose items have `width` bytes."""
        counts = self._sizes[:, self._next].astype(np.int64)
        ends = _ends(counts)
        stop = self._at + counts * width
        pieces = [self._content[i:j] for i, j in zip(self._at.tolist(), stop.tolist(), strict=True)]
        self._next, self._at = self._next + 1, stop
        return ends, np.frombuffer(b"".join(pieces), np.uint8)


def _validity(null: np.ndarray | None) -> pa.Buffer | None:
    return None if null is None else pa.py_buffer(np.packbits(~null, bitorder="little").tobytes())


def _list(ends: np.ndarray, values: pa.Array, null: np.ndarray | None) -> pa.Array:
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.Array.from_buffers(pa.list_(values.type), len(ends) - 1, [_validity(null), offsets], children=[values])


def _text(ends: np.ndarray, content: np.ndarray, null: np.ndarray | None) -> pa.Array:
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.Array.from_buffers(pa.string(), len(ends) - 1, [_validity(null), offsets, pa.py_buffer(content)])


def _unpack_numbers(sizes: _Sizes, null: np.ndarray | None, item: np.dtype) -> pa.Array:
    ends, content = sizes.take(item.itemsize)
    return _list(ends, pa.array(content.view(item)), null)


def _unpack_text(sizes: _Sizes, null: np.ndarray | None) -> pa.Array:
    ends, content = sizes.take(1)
    return _text(ends, content, null)


def _unpack_texts(sizes: _Sizes, null: np.ndarray | None) -> pa.Array:
    ends, content = sizes.take(4)
    lengths = content.view("<u4")
    absent = lengths == _NULL_TEXT
    _, text = sizes.take(1)
    return _list(ends, _text(_ends(np.where(absent, 0, lengths)), text, absent if absent.any() else None), null)


_UNPACK: dict[ColumnType, Callable[[_Sizes, np.ndarray | None], pa.Array]] = {
    "ints": lambda sizes, null: _unpack_numbers(sizes, null, _ITEM["ints"]),
    "floats": lambda sizes, null: _unpack_numbers(sizes, null, _ITEM["floats"]),
    "strings": _unpack_texts,
    "string": _unpack_text,
}
