"""Evergreen's Feast offline store: exact point-in-time joins over Parquet files.

Feast's own file store drops candidates that share a user and an instant, and rows whose features have expired; this
one keeps every entity row, in order, and reads exactly what `pit` defines. `feature_store.yaml` names it:

    offline_store: {type: feature_repo.offline_store.AsofOfflineStore}

Sources are Parquet: a file, a directory or a pattern (`FileSource` with `ParquetFormat()`).
"""

import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from feast import utils
from feast.data_source import DataSource
from feast.errors import FeastEntityDFMissingColumnsError
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from engagement.errors import EvergreenError
from engagement.index import to_us
from feature_repo import offline_files, pit
from feature_repo.offline_join import Wanted, bounds, changes, join


class AsofOfflineStoreConfig(FeastConfigBaseModel):
    """Settings of the store in `feature_store.yaml`.

    Attributes:
        type: The store's class, by its full name.
        hide_late_rows: Whether a row is invisible before its `created_timestamp`. True for training sets that hold only
            what serving could have known; with False, as in Feast's own stores, the call's
            `filter_by_created_timestamp` decides, and it only breaks ties in `materialize`.
    """

    type: Literal["feature_repo.offline_store.AsofOfflineStore"] = "feature_repo.offline_store.AsofOfflineStore"
    hide_late_rows: bool = True


class AsofRetrievalJob(RetrievalJob):
    """A join that runs when its result is asked for.

    Args:
        run: Computes the result, table after table.
        repo: The repository's directory.
    """

    def __init__(
        self,
        run: Callable[[], Iterator[pa.Table]],
        repo: Path | None,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._run = run
        self._repo = repo
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        """Whether columns are named `<view>__<feature>`."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Views that Feast computes from the joined columns."""
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for."""
        return self._metadata

    def batches(self) -> Iterator[pa.Table]:
        """The rows of `to_arrow()` in their order, a part at a time: for results that do not fit into memory.

        On-demand views see all rows at once, as Feast has it; a result that has some comes in one part.
        """
        if self._on_demand_feature_views:
            yield self.to_arrow()
        else:
            yield from self._run()

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return pa.concat_tables(self._run())

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal().to_pandas()

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as Parquet at the place of a saved dataset, without ever holding all of it.

        Raises:
            SavedDatasetLocationAlreadyExists: There is something already, and it may not be replaced.
        """
        assert isinstance(storage, SavedDatasetFileStorage)
        offline_files.save_dataset(self._repo, storage.file_options.uri, self.batches(), allow_overwrite)

    def supports_remote_storage_export(self) -> bool:
        """Results stay on this machine."""
        return False


class AsofOfflineStore(OfflineStore):
    """Feast's offline store interface over Parquet, by way of `pit`."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Join each view's features to the entity rows, each at its own instant.

        With `entity_df=None` there is an entity row for every key and each instant in [`start_date`, `end_date`] since
        when one of its answers holds; the views' keys must then be the same. The end is now by default, the start the
        longest time to live before it, or else 30 days, as in Feast's stores.

        Raises:
            EvergreenError: The entity rows are no DataFrame, or none were given and the views' keys differ.
            FeastEntityDFMissingColumnsError: The entity rows lack a key.
        """
        if isinstance(entity_df, str):
            raise EvergreenError("the offline store joins to a DataFrame of entity rows only", "Pass one as entity_df")
        on_demand = utils._get_requested_on_demand_feature_views(feature_refs, project, registry)
        by_view, _on_demand = utils._get_requested_feature_views_to_features_dict(
            feature_refs, feature_views, on_demand
        )
        hide_late = filter_by_created_timestamp or config.offline_store.hide_late_rows
        views = [Wanted(v, features, full_feature_names, hide_late) for v, features in by_view.items()]
        if entity_df is None:
            span = utils.compute_non_entity_date_range(feature_views, start_date, end_date)
            entity_df = changes(config.repo_path, views, *span, offline_utils.DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL)
        time = time_column(entity_df, views)
        rows = _in_utc(entity_df, time)
        first, last = bounds(rows[time])
        return AsofRetrievalJob(
            lambda: join(config.repo_path, views, rows, time),
            config.repo_path,
            full_feature_names,
            OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            RetrievalMetadata(
                features=feature_refs,
                keys=[c for c in rows.columns if c != time],
                min_event_timestamp=first,
                max_event_timestamp=last,
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
        columns = _columns(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)

        def run() -> Iterator[pa.Table]:
            rows = offline_files.read(config.repo_path, data_source, columns, timestamp_field, end=end_date)
            found = pit.latest(
                rows,
                join_key_columns,
                timestamp_field,
                created_timestamp_column,
                to_us(start_date),
                to_us(end_date),
                config.offline_store.hide_late_rows,
            )
            yield _with_dummy(rows.select(pl.all().gather(found)), join_key_columns)

        return AsofRetrievalJob(run, config.repo_path)

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
        columns = _columns(join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column)

        def run() -> Iterator[pa.Table]:
            rows = offline_files.read(config.repo_path, data_source, columns, timestamp_field, start_date, end_date)
            yield _with_dummy(rows, join_key_columns)

        return AsofRetrievalJob(run, config.repo_path)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Add rows to a view's source: as one more file of a directory or pattern; a single file is written anew.

        Raises:
            ValueError: The columns are not those of the source, in its order.
        """
        offline_files.add_rows(config.repo_path, feature_view.batch_source, table)
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Add logged features to the destination directory as one more Parquet file."""
        assert isinstance(logging_config.destination, FileLoggingDestination)
        table = pq.read_table(data) if isinstance(data, Path) else data
        directory = Path(FileSource.get_uri_for_file_path(config.repo_path, logging_config.destination.path))
        offline_files.write(directory / f"{uuid.uuid4().hex}.parquet", [table])


def time_column(entities: pd.DataFrame, views: list[Wanted]) -> str:
    """The entity rows' timestamp column.

    Raises:
        FeastEntityDFMissingColumnsError: They lack a key of a view.
    """
    kinds = dict(zip(entities.columns, entities.dtypes, strict=True))
    time = offline_utils.infer_event_timestamp_from_entity_df(kinds)
    keys = {theirs for w in views for theirs, _ in w.keys}
    if missing := keys - set(entities.columns):
        raise FeastEntityDFMissingColumnsError(keys | {time}, missing)
    return time


def _in_utc(entities: pd.DataFrame, time: str) -> pd.DataFrame:
    """The entity rows with aware instants; a time without zone is UTC."""
    kind = entities[time].dtype
    if isinstance(kind, pd.DatetimeTZDtype) and str(kind.tz) == "UTC":
        return entities
    return entities.assign(**{time: pd.to_datetime(entities[time], utc=True)})


def _columns(keys: list[str], features: list[str], event: str, created: str | None) -> list[str]:
    return [*keys, *features, event, *([created] if created else [])]


def _with_dummy(rows: pl.DataFrame, keys: list[str]) -> pa.Table:
    table = offline_files.plain(rows)
    # Feast stores the rows of a view without entity under one made-up key.
    return table if keys else table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * len(table)))
