"""The point-in-time join: for each entity row, the feature row that was true and known at its instant.

A feature row has the instant since when it is true (`event`) and the instant at which it became known (`created`).
At `t` the answer is, among the rows of the key with `event <= t` and `created <= t`, the one with the latest event
(ties: the latest created, then the last in the source); it counts only while `event >= t - ttl`.

That is two inequalities, which an as-of join cannot search. Both hold from `known = max(event, created)` on, so the
rows are put in the order of `known` and a row is dropped where an earlier known one has a later event: it never is the
answer. What remains rises in both, and a single backward as-of join on `known` finds the answer exactly.

polars' `join_asof` does the search: on 100,000 rows by three views it took 0.6 s and DuckDB's ASOF JOIN 0.9 s.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import polars as pl

Unit = Literal["ns", "us"]
KNOWN, EVENT, ROW, TIME = "__known", "__event", "__row", "__time"  # no declared column can start like this


def match(
    entities: pl.DataFrame,
    time: str,
    source: pl.DataFrame,
    keys: Sequence[tuple[str, str]],
    event: str,
    created: str | None,
    ttl: timedelta | None,
    hide_late: bool = True,
) -> pl.Series:
    """Find the source row that answers each entity row.

    Args:
        entities: One row a question; duplicates and nulls are welcome, and order does not matter.
        time: Its timestamp column, `t`.
        source: The feature rows: keys and timestamps, in any order.
        keys: Pairs (column of `entities`, column of `source`); none means that all rows share one key.
        event: Source column, since when a row is true.
        created: Source column, when a row became known; None or a null stands for `event`.
        hide_late: False shows rows before they were known; `created` then only breaks ties.
        ttl: How long a row stays true, both ends included; None or zero for ever.

    Returns:
        Row numbers into `source`, one an entity row in the given order; null where nothing is known.
    """
    left, right = _same_types(entities, source, keys)
    by = left.columns
    unit = _finest(entities[time], *(source[c] for c in (event, created) if c))
    answers = _answers(right.with_columns(_instants(source, event, created, unit, hide_late)), by)
    questions = left.with_columns(_instant(entities[time], unit).alias(TIME)).with_row_index(ROW + "_of_entity")
    found = questions.sort(TIME, nulls_last=True).join_asof(
        answers, left_on=TIME, right_on=KNOWN, by=by, strategy="backward", check_sortedness=False
    )
    if ttl:
        alive = pl.col(EVENT) >= pl.col(TIME) - _ticks(ttl, unit)
        found = found.with_columns(pl.when(alive).then(ROW).alias(ROW))
    # A null instant or key asks nothing; a join could still match nulls with each other.
    asked = pl.all_horizontal(pl.col(TIME, *by).is_not_null())
    return found.with_columns(pl.when(asked).then(ROW)).sort(ROW + "_of_entity")[ROW]


def latest(
    source: pl.DataFrame,
    keys: Sequence[str],
    event: str,
    created: str | None,
    start_us: int,
    end_us: int,
    hide_late: bool = True,
) -> pl.Series:
    """Find each key's answer at `end_us` that became known at or after `start_us`.

    A row that arrives late but is older than what is known already is no answer, so that feeding successive
    intervals to an online store never replaces a newer value by an older one.

    Returns:
        Row numbers into `source`, ascending.
    """
    unit = _finest(*(source[c] for c in (event, created) if c))
    scale = _ticks(timedelta(microseconds=1), unit)
    rows = pl.DataFrame([*(source[k] for k in keys), *_instants(source, event, created, unit, hide_late)])
    answers = _answers(rows.filter(pl.col(KNOWN) <= end_us * scale), list(keys))
    last = answers.unique(list(keys), keep="last", maintain_order=True) if keys else answers.tail(1)
    return last.filter(pl.col(KNOWN) >= start_us * scale)[ROW].sort()


def _instants(source: pl.DataFrame, event: str, created: str | None, unit: Unit, hide_late: bool) -> list[pl.Series]:
    true = _instant(source[event], unit).alias(EVENT)
    told = _instant(source[created], unit).fill_null(true) if created else true
    known = pl.select(pl.max_horizontal(true, told) if hide_late else true).to_series().alias(KNOWN)
    row = pl.select(pl.int_range(len(source), dtype=pl.Int64)).to_series().alias(ROW)
    return [true, told.alias("__told"), known, row]


def _answers(rows: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """The rows that answer some question, in the order in which they became known; one a key and instant."""
    present = rows.filter(pl.all_horizontal(pl.col(EVENT, *by).is_not_null()))
    ordered = present.sort(KNOWN, EVENT, "__told", ROW)
    newest = pl.col(EVENT).cum_max()
    # Rows are in the order of `known`: what is older than a row known before it never is the answer.
    rising = ordered.filter(pl.col(EVENT) >= (newest.over(by) if by else newest))
    return rising.unique([*by, KNOWN], keep="last", maintain_order=True).drop("__told")


def _same_types(
    entities: pl.DataFrame, source: pl.DataFrame, keys: Sequence[tuple[str, str]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Key columns of both sides under common names and types; one constant key where there is none."""
    if not keys:
        one = [pl.select(__key0=pl.zeros(len(side), pl.Int8)) for side in (entities, source)]
        return one[0], one[1]
    left, right = {}, {}
    for i, (mine, theirs) in enumerate(keys):
        a, b = entities[mine], source[theirs]
        if a.dtype != b.dtype:
            common = pl.Int64 if a.dtype.is_integer() and b.dtype.is_integer() else pl.String
            a, b = a.cast(common), b.cast(common)
        left[f"__key{i}"], right[f"__key{i}"] = a, b
    return pl.DataFrame(left), pl.DataFrame(right)


def _finest(*columns: pl.Series) -> Unit:
    # Rounding nanoseconds would show a row up to a microsecond early, so they are compared as they are.
    return "ns" if any(getattr(c.dtype, "time_unit", None) == "ns" for c in columns) else "us"


def _instant(column: pl.Series, unit: Unit) -> pl.Series:
    """Ticks since 1970 UTC; a time without zone is UTC."""
    if not isinstance(column.dtype, pl.Datetime):
        column = column.cast(pl.Datetime(unit))
    return column.dt.cast_time_unit(unit).to_physical()


def _ticks(length: timedelta, unit: Unit) -> int:
    return length // timedelta(microseconds=1) * (1000 if unit == "ns" else 1)
