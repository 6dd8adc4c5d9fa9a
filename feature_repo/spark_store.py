"""The offline store on Spark: the same join, the same files and the same registry, for data beyond one machine.

`feature_store.yaml` names it in place of the laptop's store; entities, views and sources stay as they are declared:

    offline_store: {type: feature_repo.spark_store.SparkAsofOfflineStore}
    batch_engine: {type: spark.engine}

Where Spark runs, and with what, is Spark's own configuration (`spark-defaults.conf` or `PYSPARK_SUBMIT_ARGS`).

Feast's own `spark` store (0.67) joins by inequality and then by a name made of the bare key columns and the instant.
So the keys ("ab", "c") and ("a", "bc") answer for each other, rows that share key, event and created come back once
each, a row without `created` is lost, `materialize` shows late rows early, and the order of the entity rows is gone.

Here the entity rows and the feature rows of a view go through one window, in the order in which they are asked and
became known: the answer to an entity row is the greatest (event, created, place in the source) so far, which is the
definition in `pit`. A view costs one shuffle, and memory does not grow with the length of a key's history.
"""

import os
import re
import sys
from datetime import datetime
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from feast import utils
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.contrib.spark_offline_store.spark import SparkRetrievalJob
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from engagement.errors import EvergreenError
from feature_repo.offline_join import Wanted
from feature_repo.offline_store import AsofOfflineStore, time_column

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # or Spark starts its workers with whatever python3 is
ASKED, AT, ANSWER, ROW = "__asked", "__at", "__answer", "__row"  # no declared column can start like this


class SparkAsofOfflineStoreConfig(FeastConfigBaseModel):
    """Settings of the store in `feature_store.yaml`; `type` is the store's class, by its full name."""

    type: Literal["feature_repo.spark_store.SparkAsofOfflineStore"] = "feature_repo.spark_store.SparkAsofOfflineStore"


class FrameRetrievalJob(SparkRetrievalJob):
    """A Spark frame that is computed when its result is asked for; Feast's Spark engine takes it as it is."""

    def __init__(self, frame: DataFrame, config: RepoConfig, full_feature_names: bool = False, **options: Any) -> None:
        super().__init__(frame.sparkSession, "", full_feature_names, config, **options)
        self._frame = frame

    def to_spark_df(self) -> DataFrame:
        """The frame itself."""
        return self._frame

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._frame.toArrow()  # by way of pandas, integers with nulls would become floats

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal().to_pandas()


