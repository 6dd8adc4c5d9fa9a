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


def _scaled(rows, unit):
    scale = 1 if unit == "us" else 1000
    return [tuple(v * scale if isinstance(v, int) else v for v in row) for row in rows]


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


@settings(max_examples=200, deadline=None)
@given(SOURCE, ENTITIES, st.integers(0, 6), st.booleans(), st.sampled_from(["us", "ns"]), st.sampled_from(["us", "ns"]))
def test_join_equals_brute_force(source, entities, ttl, hide_late, unit, source_unit):
    found = pit.match(
        _entities(_scaled(entities, unit), unit),
        "t",
        _source(_scaled(source, source_unit), source_unit),
        [("key", "key")],
        "event",
        "created",
        timedelta(microseconds=ttl),
        hide_late,
    )
    assert found.to_list() == [_brute(source, k, t, ttl, hide_late) for k, t in entities]


@settings(max_examples=100, deadline=None)
@given(SOURCE, ENTITIES, st.integers(0, 6), st.integers(1, 4), st.booleans())
def test_rows_put_in_order_once_answer_batch_after_batch_as_they_answer_all(source, entities, ttl, size, keyed):
    rows, asked = _source(source), _entities(entities)
    keys = [("key", "key")] if keyed else []
    answers = pit.Answers(rows, keys, "event", "created", True, asked.schema, "t")
    found = []
    for start in range(0, len(asked), size):
        part = pit.Questions(asked.slice(start, size), "t")
        found += answers.rows_at(part, timedelta(microseconds=ttl)).to_list()
    one = [("one", *times) for _, *times in source]
    expected = [_brute(source, k, t, ttl, True) if keyed else _brute(one, "one", t, ttl, True) for k, t in entities]
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(SOURCE, st.integers(0, 12), st.integers(0, 12))
def test_the_changes_of_an_interval_are_all_instants_at_which_an_answer_changes(source, start, length):
    kinds = pl.Schema({"key": pl.String(), "t": pl.Datetime("us", "UTC")})
    answers = pit.Answers(_source(source), [("key", "key")], "event", "created", True, kinds, "t")
    found = answers.changes(["key"], start, start + length)
    changed = {
        (k, t)
        for k in ("a", "b", "c")
        for t in range(start, start + length + 1)
        if _brute(source, k, t, 0, True) != _brute(source, k, t - 1, 0, True)
    }
    assert set(found.rows()) == changed


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
