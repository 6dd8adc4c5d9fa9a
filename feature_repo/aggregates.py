"""Trailing counts and smoothed rates of users, items, categories and pairs of them, as of whole hours (UTC).

The row of tick `T` counts the rows of the log that were shown in [T - w, T) and known before T, for each window `w`.
In whole hours: a row shown in hour `s` and known in hour `k` enters at tick max(s, k) + 1 and leaves at s + w + 1; one
that became known too late never enters. The numbers at a tick are the sums of all entries and leavings up to it, in
integers, so that they are the same wherever the summation began.

An entity has a row at each tick at which something entered or left a window, and one at each midnight at which its
longest window is not empty. A request therefore finds numbers that are at most an hour old in what they know, in a row
that is at most a day old; the last row has zeros and expires.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from engagement.contract import TIMESTAMP
from feature_repo.encode import HOUR_US
from feature_repo.features import LONGEST, RATE_PRIOR_WEIGHT, WINDOWS, Statistic

DAY_HOURS = 24
LOOK_BACK_DAYS = -(-(WINDOWS[LONGEST] + 1) // DAY_HOURS)  # what leaves at a day's first tick was shown so long before
Cell = tuple[str | None, str]  # (action or None for impressions, window)


@dataclass(frozen=True)
class Running:
    """The numbers of entities after each change; n rows, sorted by entity and tick.

    Attributes:
        entity: (n,) int64 codes.
        tick: (n,) int64 hours; the tick before the first one holds what had entered before.
        values: (n,) int64 by cell.
    """

    entity: np.ndarray
    tick: np.ndarray
    values: dict[Cell, np.ndarray]


def of_everyone(counts: pl.DataFrame, stats: tuple[Statistic, ...], first: int, last: int) -> Running:
    """The numbers of all rows together, from which the priors follow; arguments as for `daily`."""
    return _running(counts.with_columns(pl.lit(0, pl.Int64).alias(":entity")), stats, first, last)


def daily(
    counts: pl.DataFrame,
    keys: tuple[str, ...],
    stats: tuple[Statistic, ...],
    everyone: Running,
    first: int,
    last: int,
) -> Iterator[tuple[int, pa.Table]]:
    """The rows of one view, by day.

    Args:
        counts: Counts by hour (`Partials.counts`), with the columns `keys`; all those shown within `LOOK_BACK_DAYS`
            before `first` must be among them. Rows with a null key are left out.
        keys: Join keys of the view.
        stats: The statistics, in column order.
        everyone: `of_everyone` for the same range.
        first: First tick, hours since 1970; a midnight.
        last: Last tick.

    Yields:
        Day number since 1970 and its rows: keys, event_timestamp and created_timestamp (both the tick) and one double a
        statistic, sorted by tick and keys. Every day of the range once.
    """
    coded, names = _coded(counts, keys)
    found = _running(coded, stats, first, last)
    source, tick = _emitted(found, first, last)
    entity = found.entity[source]
    # The latest row of everyone at or before the tick; there is one wherever an entity has one.
    total = np.searchsorted(everyone.tick, tick, side="right") - 1
    columns: dict[str, pa.Array] = {}
    for key, texts in reversed(names.items()):
        columns[key], entity = texts.take(pa.array(entity % len(texts))), entity // len(texts)
    at = pa.array(tick * HOUR_US).cast(TIMESTAMP)
    columns |= {"event_timestamp": at, "created_timestamp": at}
    for stat in stats:
        columns[stat.name] = pa.array(_value(stat, found, source, everyone, total))
    table = pa.table(columns)
    days = np.arange(first // DAY_HOURS, last // DAY_HOURS + 1)
    edges = np.searchsorted(tick, np.append(days, days[-1] + 1) * DAY_HOURS)
    for day, start, end in zip(days, edges[:-1], edges[1:], strict=True):
        yield int(day), table.slice(start, end - start)


def _running(counts: pl.DataFrame, stats: tuple[Statistic, ...], first: int, last: int) -> Running:
    """Cumulative sums of what enters and leaves the windows; `counts` with the codes of the entities as `:entity`."""
    enter = pl.max_horizontal(":shown", ":known") + 1
    longest = pl.col(":shown") + WINDOWS[LONGEST] + 1
    matters = (enter < longest) & (longest >= first) & (enter <= last)
    grouped = counts.filter(matters).group_by(":entity", ":shown", enter.alias(":enter")).agg(pl.col("^n:.*$").sum())
    entity, shown, entered = (grouped[n].to_numpy() for n in (":entity", ":shown", ":enter"))
    stride, before = last - first + 2, first - 1
    inside: dict[str, np.ndarray] = {}  # by window: which groups count in it at some tick from `before` on
    leaving: dict[str, np.ndarray] = {}  # which of them leave it at a tick of the range
    keys = [entity * stride + np.maximum(entered, before) - before]
    for window, hours in WINDOWS.items():
        gone = shown + hours + 1
        inside[window] = np.flatnonzero((entered < gone) & (gone >= first))
        leaving[window] = inside[window][gone[inside[window]] <= last]
        keys.append((entity * stride + gone - before)[leaving[window]])
    key, where = np.unique(np.concatenate(keys), return_inverse=True)
    came, *left = np.split(where, np.cumsum([len(k) for k in keys])[:-1])
    place = dict(zip(WINDOWS, left, strict=True))
    owner = key // stride
    start = np.searchsorted(owner, owner)  # the entity's first row
    values = {}
    for action, window in {c for s in stats for c in ((s.action, s.window), (None, s.window))}:
        n = grouped[f"n:{action or ''}"].to_numpy()
        # Sums of counts are exact in float64 up to 2^53.
        change = np.bincount(came[inside[window]], n[inside[window]], len(key))
        change -= np.bincount(place[window], n[leaving[window]], len(key))
        total = np.concatenate([[0], np.cumsum(change.astype(np.int64))])
        values[action, window] = total[1:] - total[start]
    return Running(owner, key % stride + before, values)


def _emitted(found: Running, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of `found` are written at which tick, (m,) each, in the order of tick and entity."""
    tick, n = found.tick, len(found.tick)
    until = np.append(tick[1:], last + 1)
    until[:-1][found.entity[1:] != found.entity[:-1]] = last + 1
    midnights = np.maximum((until - 1) // DAY_HOURS - tick // DAY_HOURS, 0)  # those in (tick, until)
    midnights[found.values[None, LONGEST] == 0] = 0
    again = np.repeat(np.arange(n), midnights)
    number = np.arange(len(again)) - np.repeat(np.cumsum(midnights) - midnights, midnights)
    changed = np.flatnonzero(tick >= first)
    source = np.concatenate([changed, again])
    at = np.concatenate([tick[changed], (tick[again] // DAY_HOURS + 1 + number) * DAY_HOURS])
    order = np.argsort((at - first) * (found.entity.max(initial=0) + 1) + found.entity[source])
    return source[order], at[order]


def _value(stat: Statistic, found: Running, source: np.ndarray, everyone: Running, total: np.ndarray) -> np.ndarray:
    count = found.values[stat.action, stat.window][source].astype(np.float64)
    if not stat.rate:
        return count
    shown = found.values[None, stat.window][source]
    all_shown, all_count = (everyone.values[a, stat.window] for a in (None, stat.action))
    prior = all_count / np.maximum(all_shown, 1)  # nothing shown: no count either
    return (count + RATE_PRIOR_WEIGHT * prior[total]) / (shown + RATE_PRIOR_WEIGHT)


def _coded(counts: pl.DataFrame, keys: tuple[str, ...]) -> tuple[pl.DataFrame, dict[str, pa.Array]]:
    """Rows without a null key, with one `:entity` code in the order of the keys; and each key's texts, ascending."""
    rows = counts.drop_nulls(list(keys))
    code, names = pl.lit(0, pl.Int64), {}
    for key in keys:
        texts = rows[key].unique().sort()
        names[key] = texts.to_arrow().cast(pa.string())
        code = code * len(texts) + pl.col(key).cast(pl.Enum(texts)).to_physical().cast(pl.Int64)
    return rows.with_columns(code.alias(":entity")), names
