"""Trailing numbers by cumulative sums against a naive loop over ticks and rows."""

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.aggregates import daily, of_everyone
from feature_repo.encode import HOUR_US
from feature_repo.features import RATE_PRIOR_WEIGHT, WINDOWS, statistics

FIRST_DAY = 100
STATS = statistics(("save", "click"), "save")
KEYS = ("user_id", "category")


def _counts(rows):
    """(user, category, hour shown, hours until known, save, click), one row each."""
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 6
    names = ["user_id", "category", ":shown", ":late", "n:save", "n:click"]
    types = [pl.String, pl.String, *[pl.Int64] * 4]
    frame = pl.DataFrame(dict(zip(names, columns, strict=True)), schema=dict(zip(names, types, strict=True)))
    known = pl.col(":shown") + pl.col(":late")
    return frame.select(*KEYS, ":shown", known.alias(":known"), pl.lit(1, pl.Int64).alias("n:"), "n:save", "n:click")


def _days(rows, keys, first_day, last_day):
    counts, first, last = _counts(rows), first_day * 24, last_day * 24 + 23
    return dict(daily(counts, keys, STATS, of_everyone(counts, STATS, first, last), first, last))


def _inside(row, tick, hours):
    return tick - hours <= row[2] < tick and row[2] + row[3] < tick


def _naive(rows, keys, tick):
    """Rows of one tick, from the definition; `row` as in `_counts`."""
    found = {}
    for key in {tuple(r[KEYS.index(k)] for k in keys) for r in rows}:
        if None in key:
            continue
        mine = [r for r in rows if tuple(r[KEYS.index(k)] for k in keys) == key]
        moved = any(_inside(r, tick, h) != _inside(r, tick - 1, h) for r in mine for h in WINDOWS.values())
        if moved or (tick % 24 == 0 and any(_inside(r, tick, WINDOWS["30d"]) for r in mine)):
            found[key] = [_number(s, mine, rows, tick) for s in STATS]
    return dict(sorted(found.items()))


def _number(stat, mine, everyone, tick):
    def sums(rows):
        inside = [r for r in rows if _inside(r, tick, WINDOWS[stat.window])]
        return len(inside), sum({None: 1, "save": r[4], "click": r[5]}[stat.action] for r in inside)

    (shown, count), (all_shown, all_count) = sums(mine), sums(everyone)
    if not stat.rate:
        return count
    prior = all_count / all_shown if all_shown else 0.0
    return (count + RATE_PRIOR_WEIGHT * prior) / (shown + RATE_PRIOR_WEIGHT)


_HOURS = st.one_of(st.integers(-800, 60), st.integers(-30, 40), st.sampled_from([-721, -720, -168, -24, -1, 0, 1, 47]))
_ROWS = st.tuples(
    st.sampled_from(["u1", "u2", "u10"]),
    st.sampled_from(["food", "art", None]),
    _HOURS.map(lambda h: FIRST_DAY * 24 + h),
    st.one_of(st.integers(-2, 3), st.sampled_from([23, 24, 25, 100, 167, 719, 720, 800])),
    st.integers(0, 1),
    st.integers(0, 1),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_ROWS, max_size=8), st.sampled_from([("user_id",), ("category",), KEYS]))
def test_cumulative_sums_equal_a_loop_over_ticks_and_rows(rows, keys):
    days = _days(rows, keys, FIRST_DAY, FIRST_DAY + 1)
    got = pa.concat_tables(days.values()).to_pylist()
    want = [
        (tick, key, numbers)
        for tick in range(FIRST_DAY * 24, FIRST_DAY * 24 + 48)
        for key, numbers in _naive(rows, keys, tick).items()
    ]
    assert [(r["event_timestamp"].timestamp(), *(r[k] for k in keys)) for r in got] == [
        (tick * 3600.0, *key) for tick, key, _ in want
    ]
    for row, (_, _, numbers) in zip(got, want, strict=True):
        assert [row[s.name] for s in STATS] == pytest.approx(numbers, rel=1e-12)
        assert row["created_timestamp"] == row["event_timestamp"]


@settings(max_examples=60, deadline=None)
@given(st.lists(_ROWS, max_size=30), st.sampled_from([("user_id",), ("category",), KEYS]))
def test_a_day_alone_gives_what_it_gives_within_a_longer_range(rows, keys):
    together = _days(rows, keys, FIRST_DAY - 3, FIRST_DAY + 3)
    assert list(together) == list(range(FIRST_DAY - 3, FIRST_DAY + 4))
    for day, table in together.items():
        assert _days(rows, keys, day, day)[day].equals(table)


def test_a_day_ends_where_the_range_does():
    rows = [("u1", "art", FIRST_DAY * 24 + h, 0, 0, 0) for h in (1, 5)]
    counts, first = _counts(rows), FIRST_DAY * 24
    ((_, table),) = daily(counts, ("user_id",), STATS, of_everyone(counts, STATS, first, first + 3), first, first + 3)
    assert [t.timestamp() * 1e6 for t in table["event_timestamp"].to_pylist()] == [
        (first + h) * HOUR_US for h in (2, 3)
    ]


def test_smoothed_rates_lean_towards_the_global_rate():
    seldom, often = ("seldom", None, FIRST_DAY * 24 - 1, 0, 1, 0), ("often", None, FIRST_DAY * 24 - 1, 0)
    rows = [seldom, *[(*often, 0, 0)] * 99, *[(*often, 1, 0)] * 100]
    day = _days(rows, ("user_id",), FIRST_DAY, FIRST_DAY)[FIRST_DAY]
    rate = dict(zip(day["user_id"].to_pylist(), day["rate_save_30d"].to_pylist(), strict=False))
    prior, m = 101 / 200, RATE_PRIOR_WEIGHT
    assert rate["seldom"] == pytest.approx((1 + m * prior) / (1 + m))
    assert rate["often"] == pytest.approx((100 + m * prior) / (199 + m))
