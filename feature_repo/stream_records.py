"""What travels on the stream: one engagement row of the contract as one JSON object, and why a record cannot be used.

    {"request_id": "r1", "user_id": "u1", "item_id": "i1", "event_timestamp": "2026-03-01T12:00:00.25Z",
     "created_timestamp": "2026-03-01T12:00:07Z", "save": true, "click": false, "hide": false}

`created_timestamp` is optional. A record says all that is known of its row: one that is sent again with one action
more repeats the earlier ones. The rules are those of `engagement.validate`, as far as one record shows them, and what a
stream adds. Reasons, in the order in which they are looked for:

================= ====================================================================================
too_large         longer than `MAX_BYTES`
bad_json          no JSON object in UTF-8
unknown_action    a key that is none of the contract's is true or false
null_key          an id or the timestamp is null, or an id is empty text
bad_type          a value cannot be read as its column's type
null_action       an action is neither true nor false
before_1970       the timestamp lies before 1970: a lost clock
future_timestamp  the row was shown, or became known, more than `CLOCK_SKEW_US` from now
too_late          found later, beside the user's history (`stream_merge.too_late`)
================= ====================================================================================
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import polars as pl
import pyarrow as pa

from engagement.contract import ENGAGEMENT_FIXED, IDS, TIMESTAMP
from engagement.reading import reading

MAX_BYTES = 16_384
"""A record is too large when len(record) > MAX_BYTES; a row of the contract takes some 300."""
CLOCK_SKEW_US = 60_000_000
"""A record is of the future when known > now + CLOCK_SKEW_US."""
_TIMES = ("event_timestamp", "created_timestamp")


@dataclass(frozen=True)
class Records:
    """The outcome of reading a batch of N records.

    Attributes:
        actions: Good records with an action in order of arrival: `_row`, `user_id`, and the columns of
            `stream_merge.ACTIONS` but for the user's number.
        bad: `_row` and `reason`.
        idle: Good records without any action; they change no history.
    """

    actions: pl.DataFrame
    bad: pl.DataFrame
    idle: int


def read(raw: Sequence[bytes], actions: tuple[str, ...], now_us: int) -> Records:
    """Read and judge records.

    Args:
        raw: (N,) records as they came.
        actions: The declared actions, in the order of the bits.
        now_us: The present instant, microseconds.
    """
    rows, reasons = _decoded(raw, {*ENGAGEMENT_FIXED, *actions})
    frame = pl.DataFrame({"_reason": pl.Series(reasons, dtype=pl.String)}).with_row_index("_row")
    told = {n: [r.get(n) for r in rows] for n in (*IDS, *_TIMES, *actions)}
    text = {n: _text(n, told[n]) for n in IDS} | {t: _only(str, t, told[t], pl.String) for t in _TIMES}
    truth = [_only(bool, a, told[a], pl.Boolean) for a in actions]
    instants = [reading(text[t], TIMESTAMP).dt.timestamp("us") for t in _TIMES]
    readings = [*(text[n] for n in IDS), *instants, *truth]
    frame = frame.with_columns(
        *readings,
        _null=_any([_null(told[n]) | (text[n] == "").fill_null(False) for n in IDS] + [_null(told[_TIMES[0]])]),
        _mistyped=_any([~_null(told[r.name]) & r.is_null() for r in readings]),
    )
    event, known = pl.col("event_timestamp"), pl.max_horizontal(*_TIMES)
    reason = (
        pl.when(pl.col("_reason").is_not_null()).then("_reason")
        .when("_null").then(pl.lit("null_key"))
        .when("_mistyped").then(pl.lit("bad_type"))
        .when(pl.any_horizontal(pl.col(a).is_null() for a in actions)).then(pl.lit("null_action"))
        .when(event < 0).then(pl.lit("before_1970"))
        .when(known > now_us + CLOCK_SKEW_US).then(pl.lit("future_timestamp"))
    )  # fmt: skip
    mask = pl.sum_horizontal([pl.col(a).cast(pl.Int64) * (1 << i) for i, a in enumerate(actions)])
    judged = frame.select(
        "_row", "user_id", known=known, time=event, item="item_id", actions=mask.cast(pl.Int64), reason=reason
    )
    good = judged.filter(pl.col("reason").is_null())
    acted = good.filter(pl.col("actions") != 0).drop("reason")
    return Records(acted, judged.drop_nulls("reason").select("_row", "reason"), good.height - acted.height)


def encode(rows: pa.Table, actions: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Engagement rows as (user, record) pairs, in their order; the way back is `read`."""
    columns = [*IDS, *(t for t in _TIMES if t in rows.column_names), *actions]
    for row in rows.select(columns).to_pylist():
        yield row["user_id"], orjson.dumps(row, option=orjson.OPT_UTC_Z)


def _decoded(raw: Sequence[bytes], contract: set[str]) -> tuple[list[dict[str, Any]], list[str | None]]:
    """The objects, empty where there is none, and why not.

    Decoded one by one, because one broken record must not cost its neighbours; it is 2 microseconds each.
    """
    rows: list[dict[str, Any]] = []
    reasons: list[str | None] = []
    for record in raw:
        row, reason = _object(record)
        if row.keys() - contract and any(isinstance(row[k], bool) for k in row.keys() - contract):
            reason = "unknown_action"
        rows.append(row)
        reasons.append(reason)
    return rows, reasons


def _object(record: bytes) -> tuple[dict[str, Any], str | None]:
    if len(record) > MAX_BYTES:
        return {}, "too_large"
    try:
        row = orjson.loads(record)
    except orjson.JSONDecodeError:
        return {}, "bad_json"
    return (row, None) if isinstance(row, dict) else ({}, "bad_json")


def _text(name: str, values: list[Any]) -> pl.Series:
    """Ids: text, or a whole number as text."""
    return pl.Series(
        name, [v if type(v) is str else str(v) if type(v) is int else None for v in values], dtype=pl.String
    )


def _only(kind: type, name: str, values: list[Any], dtype: type[pl.DataType]) -> pl.Series:
    return pl.Series(name, [v if type(v) is kind else None for v in values], dtype=dtype)


def _null(values: list[Any]) -> pl.Series:
    return pl.Series([v is None for v in values], dtype=pl.Boolean)


def _any(flags: list[pl.Series]) -> pl.Series:
    found = flags[0]
    for flag in flags[1:]:
        found = found | flag
    return found
