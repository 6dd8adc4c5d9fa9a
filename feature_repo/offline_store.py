"""Evergreen's Feast offline store: exact point-in-time joins over Parquet files.

Feast's own file store drops candidates that share a user and an instant, and rows whose features have expired; this
one keeps every entity row, in order, and reads exactly what `pit` defines. `feature_store.yaml` names it:

    offline_store: {type: feature_repo.offline_store.AsofOfflineStore}

Sources are Parquet: a file, a directory or a pattern (`FileSource` with `ParquetFormat()`).
"""

import uuid
from collections.abc import Callable
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
from feature_repo import pit


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
    """A join that runs when its result is asked for."""

    def __init__(
        self,
        run: Callable[[], pa.Table],
        repo_path: Path | None,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._run = run
        self._repo_path = repo_path
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

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._run().to_pandas()

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as one Parquet file at the place of a saved dataset."""
        assert isinstance(storage, SavedDatasetFileStorage)
        path = Path(FileSource.get_uri_for_file_path(self._repo_path, storage.file_options.uri))
        if path.exists() and not allow_overwrite:
            raise EvergreenError(f"{path} exists already", "Choose another place or allow it to be overwritten")
        _write(path, self.to_arrow())

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
        **_: Any,
    ) -> RetrievalJob:
        """Join each view's features to the entity rows, each at its own instant.

        Raises:
            EvergreenError: The entity rows are no DataFrame.
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise EvergreenError("the offline store joins to a DataFrame of entity rows only", "Pass one as entity_df")
        time = offline_utils.infer_event_timestamp_from_entity_df(
            dict(zip(entity_df.columns, entity_df.dtypes, strict=True))
        )
        on_demand = utils._get_requested_on_demand_feature_views(feature_refs, project, registry)
        wanted, _on_demand = utils._get_requested_feature_views_to_features_dict(feature_refs, feature_views, on_demand)
        keys = {theirs for view in wanted for theirs, _mine in _keys(view)}
        if missing := keys - set(entity_df.columns):
            raise FeastEntityDFMissingColumnsError(keys | {time}, missing)
        hide_late = filter_by_created_timestamp or config.offline_store.hide_late_rows
        rows = entity_df.reset_index(drop=True)
        rows[time] = pd.to_datetime(rows[time], utc=True)

        def run() -> pa.Table:
            result = pa.Table.from_pandas(rows, preserve_index=False)
            questions = pl.DataFrame(pl.from_arrow(result.select(sorted({*keys, time}))))
            for view, features in wanted.items():
                prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
                found = _join_view(config, view, features, questions, time, hide_late)
                for name in features:
                    result = result.append_column(prefix + name, found.column(name))
            return result

        return AsofRetrievalJob(
            run,
            config.repo_path,
            full_feature_names,
            OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            RetrievalMetadata(
                features=feature_refs,
                keys=[c for c in rows.columns if c != time],
                min_event_timestamp=rows[time].min().to_pydatetime(),
                max_event_timestamp=rows[time].max().to_pydatetime(),
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
        times = [c for c in (timestamp_field, created_timestamp_column) if c]

        def run() -> pa.Table:
            source = _scan(config, data_source)
            index = source.select([*join_key_columns, *times]).collect()
            rows = pit.latest(
                index,
                join_key_columns,
                timestamp_field,
                created_timestamp_column,
                to_us(start_date),
                to_us(end_date),
                config.offline_store.hide_late_rows,
            )
            return _with_dummy(
                _gather(source, [*join_key_columns, *feature_name_columns, *times], rows), join_key_columns
            )

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
        times = [c for c in (timestamp_field, created_timestamp_column) if c]
        columns = list(dict.fromkeys([*join_key_columns, *feature_name_columns, *times]))

        def run() -> pa.Table:
            event = pl.col(timestamp_field).dt.timestamp("us")
            rows = _scan(config, data_source).select(columns)
            if start_date is not None:
                rows = rows.filter(event >= to_us(start_date))
            if end_date is not None:
                rows = rows.filter(event <= to_us(end_date))
            return _with_dummy(_plain(rows.collect()), join_key_columns)

        return AsofRetrievalJob(run, config.repo_path)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Add rows to a view's source as one more file; the source must be a directory or a `*.parquet` pattern."""
        path = Path(FileSource.get_uri_for_file_path(config.repo_path, _file_source(feature_view.batch_source).path))
        if path.suffix == ".parquet" and "*" not in path.name:
            raise EvergreenError(f"{path} is a single file, to which nothing can be added", "Use a directory as source")
        directory = path.parent if "*" in path.name else path
        _write(directory / f"batch-{uuid.uuid4().hex}.parquet", table)
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
        _write(directory / f"{uuid.uuid4().hex}.parquet", table)


def _join_view(
    config: RepoConfig, view: FeatureView, features: list[str], questions: pl.DataFrame, time: str, hide_late: bool
) -> pa.Table:
    """The features of one view for every entity row, under the view's own names."""
    source = view.batch_source
    assert source is not None
    stored = {new: old for old, new in source.field_mapping.items()}
    keys = [(theirs, stored.get(mine, mine)) for theirs, mine in _keys(view)]
    event = stored.get(source.timestamp_field, source.timestamp_field)
    created = stored.get(source.created_timestamp_column, source.created_timestamp_column) or None
    rows = _scan(config, source)
    index = rows.select(list(dict.fromkeys([*(k for _, k in keys), event, *([created] if created else [])]))).collect()
    found = pit.match(questions, time, index, keys, event, created, view.ttl, hide_late)
    return _gather(rows, [stored.get(f, f) for f in features], found).rename_columns(features)


def _keys(view: FeatureView) -> list[tuple[str, str]]:
    """Pairs (column of the entity rows, column of the view)."""
    names = [c.name for c in view.entity_columns if c.name != DUMMY_ENTITY_ID]
    return [(view.projection.join_key_map.get(n, n), n) for n in names]


def _file_source(source: DataSource | None) -> FileSource:
    if not isinstance(source, FileSource):
        raise EvergreenError(f"the offline store reads Parquet files, not {type(source).__name__}", "Use a FileSource")
    return source


def _scan(config: RepoConfig, source: DataSource | None) -> pl.LazyFrame:
    path = FileSource.get_uri_for_file_path(config.repo_path, _file_source(source).path)
    if "://" in path:
        return pl.scan_parquet(path, hive_partitioning=False)
    place = Path(path)
    # Only the last part may be a pattern: a home directory is free to have brackets in its name.
    files = sorted(place.glob("*.parquet") if place.is_dir() else place.parent.glob(place.name))
    if not files:
        raise EvergreenError(f"the feature view source {path} has no files", "Build the features again")
    return pl.scan_parquet(files, glob=False, hive_partitioning=False)


def _gather(source: pl.LazyFrame, columns: list[str], rows: pl.Series) -> pa.Table:
    """The given columns at the given row numbers; a null number gives nulls."""
    return _plain(source.select(list(dict.fromkeys(columns))).collect().select(pl.all().gather(rows)))


def _plain(frame: pl.DataFrame) -> pa.Table:
    """Arrow with the types that Feast knows: no large, view or fixed-size variants; one chunk a column."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.cast(pa.schema([(f.name, _plain_type(f.type)) for f in table.schema])).combine_chunks()


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_large_string(kind):
        return pa.string()
    return pa.binary() if pa.types.is_large_binary(kind) else kind


def _with_dummy(table: pa.Table, keys: list[str]) -> pa.Table:
    # Feast stores the rows of a view without entity under one made-up key.
    if keys:
        return table
    return table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * len(table)))


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)
