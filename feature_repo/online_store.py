"""Evergreen's Feast online store and provider: packed rows instead of one protobuf a value.

`feature_store.yaml` names both:

    provider: feature_repo.online_store.EvergreenProvider
    online_store: {type: feature_repo.online_store.PackedOnlineStore, path: online/current, redis: ""}

The provider carries `materialize`, `push` and `write_to_online_store` from Arrow to packed rows, a table at a time.
Feast's own reads (`get_online_features`) work on the rows too, value by value; serving reads them by
`online.OnlineReader`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
from feast import utils
from feast.base_feature_view import BaseFeatureView
from feast.entity import Entity
from feast.feature_view import FeatureView
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.passthrough_provider import PassthroughProvider
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.value_type import ValueType

from engagement.contract import TIMESTAMP
from engagement.errors import EvergreenError
from engagement.index import from_us
from feature_repo.features import ColumnType, View
from feature_repo.generations import open_rows, settled
from feature_repo.online_rows import OnlineRows
from feature_repo.packed import Codec, row_keys
from feature_repo.recent import recent

_KIND: dict[ValueType, ColumnType] = {
    ValueType.STRING: "string",
    ValueType.STRING_LIST: "strings",
    ValueType.DOUBLE: "float",
    ValueType.FLOAT_LIST: "floats",
    ValueType.INT64: "int",
    ValueType.INT64_LIST: "ints",
}
_FIELD: dict[ColumnType, Any] = {
    "string": "string_val",
    "strings": "string_list_val",
    "float": "double_val",
    "floats": "float_list_val",
    "int": "int64_val",
    "ints": "int64_list_val",
}
_LISTS = ("strings", "floats", "ints")
ProtoRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]


class PackedOnlineStoreConfig(FeastConfigBaseModel):
    """Settings of the store in `feature_store.yaml`.

    Attributes:
        type: The store's class, by its full name.
        path: Directory of the rows, or a link to it that may be moved at any time.
        redis: Address of the Redis that holds them; empty for SQLite in the directory.
    """

    type: Literal["feature_repo.online_store.PackedOnlineStore"] = "feature_repo.online_store.PackedOnlineStore"
    path: str
    redis: str = ""


@dataclass(frozen=True)
class _FeastView(View):
    """A view as Feast registered it."""

    join_keys: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The join keys, under Feast's names."""
        return self.join_keys


class PackedOnlineStore(OnlineStore):
    """Feast's online store interface over `OnlineRows`."""

    def __init__(self) -> None:
        self._open: tuple[Path, OnlineRows] | None = None

    def rows(self, config: RepoConfig) -> OnlineRows:
        """The rows that `path` leads to now."""
        place = _place(config)
        if self._open is None or self._open[0] != place:
            place.mkdir(parents=True, exist_ok=True)
            self._open = (place, open_rows(place, config.online_store.redis))
        return self._open[1]

    def write(self, config: RepoConfig, view: FeatureView, table: pa.Table) -> None:
        """Store the rows of a table of the view's own column names; a newer row that is there stays."""
        codec = Codec(_stored(view))
        source = view.batch_source
        names = {source.timestamp_field: "event_timestamp"} if source else {}
        if source and source.created_timestamp_column:
            names[source.created_timestamp_column] = "created_timestamp"
        table = table.rename_columns([names.get(n, n) for n in table.column_names])
        keys, packed = row_keys(codec.view, table), codec.pack(table)
        with settled(_configured(config).parent):
            self.rows(config).put(view.name, keys, packed)

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[ProtoRow], progress: Callable[[int], Any] | None
    ) -> None:
        """Store rows that are given value by value."""
        view, source = _stored(table), table.batch_source
        keys = [_key_texts(key) for key, *_ in data]
        columns: dict[str, Any] = {name: [k[name] for k in keys] for name in view.keys}
        for name, kind in view.columns:
            columns[name] = [_python(values.get(name), kind) for _, values, *_ in data]
        event, created = ([_utc(t) for t in times] for times in zip(*(d[2:] for d in data), strict=True))
        columns[source.timestamp_field if source else "event_timestamp"] = pa.array(event, TIMESTAMP)
        if source and source.created_timestamp_column:
            columns[source.created_timestamp_column] = pa.array(created, TIMESTAMP)
        self.write(config, table, pa.table(columns))
        if progress:
            progress(len(data))

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """The rows of the given keys as Feast's protobuf values."""
        codec, texts = Codec(_stored(table)), [_key_texts(k) for k in entity_keys]
        keys = row_keys(codec.view, {n: [t[n] for t in texts] for n in codec.view.keys})
        found = codec.unpack(self._read(config, table.name, keys))
        wanted = [(n, t) for n, t in codec.view.columns if requested_features is None or n in requested_features]
        columns = {n: [_proto(v, t) for v in found.column(n).to_pylist()] for n, t in wanted}
        return [
            (None, None) if event is None else (from_us(event), {n: columns[n][i] for n, _ in wanted})
            for i, event in enumerate(found.column("event_timestamp").to_pylist())
        ]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Remove the rows of deleted views; a new view needs no preparation."""
        for view in tables_to_delete:
            rows = self.rows(config)
            for keys, _ in rows.scan(view.name):
                rows.delete(view.name, keys)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Remove all rows."""
        self.rows(config).clear()

    def _read(self, config: RepoConfig, view: str, keys: list[bytes]) -> list[bytes | None]:
        while True:
            place = _place(config)
            try:
                found = self.rows(config).get([(view, keys)])[0]
            except EvergreenError:
                if place == _place(config):
                    raise
                continue
            if place == _place(config):  # else the rows were left, and perhaps removed, while they were read
                return found


