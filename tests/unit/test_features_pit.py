"""The point-in-time join against brute force, on timestamps chosen to collide."""

from datetime import timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import pit

KEYS = st.sampled_from(["a", "b", "c", None])
SMALL = st.one_of(st.integers(0, 12), st.none())  # a dozen instants for many rows: ties everywhere
SOURCE = st.lists(st.tuples(KEYS, SMALL, SMALL), max_size=25)
ENTITIES = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "never", None]), SMALL), min_size=1, max_size=12)


def _source(rows, unit="us"):
    schema = {"key": pl.String, "event": pl.Int64, "created": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(pl.col("event", "created").cast(pl.Datetime(unit, "UTC")))


def _entities(rows, unit="us"):
    frame = pl.DataFrame(rows, schema={"key": pl.String, "t": pl.Int64}, orient="row")
    return frame.with_columns(pl.col("t").cast(pl.Datetime(unit, "UTC")))


def _told(row):
    return row[1] if row[2] is None else row[2]


def _brute(source, key, t, ttl, hide_late):
    """By the definition: the latest event among the rows that are true and known at t; ties by created, then place."""
    if key is None or t is None:
        return None
    seen = [
        (event, _told((k, event, created)), i)
        for i, (k, event, created) in enumerate(source)
        if k == key and event is not None and event <= t and (not hide_late or _told((k, event, created)) <= t)
    ]
    if not seen or (ttl and max(seen)[0] < t - ttl):
        return None
    return max(seen)[2]


@settings(max_examples=150, deadline=None)
@given(SOURCE, ENTITIES, st.integers(0, 6), st.booleans(), st.sampled_from(["us", "ns"]))
def test_join_equals_brute_force(source, entities, ttl, hide_late, unit):
    scale = 1 if unit == "us" else 1000
    found = pit.match(
        _entities([(k, t if t is None else t * scale) for k, t in entities], unit),
        "t",
        _source(source),
        [("key", "key")],
        "event",
        "created",
        timedelta(microseconds=ttl),
        hide_late,
    )
    assert found.to_list() == [_brute(source, k, t, ttl, hide_late) for k, t in entities]


@settings(max_examples=100, deadline=None)
@given(SOURCE, st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_feeding_intervals_to_a_store_ends_with_the_same_values_as_feeding_all_at_once(source, middle, end, hide_late):
    frame, store = _source(source), {}
    for start, stop in ((0, min(middle, end)), (min(middle, end), end)):
        for i in pit.latest(frame, ["key"], "event", "created", start, stop, hide_late).to_list():
            store[source[i][0]] = i
    expected = {k: _brute(source, k, end, 0, hide_late) for k in ("a", "b", "c")}
    assert store == {k: i for k, i in expected.items() if i is not None}


def test_a_row_lives_through_both_ends_of_its_time_to_live():
    source = _source([("a", 10, 10)])
    entities = _entities([("a", t) for t in (9, 10, 15, 16)])
    found = pit.match(entities, "t", source, [("key", "key")], "event", "created", timedelta(microseconds=5))
    assert found.to_list() == [None, 0, 0, None]


def test_an_expired_row_is_not_replaced_by_an_older_one():
    source = _source([("a", 1, 1), ("a", 5, 5)])
    ttl = timedelta(microseconds=3)
    found = pit.match(_entities([("a", 9)]), "t", source, [("key", "key")], "event", "created", ttl)
    assert found.to_list() == [None]


def test_a_late_row_is_invisible_before_it_was_known_and_does_not_hide_the_one_before():
    source = _source([("a", 1, 1), ("a", 5, 8)])
    found = pit.match(_entities([("a", t) for t in (5, 7, 8)]), "t", source, [("key", "key")], "event", "created", None)
    assert found.to_list() == [0, 0, 1]


def test_a_nanosecond_after_the_instant_is_after_it():
    source = _source([("a", 1001, 1001)], unit="ns")
    found = pit.match(_entities([("a", 1), ("a", 2)]), "t", source, [("key", "key")], "event", "created", None)
    assert found.to_list() == [None, 0]


def test_keys_of_several_columns_and_of_other_integer_widths_match():
    source = pl.DataFrame({"x": [1, 1, 2], "y": ["p", "q", "p"], "event": [1, 1, 1]}, schema_overrides={"x": pl.Int32})
    source = source.with_columns(pl.col("event").cast(pl.Datetime("us")))
    entities = pl.DataFrame({"k": [1, 2, 2], "y": ["q", "p", "q"], "t": [1, 1, 1]})
    entities = entities.with_columns(pl.col("t").cast(pl.Datetime("us")))
    found = pit.match(entities, "t", source, [("k", "x"), ("y", "y")], "event", None, None)
    assert found.to_list() == [1, 2, None]


@pytest.mark.parametrize("rows", [0, 3])
def test_a_view_without_key_has_one_row_for_everybody(rows):
    source = _source([("a", 1, 1), (None, 2, 9), ("b", 3, 3)][:rows])
    found = pit.match(_entities([("x", 0), ("y", 2), (None, 5)]), "t", source, [], "event", "created", None)
    assert found.to_list() == ([None, 0, 2] if rows else [None] * 3)
    assert pit.latest(source, [], "event", "created", 0, 12).to_list() == ([2] if rows else [])
