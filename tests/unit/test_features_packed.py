"""Packed rows come back as they were, and keys never meet."""

from datetime import timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement.errors import EvergreenError
from feature_repo.features import ARROW, View
from feature_repo.packed import Codec, instants, row_keys

US = pa.timestamp("us", "UTC")
KINDS = ("strings", "string", "int", "floats", "float", "ints", "string", "float", "int")
VIEW = View("v", ("user", "item"), timedelta(0), tuple((f"c{i}", k) for i, k in enumerate(KINDS)))
NUMBER = st.integers(-(2**63), 2**63 - 1)
VALUE = {
    "string": st.text(max_size=5),
    "strings": st.lists(st.none() | st.text(max_size=3), max_size=3),
    "float": st.floats(allow_nan=False),
    "floats": st.lists(st.floats(width=32, allow_nan=False), max_size=3),
    "int": NUMBER,
    "ints": st.lists(NUMBER, max_size=3),
}
ROW = st.tuples(st.integers(-(10**15), 10**15), *(st.none() | VALUE[k] for k in KINDS))


def _table(rows):
    event, *columns = ([r[i] for r in rows] for i in range(len(KINDS) + 1))
    values = {n: pa.array(c, ARROW[k]) for (n, k), c in zip(VIEW.columns, columns, strict=True)}
    return pa.table({"event_timestamp": pa.array(event, pa.int64()).cast(US), **values})


@settings(max_examples=80, deadline=None)
@given(st.lists(ROW, max_size=6), st.integers(0, 3))
def test_a_table_comes_back_exactly_wherever_it_is_cut(rows, start):
    table = _table(rows).slice(start)
    codec = Codec(VIEW)
    packed = codec.pack(table)
    back = codec.unpack([None, *packed, None])
    back.validate(full=True)
    for name, _ in VIEW.columns:
        assert back.column(name).to_pylist() == [None, *table.column(name).to_pylist(), None]
    event = table.column("event_timestamp").cast(pa.int64()).to_pylist()
    assert back.column("event_timestamp").to_pylist() == [None, *event, None]
    assert codec.pack(codec.unpack(packed)) == packed


def test_a_row_is_known_from_its_event_where_nothing_else_is_said():
    columns = {n: pa.nulls(2, ARROW[k]) for n, k in VIEW.columns}
    table = pa.table({"event_timestamp": pa.array([5, 6], US), "created_timestamp": pa.array([None, 9], US), **columns})
    assert instants(Codec(VIEW).pack(table)) == ([5, 6], [5, 9])


def test_a_null_float_in_a_list_becomes_nan_and_a_null_int_is_refused():
    view = View("v", ("user",), timedelta(0), (("f", "floats"), ("i", "ints")))
    at = pa.array([1], US)
    table = {"event_timestamp": at, "f": pa.array([[None, 1.0]]), "i": pa.array([[1]])}
    first, second = Codec(view).unpack(Codec(view).pack(pa.table(table))).column("f").to_pylist()[0]
    assert first != first and second == 1.0
    with pytest.raises(EvergreenError, match="'i' holds a null"):
        Codec(view).pack(pa.table({**table, "i": pa.array([[1, None]])}))


def test_a_row_without_time_or_key_is_refused():
    view = View("v", ("user",), timedelta(0), (("f", "float"),))
    with pytest.raises(EvergreenError, match="no event timestamp"):
        Codec(view).pack(pa.table({"event_timestamp": pa.array([None], US), "f": [1.0]}))
    with pytest.raises(EvergreenError, match="no user_id"):
        row_keys(view, {"user_id": pa.array([None], pa.string())})


@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), unique=True, max_size=8))
def test_different_pairs_of_keys_give_different_keys(pairs):
    users, items = [p[0] for p in pairs], [p[1] for p in pairs]
    keys = row_keys(VIEW, pa.table({"user_id": pa.array(users, pa.string()), "item_id": pa.array(items, pa.string())}))
    assert len(set(keys)) == len(pairs)
    for (user, item), key in zip(pairs, keys, strict=True):
        assert key == len(user.encode()).to_bytes(4, "little") + user.encode() + item.encode()


def test_the_mark_tells_layouts_apart():
    def mark(*columns):
        return Codec(View("v", ("user",), timedelta(0), columns)).mark

    marks = {mark(("a", "int"), ("b", "int")), mark(("b", "int"), ("a", "int")), mark(("a", "int"), ("b", "float"))}
    assert len(marks) == 3 and mark(("a", "int")) == mark(("a", "int"))