class EvergreenProvider(PassthroughProvider):
    """Feast's provider with the writes of plain feature views in Arrow."""

    def materialize_single_feature_view(
        self,
        config: RepoConfig,
        feature_view: Any,
        start_date: datetime,
        end_date: datetime,
        registry: BaseRegistry,
        project: str,
        tqdm_builder: Callable[[int], Any],
        disable_event_timestamp: bool = False,
    ) -> None:
        """Write each key's newest row that became known in [start_date, end_date]."""
        if not self._packs(feature_view):
            super().materialize_single_feature_view(
                config, feature_view, start_date, end_date, registry, project, tqdm_builder, disable_event_timestamp
            )
            return
        entities = [registry.get_entity(e, project) for e in feature_view.entities]
        keys, features, event, created = utils._get_column_names(feature_view, entities)
        with recent(config.repo_path, feature_view.batch_source, start_date) as source:
            if source is None:
                return
            job = self.offline_store.pull_latest_from_table_or_query(
                config=config,
                data_source=source,
                join_key_columns=keys,
                feature_name_columns=features,
                timestamp_field=event,
                created_timestamp_column=created,
                start_date=start_date,
                end_date=end_date,
            )
            table = job.to_arrow()
        self._store(feature_view, table)
        with tqdm_builder(len(table)) as progress:
            progress.update(len(table))

    def ingest_df(
        self,
        feature_view: BaseFeatureView | FeatureView | OnDemandFeatureView,
        df: pd.DataFrame,
        field_mapping: dict | None = None,
    ) -> None:
        """Write pushed rows."""
        if not self._packs(feature_view):
            super().ingest_df(feature_view, df, field_mapping)
            return
        self._store(feature_view, pa.Table.from_pandas(df, preserve_index=False))

    async def ingest_df_async(
        self,
        feature_view: BaseFeatureView | FeatureView | OnDemandFeatureView,
        df: pd.DataFrame,
        field_mapping: dict | None = None,
    ) -> None:
        """Write pushed rows; the call blocks for one write."""
        self.ingest_df(feature_view, df, field_mapping)

    def _packs(self, view: Any) -> bool:
        changed = getattr(view, "feature_transformation", None) or getattr(view, "aggregations", None)
        return isinstance(view, FeatureView) and not changed and isinstance(self.online_store, PackedOnlineStore)

    def _store(self, view: Any, table: pa.Table) -> None:
        mapping = view.batch_source.field_mapping if view.batch_source else {}
        self.online_store.write(self.repo_config, view, utils._run_pyarrow_field_mapping(table, mapping or {}))


def _configured(config: RepoConfig) -> Path:
    path = Path(config.online_store.path)
    return path if path.is_absolute() or not config.repo_path else Path(config.repo_path) / path


def _place(config: RepoConfig) -> Path:
    return _configured(config).resolve()


def _stored(view: FeatureView) -> _FeastView:
    columns = []
    for feature in view.features:
        kind = _KIND.get(feature.dtype.to_value_type())
        if kind is None:
            raise EvergreenError(
                f"the online store cannot hold {view.name}:{feature.name} of the type {feature.dtype}",
                f"Use one of {', '.join(k.name.lower() for k in _KIND)}",
            )
        columns.append((feature.name, kind))
    keys = tuple(c.name for c in view.entity_columns)
    return _FeastView(view.name, (), view.ttl or timedelta(0), tuple(columns), join_keys=keys)


def _utc(time: datetime | None) -> datetime | None:
    return utils.make_tzaware(time) if time else None


def _key_texts(key: EntityKey) -> dict[str, str]:
    return {
        name: str(getattr(value, value.WhichOneof("val")))
        for name, value in zip(key.join_keys, key.entity_values, strict=True)
    }


def _python(value: Value | None, kind: ColumnType) -> Any:
    if value is None or not value.HasField(_FIELD[kind]):
        return None
    found = getattr(value, _FIELD[kind])
    return list(found.val) if kind in _LISTS else found


def _proto(value: Any, kind: ColumnType) -> Value:
    made = Value()
    if value is None:
        return made
    if kind in _LISTS:
        # A list of Feast's cannot hold a null; the empty text stands for one.
        getattr(made, _FIELD[kind]).val.extend(["" if v is None else v for v in value])
        getattr(made, _FIELD[kind]).SetInParent()
    else:
        setattr(made, _FIELD[kind], value)
    return made
