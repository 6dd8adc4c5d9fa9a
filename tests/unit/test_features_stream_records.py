"""Each way in which a streamed record can be bad has its reason, and costs its neighbours nothing."""

import json

import pyarrow as pa
import pytest

from feature_repo.stream_records import CLOCK_SKEW_US, MAX_BYTES, encode, read
from tests.synth import START, UTC_US

ACTIONS = ("save", "click", "hide")
NOW = int(START.timestamp() * 1e6)
GOOD = {
    "request_id": "r1",
    "user_id": "u1",
    "item_id": "i1",
    "event_timestamp": "2023-12-31T23:00:00Z",
    "save": True,
    "click": False,
    "hide": True,
}


def record(**changed) -> bytes:
    return json.dumps({k: v for k, v in (GOOD | changed).items() if v != "absent"}).encode()


def at(us: int) -> str:
    seconds, rest = divmod(us, 1_000_000)
    return f"{START.fromtimestamp(seconds, START.tzinfo):%Y-%m-%dT%H:%M:%S}.{rest:06d}Z"


BAD = {
    "too_large": [b'{"request_id": "' + b"x" * MAX_BYTES + b'"}'],
    "bad_json": [b"", b"{", b"[1]", b"null", b"\xff\xfe", record()[:-1], b'"text"', b"[" * 5000],
    "unknown_action": [record(like=True), record(like=False, user_id=None)],
    "null_key": [
        *(record(**{k: None}) for k in ("request_id", "user_id", "item_id", "event_timestamp")),
        *(record(**{k: "absent"}) for k in ("user_id", "event_timestamp")),
        record(user_id=""),
    ],
    "bad_type": [
        record(user_id=["u1"]),
        record(item_id={"id": 1}),
        record(item_id=1.5),
        record(request_id=True),
        record(event_timestamp=1_700_000_000),
        record(event_timestamp="yesterday"),
        record(created_timestamp="25:00"),
        record(save="perhaps"),
        record(click=1),
    ],
    "null_action": [record(save=None), record(hide="absent")],
    "before_1970": [record(event_timestamp="1969-12-31T23:59:59Z")],
    "future_timestamp": [
        record(event_timestamp=at(NOW + CLOCK_SKEW_US + 1)),
        record(created_timestamp="2999-01-01T00:00:00Z"),
    ],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_between_good_ones_is_named_and_they_are_read(reason):
    raw = [record(item_id="before"), *BAD[reason], record(item_id="after")]
    found = read(raw, ACTIONS, NOW)
    assert found.bad["_row"].to_list() == list(range(1, len(raw) - 1))
    assert set(found.bad["reason"]) == {reason}
    assert found.actions["item"].to_list() == ["before", "after"]


def test_every_kind_of_bad_record_at_once():
    raw = [r for records in BAD.values() for r in records]
    found = read(raw, ACTIONS, NOW)
    assert found.bad["reason"].to_list() == [reason for reason, records in BAD.items() for _ in records]
    assert found.actions.height == 0 == found.idle


def test_a_good_record_becomes_an_action():
    raw = [
        record(created_timestamp="2024-01-01T01:00:00.000007+01:00", position=3, surface="home", sampled=False),
        record(user_id=7, created_timestamp=None, save=False),
        record(event_timestamp=at(NOW + CLOCK_SKEW_US), created_timestamp="2020-01-01T00:00:00Z"),
    ]
    shown = NOW - 3_600_000_000
    skewed = NOW + CLOCK_SKEW_US
    assert read(raw, ACTIONS, NOW).actions.rows() == [
        (0, "u1", NOW + 7, shown, "i1", 0b101),
        (1, "7", shown, shown, "i1", 0b100),
        (2, "u1", skewed, skewed, "i1", 0b101),
    ]


def test_what_was_only_shown_is_no_action_and_no_fault():
    found = read([record(save=False, hide=False)], ACTIONS, NOW)
    assert (found.actions.height, found.bad.height, found.idle) == (0, 0, 1)


def test_rows_of_the_log_survive_the_wire():
    rows = pa.table(
        {
            "request_id": ["r1", "r2"],
            "user_id": ["ü", "u2"],
            "item_id": ["i1", "i2"],
            "event_timestamp": pa.array([1_700_000_000_000_001, 1_700_000_000_000_000], UTC_US),
            "created_timestamp": pa.array([1_700_000_000_000_001, 1_700_000_005_999_999], UTC_US),
            "save": [True, False],
            "click": [False, False],
            "hide": [False, True],
            "surface": ["home", None],
        }
    )
    users, raw = zip(*encode(rows, ACTIONS), strict=True)
    assert users == ("ü", "u2")
    assert read(raw, ACTIONS, NOW).actions.rows() == [
        (0, "ü", 1_700_000_000_000_001, 1_700_000_000_000_001, "i1", 1),
        (1, "u2", 1_700_000_005_999_999, 1_700_000_000_000_000, "i2", 4),
    ]