class SparkAsofOfflineStore(AsofOfflineStore):
    """Reads by Spark; rows are never visible before their `created_timestamp`. Writes are those of the laptop."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = True,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        **_: Any,
    ) -> RetrievalJob:
        """Join each view's features to the entity rows, each at its own instant.

        Raises:
            EvergreenError: The entity rows are no DataFrame, or a source has no files.
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise EvergreenError("the offline store joins to a DataFrame of entity rows only", "Pass one as entity_df")
        on_demand = utils._get_requested_on_demand_feature_views(feature_refs, project, registry)
        wanted, _on_demand = utils._get_requested_feature_views_to_features_dict(feature_refs, feature_views, on_demand)
        time = time_column(entity_df, [Wanted(v, f, full_feature_names, hide_late=True) for v, f in wanted.items()])
        # Spark counts microseconds; a nanosecond after an instant shows what the instant shows.
        instants = pd.to_datetime(entity_df[time], utc=True).dt.floor("us").dt.as_unit("us")
        numbered = entity_df.assign(**{time: instants, ROW: range(len(entity_df))})
        rows = _session().createDataFrame(pa.Table.from_pandas(numbered, preserve_index=False))
        for view, features in wanted.items():
            prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
            rows = _join_view(config, view, {prefix + f: f for f in features}, rows, time)
        return FrameRetrievalJob(
            rows.orderBy(ROW).drop(ROW),
            config,
            full_feature_names,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[c for c in entity_df.columns if c != time],
                min_event_timestamp=instants.min().to_pydatetime(),
                max_event_timestamp=instants.max().to_pydatetime(),
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Each key's answer at `end_date`, if it became known in [start_date, end_date]: what `materialize` writes."""
        source = _read(config, data_source)
        columns = _distinct(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)
        event, told = _instants(timestamp_field, created_timestamp_column)
        known = F.greatest(event, told)
        answer = _answer(event, told, {"known": known, **{c: _column(c) for c in columns}})
        rows = (
            _present(source, event, join_key_columns)
            .where(known <= F.lit(end_date))
            .select(answer.alias(ANSWER), *(_column(k).alias(f"__key{i}") for i, k in enumerate(join_key_columns)))
        )
        last = rows.groupBy(*(f"__key{i}" for i in range(len(join_key_columns)))).agg(F.max(ANSWER).alias(ANSWER))
        found = last.where(F.col(f"{ANSWER}.known") >= F.lit(start_date)).select(
            *(F.col(ANSWER)[c].alias(c) for c in columns)
        )
        return FrameRetrievalJob(_named(found, data_source, join_key_columns), config)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row whose event lies in [start_date, end_date]; an end that is not given is open."""
        event, _told = _instants(timestamp_field, None)
        rows = _read(config, data_source)
        if start_date is not None:
            rows = rows.where(event >= F.lit(start_date))
        if end_date is not None:
            rows = rows.where(event <= F.lit(end_date))
        columns = _distinct(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)
        return FrameRetrievalJob(_named(rows.select(*map(_column, columns)), data_source, join_key_columns), config)


def _join_view(
    config: RepoConfig, view: FeatureView, features: dict[str, str], rows: DataFrame, time: str
) -> DataFrame:
    """The rows with the features of one view added.

    Args:
        config: The repository's.
        view: Whose features.
        features: The view's feature for each new column.
        rows: The entity rows.
        time: Their timestamp column.
    """
    source = view.batch_source
    assert source is not None
    table = _read(config, source)
    stored = {new: old for old, new in source.field_mapping.items()}
    keys = [(theirs, stored.get(mine, mine)) for theirs, mine in _keys(view)]
    by = [f"__key{i}" for i in range(len(keys))]
    event, told = _instants(
        stored.get(source.timestamp_field, source.timestamp_field),
        stored.get(source.created_timestamp_column, source.created_timestamp_column),
    )
    values = {f"f{i}": _column(stored.get(f, f)) for i, f in enumerate(features.values())}
    answers = _present(table, event, [mine for _, mine in keys]).select(
        F.greatest(event, told).alias(AT),
        _answer(event, told, values).alias(ANSWER),
        *(_column(mine).alias(k) for k, (_, mine) in zip(by, keys, strict=True)),
    )
    asked = rows.select(
        F.struct("*").alias(ASKED),
        _column(time).alias(AT),
        *(_column(theirs).cast(answers.schema[k].dataType).alias(k) for k, (theirs, _) in zip(by, keys, strict=True)),
    )
    # The frame takes in all rows of its last instant, so an answer counts from the very instant that it is known.
    sofar = Window.partitionBy(*by).orderBy(AT).rangeBetween(Window.unboundedPreceding, Window.currentRow)
    found = asked.unionByName(answers, allowMissingColumns=True).withColumn(ANSWER, F.max(ANSWER).over(sofar))
    alive = F.col(f"{ANSWER}.event") >= F.col(AT) - F.lit(view.ttl) if view.ttl else F.lit(True)
    return found.where(F.col(ASKED).isNotNull()).select(
        f"{ASKED}.*",
        *(F.when(alive, F.col(f"{ANSWER}.{v}")).alias(n) for n, v in zip(features, values, strict=True)),
    )


def _answer(event: Column, told: Column, values: dict[str, Column]) -> Column:
    """A feature row that compares as `pit` orders answers: by event, then created, then its place in the source."""
    place = [F.col("_metadata.file_path"), F.col("_metadata.row_index")]
    return F.struct(event.alias("event"), told.alias("told"), *place, *(c.alias(n) for n, c in values.items()))


def _instants(event: str, created: str | None) -> tuple[Column, Column]:
    """Since when a row is true, and when it became known; a time without zone is UTC."""
    true = _column(event).cast("timestamp")
    return true, F.coalesce(_column(created).cast("timestamp"), true) if created else true


def _present(rows: DataFrame, event: Column, keys: list[str]) -> DataFrame:
    """Rows that can answer at all: with an instant and a whole key."""
    for column in (event, *map(_column, keys)):
        rows = rows.where(column.isNotNull())
    return rows


def _read(config: RepoConfig, source: DataSource) -> DataFrame:
    """The rows of a Parquet source: a file, a directory or a pattern in the last part."""
    if not isinstance(source, FileSource):
        raise EvergreenError(f"the offline store reads Parquet files, not {type(source).__name__}", "Use a FileSource")
    path = FileSource.get_uri_for_file_path(config.repo_path, source.path)
    directory, _, name = path.rpartition("/") if path.endswith(".parquet") else (path, "", "*.parquet")
    literal = re.sub(r"([\\{}\[\]*?])", r"\\\1", directory)  # a home is free to have brackets in its name
    try:
        return _session().read.option("pathGlobFilter", name).parquet(literal)
    except AnalysisException as error:
        raise EvergreenError(f"the feature view source {path} has no files", "Build the features again") from error


def _session() -> SparkSession:
    session = SparkSession.getActiveSession() or SparkSession.builder.appName("evergreen-features").getOrCreate()
    session.conf.set("spark.sql.session.timeZone", "UTC")
    return session


def _keys(view: FeatureView) -> list[tuple[str, str]]:
    """Pairs (column of the entity rows, column of the view)."""
    names = [c.name for c in view.entity_columns if c.name != DUMMY_ENTITY_ID]
    return [(view.projection.join_key_map.get(n, n), n) for n in names]


def _named(rows: DataFrame, source: DataSource, keys: list[str]) -> DataFrame:
    """Columns under the names that the views give them; rows of a view without entity under Feast's made-up key."""
    named = rows.select(*(_column(c).alias(source.field_mapping.get(c, c)) for c in rows.columns))
    return named if keys else named.withColumn(DUMMY_ENTITY_ID, F.lit(DUMMY_ENTITY_VAL))


def _distinct(keys: list[str], features: list[str], event: str, created: str | None) -> list[str]:
    return list(dict.fromkeys([*keys, *features, event, *([created] if created else [])]))


def _column(name: str) -> Column:
    return F.col(f"`{name}`")
