"""The point-in-time join: for each entity row, the feature row that was true and known at its instant.

A feature row has the instant since when it is true (`event`) and the instant at which it became known (`created`).
At `t` the answer is, among the rows of the key with `event <= t` and `created <= t`, the one with the latest event
(ties: the latest created, then the last in the source); it counts only while `event >= t - ttl`.

That is two inequalities, which an as-of join cannot search. Both hold from `known = max(event, created)` on, so the
rows are put in the order of `known` and a row is dropped where an earlier known one has a later event: it never is the
answer. What remains rises in both, and a single backward as-of join on `known` finds the answer exactly.

polars' `join_asof` does the search. Both hand-written on 1,000,000 labels by three views
(`benchmarks.features.offline`), it took 1.8 CPU s and 0.35 GB, DuckDB's ASOF JOIN 3.8 CPU s and 1.3 GB. DuckDB also has
to number the entity rows and sort the whole result to give back their order; here one column of numbers is put back.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import polars as pl

Unit = Literal["ns", "us"]
# No declared column can start like these.
KNOWN, EVENT, TOLD, ROW, TIME, KEY = "__known", "__event", "__told", "__row", "__time", "__key"


class Questions:
    """Entity rows put into time order once, to be asked of any number of views.

    Attributes:
        rows: The given columns, in the order of time, nulls last.
        time: The column of `rows` that holds the instants.
    """

    def __init__(self, entities: pl.DataFrame, time: str) -> None:
        self.time = time
        self._back: pl.Series | None = None
        self.rows = entities
        if not entities[time].is_sorted(nulls_last=True):
            order = entities[time].arg_sort(nulls_last=True)
            self.rows = entities[order]
            self._back = order.arg_sort()

    def as_given(self, found: pl.Series) -> pl.Series:
        """One value a row of `rows`, brought back into the order in which the entity rows were given."""
        return found if self._back is None else found.gather(self._back)


class Answers:
    """A view's rows in the order in which they became known, ready to be asked any number of times.

    Args:
        source: The feature rows: keys and timestamps, in any order.
        keys: Pairs (column of the entity rows, column of `source`); none means that all rows share one key.
        event: Source column, since when a row is true.
        created: Source column, when a row became known; None or a null stands for `event`.
        hide_late: False shows rows before they were known; `created` then only breaks ties.
        asked: Types of the entity rows' columns; a key that has another type than in `source` is compared as an
            integer where both are, else as a string.
        time: The entity rows' timestamp column.
    """

    def __init__(
        self,
        source: pl.DataFrame,
        keys: Sequence[tuple[str, str]],
        event: str,
        created: str | None,
        hide_late: bool,
        asked: pl.Schema,
        time: str,
    ) -> None:
        self._unit = _finest(asked[time], *(source.schema[c] for c in (event, created) if c))
        self._keys = [(mine, _common(asked[mine], source.schema[theirs])) for mine, theirs in keys]
        sides = [
            source[theirs].cast(kind).alias(f"{KEY}{i}")
            for i, ((_, theirs), (_, kind)) in enumerate(zip(keys, self._keys, strict=True))
        ]
        self._by = [s.name for s in sides]
        rows = pl.DataFrame([*sides, *_instants(source, event, created, self._unit, hide_late)])
        self._rows = _answers(rows, self._by)

    def rows_at(self, questions: Questions, ttl: timedelta | None) -> pl.Series:
        """Row numbers into the source, one a question in the given order; null where nothing is known.

        Args:
            questions: What is asked; its columns have the types that were announced.
            ttl: How long a row stays true, both ends included; None or zero for ever.
        """
        rows, time = questions.rows, _instant(questions.rows[questions.time], self._unit).alias(TIME)
        left = [rows[mine].cast(kind).alias(b) for b, (mine, kind) in zip(self._by, self._keys, strict=True)]
        # Of rows that became known at one instant the search takes the last, as it should: the answers are in order.
        found = pl.DataFrame([time, *left]).join_asof(
            self._rows, left_on=TIME, right_on=KNOWN, by=self._by or None, strategy="backward", check_sortedness=False
        )
        alive = pl.col(TIME).is_not_null()
        if ttl:
            alive &= pl.col(EVENT) >= pl.col(TIME) - _ticks(ttl, self._unit)
        return questions.as_given(found.select(pl.when(alive).then(ROW)).to_series())

    def changes(self, names: Sequence[str], start_us: int, end_us: int) -> pl.DataFrame:
        """The keys, under the given names, and the instants in [start, end] (`TIME`, us) since when an answer holds."""
        known = pl.col(KNOWN) // _ticks(timedelta(microseconds=1), self._unit)
        inside = self._rows.filter(known.is_between(start_us, end_us))
        return inside.select(*(pl.col(b).alias(n) for b, n in zip(self._by, names, strict=True)), known.alias(TIME))


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
        ttl: How long a row stays true, both ends included; None or zero for ever.
        hide_late: False shows rows before they were known; `created` then only breaks ties.

    Returns:
        Row numbers into `source`, one an entity row in the given order; null where nothing is known.
    """
    answers = Answers(source, keys, event, created, hide_late, entities.schema, time)
    return answers.rows_at(Questions(entities, time), ttl)


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
    unit = _finest(*(source.schema[c] for c in (event, created) if c))
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
    return [true, told.alias(TOLD), known, row]


def _answers(rows: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """The rows that answer some question, in the order in which they became known; the last of a tie is the answer."""
    present = rows.filter(pl.all_horizontal(pl.col(EVENT, *by).is_not_null()))
    ordered = present.sort(KNOWN, EVENT, TOLD, maintain_order=True).drop(TOLD)
    if ordered[EVENT].is_sorted():
        return ordered
    newest = pl.col(EVENT).cum_max()
    # Rows are in the order of `known`: what is older than a row known before it never is the answer.
    return ordered.filter(pl.col(EVENT) >= (newest.over(by) if by else newest))


def _common(asked: pl.DataType, stored: pl.DataType) -> pl.DataType:
    """The type in which a key of the entity rows is compared with one of the source."""
    if asked == stored:
        return stored
    return pl.Int64() if asked.is_integer() and stored.is_integer() else pl.String()


def _finest(*kinds: pl.DataType) -> Unit:
    # Rounding nanoseconds would show a row up to a microsecond early, so they are compared as they are.
    return "ns" if any(getattr(k, "time_unit", None) == "ns" for k in kinds) else "us"


def _instant(column: pl.Series, unit: Unit) -> pl.Series:
    """Ticks since 1970 UTC; a time without zone is UTC."""
    if not isinstance(column.dtype, pl.Datetime):
        column = column.cast(pl.Datetime(unit))
    return column.dt.cast_time_unit(unit).to_physical()


def _ticks(length: timedelta, unit: Unit) -> int:
    return length // timedelta(microseconds=1) * (1000 if unit == "ns" else 1)
