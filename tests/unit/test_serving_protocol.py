"""The wire format: both ends agree, and whatever else comes is refused with one line."""

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.protocol import (
    MAX_CANDIDATES,
    MAX_ID_BYTES,
    BadRequestError,
    RankRequest,
    Tensor,
    from_json,
    parse,
    to_json,
)

CONTEXT = frozenset({"context__surface"})
AT = datetime(2024, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def tensors(body):
    return [Tensor(i["name"], i["datatype"], tuple(i["shape"]), tuple(i["data"])) for i in body["inputs"]]


def good() -> dict[str, Tensor]:
    request = RankRequest("r1", "u1", ("a", "b"), {"surface": "home"}, AT)
    return {t.name: t for t in tensors(to_json(request))}


def test_request_survives_the_wire_to_the_microsecond():
    request = RankRequest("r1", "ünï", ("a", "b", "a"), {"surface": "home"}, AT)
    assert parse("r1", tensors(to_json(request)), CONTEXT) == request


def test_context_feature_of_another_version_is_left_out_and_no_fault():
    given = [*good().values(), Tensor("context__x", "BYTES", (1,), ("red",))]
    assert parse("r", given, CONTEXT) == parse("r", given[:-1], CONTEXT)


def test_time_and_context_may_be_left_out():
    request = RankRequest("r1", "u", ("a",))
    assert parse("r1", tensors(to_json(request)), CONTEXT) == request


def test_as_many_candidates_as_allowed_and_ids_as_long_as_allowed_are_taken():
    request = RankRequest("r", "u" * MAX_ID_BYTES, tuple(f"i{i}" for i in range(MAX_CANDIDATES)))
    assert parse("r", tensors(to_json(request)), CONTEXT) == request


TOO_MANY = MAX_CANDIDATES + 1
BAD = {
    "no-user": ({"user_id": None}, "'user_id' is missing"),
    "no-items": ({"item_id": None}, "'item_id' is missing"),
    "no-candidates": ({"item_id": Tensor("item_id", "BYTES", (0,), ())}, "no candidates"),
    "too-many": ({"item_id": Tensor("item_id", "BYTES", (TOO_MANY,), ("a",) * TOO_MANY)}, "at most"),
    "numbers-as-items": ({"item_id": Tensor("item_id", "INT64", (2,), (1, 2))}, "must be BYTES"),
    "number-in-bytes": ({"item_id": Tensor("item_id", "BYTES", (2,), ("a", 7))}, "not UTF-8"),
    "null-in-bytes": ({"item_id": Tensor("item_id", "BYTES", (2,), ("a", None))}, "not UTF-8"),
    "not-utf8": ({"user_id": Tensor("user_id", "BYTES", (1,), (b"\xff\xfe",))}, "not UTF-8"),
    "lone-surrogate": ({"user_id": Tensor("user_id", "BYTES", (1,), ("\ud800",))}, "not UTF-8"),
    "empty-id": ({"user_id": Tensor("user_id", "BYTES", (1,), ("",))}, "empty"),
    "long-id": ({"user_id": Tensor("user_id", "BYTES", (1,), ("u" * (MAX_ID_BYTES + 1),))}, "above"),
    "nul": ({"user_id": Tensor("user_id", "BYTES", (1,), ("a\0b",))}, "NUL"),
    "two-users": ({"user_id": Tensor("user_id", "BYTES", (2,), ("a", "b"))}, "must hold 1 value"),
    "shape-lies": ({"item_id": Tensor("item_id", "BYTES", (3,), ("a", "b"))}, "shape"),
    "matrix": ({"item_id": Tensor("item_id", "BYTES", (1, 2), ("a", "b"))}, "shape"),
    "nested": ({"item_id": Tensor("item_id", "BYTES", (1,), (["a"],))}, "not UTF-8"),
    "unknown-input": ({"colour": Tensor("colour", "BYTES", (1,), ("red",))}, "unknown input 'colour'"),
    "text-time": ({"time": Tensor("time", "BYTES", (1,), ("now",))}, "must be INT64"),
    "float-time": ({"time": Tensor("time", "INT64", (1,), (1.5,))}, "integer"),
    "bool-time": ({"time": Tensor("time", "INT64", (1,), (True,))}, "integer"),
    "time-after-the-end": ({"time": Tensor("time", "INT64", (1,), (1 << 62,))}, "microseconds"),
    "time-before-1970": ({"time": Tensor("time", "INT64", (1,), (-1,))}, "microseconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_refused_with_one_line(name):
    change, says = BAD[name]
    inputs = [t for t in (good() | change).values() if t is not None]
    with pytest.raises(BadRequestError, match=says) as caught:
        parse("r", inputs, CONTEXT)
    assert "\n" not in str(caught.value)


def test_input_given_twice_is_refused():
    with pytest.raises(BadRequestError, match="twice"):
        parse("r", [*good().values(), good()["time"]], CONTEXT)


values = st.one_of(st.text(max_size=5), st.binary(max_size=5), st.integers(), st.floats(), st.none(), st.booleans())
some_tensor = st.builds(
    Tensor,
    st.sampled_from(["user_id", "item_id", "time", "context__surface", "x"]),
    st.sampled_from(["BYTES", "INT64", "FP32", ""]),
    st.lists(st.integers(-2, 4), max_size=2).map(tuple),
    st.lists(values, max_size=4).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(some_tensor, max_size=5))
def test_nonsense_is_read_or_refused_and_nothing_else(inputs):
    try:
        request = parse("r", inputs, CONTEXT)
    except BadRequestError:
        return
    assert request.user_id and request.item_ids


def test_answer_without_scores_reads_as_empty():
    body = {"outputs": [{"name": "item_id", "data": ["a"]}, {"name": "save", "data": [0.5]}], "model_version": "3"}
    ranked, scores, version = from_json(body, ("save",))
    assert (ranked, scores.shape, version) == (("a",), (1, 1), "3")
    for broken in ({}, [], {"outputs": []}, {"outputs": [{"name": "save"}]}, None, "x"):
        ranked, scores, _ = from_json(broken, ("save",))
        assert ranked == () and scores.size == 0
    item = {"name": "item_id", "data": ["a"]}
    ragged = {"outputs": [item, {"name": "save", "data": [1]}, {"name": "hide", "data": []}]}
    assert from_json(ragged, ("save", "hide"))[1].size == 0
    assert from_json({"outputs": [item, {"name": "save", "data": ["x"]}]}, ("save",))[1].size == 0
