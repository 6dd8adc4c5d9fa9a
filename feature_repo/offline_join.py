"""A training set, batch by batch: entity rows joined to the features of several views, each at its own instant.

A view's rows are read once, without the row groups that no entity row can see, and put in order once. The entity rows
then go through in batches of their given order, so that a result larger than memory can be written as it comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView

from engagement.errors import EvergreenError
from engagement.index import to_us
from feature_repo import offline_files, pit

# Entity rows a batch. A smaller one saves no memory beside the views' rows, and each pays for hashing the views' keys.
BATCH_ROWS = 1_000_000


@dataclass(frozen=True)
class Wanted:
    """What a call asks of one view.

    Attributes:
        view: The view, as the call projects it.
        features: Names of the wanted columns, as the view calls them.
        full_names: Whether the result's columns are named `<view>__<feature>`.
        hide_late: Whether a row is invisible before it was known.
    """

    view: FeatureView
    features: list[str]
    full_names: bool
    hide_late: bool

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Pairs (column of the entity rows, column of the source)."""
        names = [c.name for c in self.view.entity_columns if c.name != DUMMY_ENTITY_ID]
        return [(self.view.projection.join_key_map.get(n, n), self.stored(n)) for n in names]

    @property
    def times(self) -> tuple[str, str | None]:
        """Source columns: since when a row is true, and when it became known."""
        source = self._source
        return self.stored(source.timestamp_field), self.stored(source.created_timestamp_column) or None

    @property
    def names(self) -> list[str]:
        """The result's column names."""
        prefix = f"{self.view.projection.name_alias or self.view.name}__" if self.full_names else ""
        return [prefix + f for f in self.features]

    @property
    def _source(self) -> DataSource:
        if self.view.batch_source is None:
            raise EvergreenError(f"the view {self.view.name} has no batch source", "Give it a FileSource")
        return self.view.batch_source

    def stored(self, name: str) -> str:
        """What the source calls a column of the view."""
        back = {new: old for old, new in self._source.field_mapping.items()}
        return back.get(name, name)

    def read(
        self, repo: Path | None, features: list[str], first: datetime | None, last: datetime | None
    ) -> pl.DataFrame:
        """Keys, timestamps and the given columns of the rows that somebody can see in [first, last]."""
        event, created = self.times
        columns = [*(k for _, k in self.keys), event, *([created] if created else []), *features]
        # An older row has expired for all; without it, no other row becomes an answer in its stead.
        oldest = first - self.view.ttl if first and self.view.ttl else None
        return offline_files.read(repo, self._source, columns, event, oldest, last)

    def answers(self, rows: pl.DataFrame, asked: pl.Schema, time: str) -> pit.Answers:
        """The rows in order, for entity rows of the given types."""
        event, created = self.times
        return pit.Answers(rows, self.keys, event, created, self.hide_late, asked, time)


class _ViewRows:
    """The rows of one view that the entity rows can see, in memory."""

    def __init__(
        self,
        repo: Path | None,
        wanted: Wanted,
        first: datetime | None,
        last: datetime | None,
        asked: pl.Schema,
        time: str,
    ) -> None:
        stored = [wanted.stored(f) for f in wanted.features]
        rows = wanted.read(repo, stored, first, last)
        self._ttl = wanted.view.ttl
        self._answers = wanted.answers(rows, asked, time)
        named = zip(stored, wanted.names, strict=True)
        self._values = rows.select(pl.col(f).alias(n) for f, n in named).rechunk()

    def at(self, questions: pit.Questions) -> pa.Table:
        """The wanted columns, one row an entity row; null where nothing is known."""
        found = self._answers.rows_at(questions, self._ttl)
        return offline_files.plain(self._values.select(pl.all().gather(found)))


def join(repo: Path | None, views: list[Wanted], entities: pd.DataFrame, time: str) -> Iterator[pa.Table]:
    """The entity rows with every wanted feature, in their given order, `BATCH_ROWS` at a time; at least one table.

    Args:
        repo: The repository's directory.
        views: What is wanted.
        entities: Entity rows; nothing but a slice of them is ever copied.
        time: Their timestamp column, aware and in UTC.
    """
    first, last = bounds(entities[time])
    if last:
        last += timedelta(microseconds=1)  # a nanosecond column reaches further than a datetime can say
    keys = dict.fromkeys(k for w in views for k, _ in w.keys)
    sides: dict[int, _ViewRows] = {}
    done = 0
    for batch in _batches(entities):
        done += len(batch)
        asked = pl.DataFrame(pl.from_arrow(batch.select([*keys, time])))
        questions = pit.Questions(asked, time)
        for i, wanted in enumerate(views):
            side = sides.pop(i, None) or _ViewRows(repo, wanted, first, last, asked.schema, time)
            for name, column in zip(wanted.names, side.at(questions).columns, strict=True):
                batch = batch.append_column(name, column)
            if done < len(entities):  # the last batch needs no view after it has asked it
                sides[i] = side
            del side
        yield batch


def changes(repo: Path | None, views: list[Wanted], start: datetime, end: datetime, time: str) -> pd.DataFrame:
    """Entity rows for a call that gives none: every key at each instant in [start, end] since when an answer holds.

    Returns:
        The keys and the instants (column `time`), in the order of time.

    Raises:
        EvergreenError: The views have different keys.
    """
    if len({frozenset(k for k, _ in w.keys) for w in views}) > 1:
        raise EvergreenError("the views have different keys, so that no entity rows follow from them", "Pass entity_df")
    found = []
    for wanted in views:
        rows = wanted.read(repo, [], None, end)
        kinds = {theirs: rows.schema[mine] for theirs, mine in wanted.keys}
        answers = wanted.answers(rows, pl.Schema({**kinds, time: pl.Datetime("us", "UTC")}), time)
        found.append(answers.changes([k for k, _ in wanted.keys], to_us(start), to_us(end)).rename({pit.TIME: time}))
    keys = [k for k, _ in views[0].keys]
    every = pl.concat([f.select(*keys, time) for f in found]).unique().sort(time, *keys)
    return every.with_columns(pl.col(time).cast(pl.Datetime("us", "UTC"))).to_pandas()


def bounds(times: pd.Series) -> tuple[datetime | None, datetime | None]:
    """First and last instant, rounded down to microseconds; None where there is no instant."""
    if not times.notna().any():
        return None, None
    return times.min().to_pydatetime(warn=False), times.max().to_pydatetime(warn=False)


def _batches(entities: pd.DataFrame) -> Iterator[pa.Table]:
    # Types are those of all rows: a batch of nulls alone would have none.
    schema = pa.Schema.from_pandas(entities, preserve_index=False) if len(entities) > BATCH_ROWS else None
    for start in range(0, max(len(entities), 1), BATCH_ROWS):
        part = entities.iloc[start : start + BATCH_ROWS]
        yield pa.Table.from_pandas(part, schema=schema, preserve_index=False)
