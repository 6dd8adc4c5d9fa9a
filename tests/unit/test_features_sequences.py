"""Pointers into the log, arrays of a snapshot and a slice by the definition are the same sequence."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feature_repo.features import HISTORY_LENGTH
from feature_repo.history import ActionLog
from feature_repo.partials import taken

ACTIONS = ("save", "click")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
INSTANT = st.integers(0, 9)  # few instants for many rows: shown at once, known at once
# user, item, shown, known after, mask of actions (0: merely shown), sampled
ROW = st.tuples(
    st.sampled_from("ab"),
    st.sampled_from("xyz"),
    INSTANT,
    st.integers(-3, 6),
    st.integers(0, 3),
    st.sampled_from([False] * 9 + [True]),
)


def _identity(row):
    """One row an item, instant shown and instant known: of equal ones the log would keep one."""
    return (*row[:3], max(row[3], 0))


ROWS = st.lists(ROW, max_size=60, unique_by=_identity)
REQUESTS = st.lists(st.tuples(st.sampled_from(["a", "b", "never"]), st.integers(0, 17)), min_size=1, max_size=20)
MANY = [("a", f"i{i % 7}", i % 10, i % 4, 1, False) for i in range(2 * HISTORY_LENGTH + 50)]


def _log(rows):
    shown = [EPOCH + timedelta(microseconds=r[2]) for r in rows]
    known = [EPOCH + timedelta(microseconds=r[2] + r[3]) for r in rows]
    times = {"event_timestamp": shown, "created_timestamp": known}
    frame = pl.DataFrame(
        {
            "user_id": pl.Series([r[0] for r in rows], dtype=pl.String),
            "item_id": pl.Series([r[1] for r in rows], dtype=pl.String),
            **{n: pl.Series(v, dtype=pl.Datetime("us", "UTC")) for n, v in times.items()},
            **{a: pl.Series([bool(r[4] >> i & 1) for r in rows], dtype=pl.Boolean) for i, a in enumerate(ACTIONS)},
            "sampled": pl.Series([r[5] for r in rows], dtype=pl.Boolean),
        }
    )
    return ActionLog.of(taken(frame, ACTIONS))


def _slice(rows, user, t):
    """(time, mask, item) of the last hundred actions known strictly before t, oldest first."""
    mine = [(max(shown, shown + after), shown, item, mask) for u, item, shown, after, mask, sampled in rows
            if u == user and mask and not sampled]  # fmt: skip
    return [(shown, mask, item) for known, shown, item, mask in sorted(mine) if known < t][-HISTORY_LENGTH:]


def _rows_of(arrays):
    """Lists of (time, mask, item), one a snapshot."""
    lists = (arrays[name].to_pylist() for name in ("time", "actions", "item"))
    return [list(zip(*columns, strict=True)) for columns in zip(*lists, strict=True)]


@settings(max_examples=150, deadline=None)
@given(ROWS, REQUESTS)
@example(MANY, [("a", t) for t in range(18)] + [("never", 3)])
@example([], [("a", 0)])
def test_pointers_snapshots_and_a_slice_by_the_definition_are_equal(rows, requests):
    log = _log(rows)
    users, t = [r[0] for r in requests], [r[1] for r in requests]
    start, end = log.pointers(pa.array(users, pa.string()), np.array(t, np.int64))
    items = log.item.to_pylist()
    pointed = [list(zip(log.time[s:e].tolist(), log.actions[s:e].tolist(), items[s:e], strict=True))
               for s, e in zip(start, end, strict=True)]  # fmt: skip
    assert pointed == [_slice(rows, u, at) for u, at in requests]

    some = end > start
    assert _rows_of(log.arrays(end[some] - 1)) == [p for p, s in zip(pointed, some, strict=True) if s]
    every = np.arange(len(log.time))
    known = dict(zip(every.tolist(), _rows_of(log.arrays(every)), strict=True))
    newest = [None if s == e else known[e - 1] for s, e in zip(start.tolist(), end.tolist(), strict=True)]
    assert newest == [p or None for p in pointed]
