"""Bytes to requests and answers to bytes: whatever comes is read or refused, and what goes out comes back."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.protocol import MAX_CANDIDATES, Answer, BadRequestError, RankRequest, parse, to_json
from serving.wire import Call, decode, encode, pack, unpack

CONTEXT = frozenset({"context__surface"})
REQUEST = RankRequest("r1", "ünï", ("a", "b", "a"), {"surface": "home"})
GOOD = json.dumps(to_json(REQUEST)).encode()
leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.just("BYTES"), st.just("item_id"))
keys = st.sampled_from(
    ["id", "inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "binary_data_size"]
)
tree = st.recursive(
    leaf, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner)), max_leaves=25
)


@settings(max_examples=300, deadline=None)
@given(tree, st.binary(max_size=12), st.one_of(st.none(), st.integers(-2, 200).map(str), st.text(max_size=4)))
def test_nonsense_is_read_or_refused_and_nothing_else(head, tail, length):
    try:
        call = decode(json.dumps(head).encode() + tail, length)
        parse(call.request_id, call.tensors, CONTEXT)
    except BadRequestError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=3))
def test_good_request_with_a_few_bytes_changed_is_read_or_refused(at, noise):
    try:
        call = decode(GOOD[:at] + noise + GOOD[at + len(noise) :], None)
        parse(call.request_id, call.tensors, CONTEXT)
    except BadRequestError:
        pass


def test_json_request_is_read_as_it_was_written():
    call = decode(GOOD, None)
    assert parse(call.request_id, call.tensors, CONTEXT) == REQUEST
    assert (call.outputs, call.binary) == (None, frozenset())


@given(st.lists(st.text(max_size=5), max_size=8))
def test_binary_texts_come_back(texts):
    assert [v.decode() for v in unpack("x", "BYTES", pack(texts))] == texts


def test_binary_numbers_are_little_endian():
    assert list(unpack("time", "INT64", struct.pack("<2q", -1, 1 << 40))) == [-1, 1 << 40]


@pytest.mark.parametrize(("datatype", "raw"), [("INT64", b"1234567"), ("BYTES", b"\1\0\0"), ("BYTES", b"\2\0\0\0a")])
def test_binary_values_that_end_in_the_middle_are_refused(datatype, raw):
    with pytest.raises(BadRequestError, match="middle"):
        unpack("x", datatype, raw)


def test_binary_values_beyond_the_most_candidates_are_refused_before_all_are_read():
    assert len(unpack("x", "BYTES", b"\0" * 4 * MAX_CANDIDATES)) == MAX_CANDIDATES
    with pytest.raises(BadRequestError, match="more than"):
        unpack("x", "BYTES", b"\0" * 4 * (MAX_CANDIDATES + 1))


def test_probabilities_survive_json_to_the_bit():
    scores_CA = np.random.default_rng(0).random((50, 2)).astype(np.float32)
    answer = Answer("r", [str(i) for i in range(50)], scores_CA)
    body, headers = encode(answer, Call("r", ()), "m", "3", ("save", "click"))
    outputs = {o["name"]: o["data"] for o in json.loads(body)["outputs"]}
    found_CA = np.array([outputs["save"], outputs["click"]], np.float32).T
    np.testing.assert_array_equal(found_CA, scores_CA)
    assert headers == {"content-type": "application/json"} and outputs["item_id"] == list(answer.item_ids)
