"""Feast objects and `feature_store.yaml`, derived from the declaration."""

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typeguard
import yaml

from engagement.files import write_text
from engagement.table import TableSpec
from feature_repo.features import JOIN_KEY, SERVICE, ColumnType, View, views
from feature_repo.generations import CURRENT

if TYPE_CHECKING:
    from feast import FeatureStore


def _unchanged(target: Any = None, **options: Any) -> Any:
    return (lambda function: function) if target is None else target


# Importing Feast rewrites 260 of its functions with run-time type checks: half of its import, 3 CPU seconds a process.
typeguard.typechecked = _unchanged

PROJECT = "evergreen"
HISTORY = "user_history"
OFFLINE: dict[str, dict[str, Any]] = {
    "asof": {
        "provider": "feature_repo.online_store.EvergreenProvider",
        "offline_store": {"type": "feature_repo.offline_store.AsofOfflineStore"},
    },
    # Spark's workers write what they materialise themselves.
    "spark": {
        "provider": "local",
        "offline_store": {"type": "feature_repo.spark_store.SparkAsofOfflineStore"},
        "batch_engine": {"type": "spark.engine"},
    },
}


def settings(registry: Path, online: Path, url: str = "", offline: str = "asof") -> dict[str, Any]:
    """The content of `feature_store.yaml`.

    Args:
        registry: Directory of the registry.
        online: Directory of the online store.
        url: Address of the Redis that holds its rows; empty for SQLite in the directory.
        offline: Who joins and materialises: `asof` (this process) or `spark`.
    """
    return {
        "project": PROJECT,
        "registry": {
            "registry_type": "sql",
            "path": f"sqlite:///{registry / 'registry.db'}",
            "cache_ttl_seconds": 0,  # never expires; a reader opens anew when a version is published
            "serve_features_while_materializing": True,
        },
        **OFFLINE[offline],
        "online_store": {
            "type": "feature_repo.online_store.PackedOnlineStore",
            "path": str(online),
            "redis": url,
        },
        "entity_key_serialization_version": 3,
    }


def open_store(root: Path, online: Path | None = None, url: str = "", offline: str = "asof") -> "FeatureStore":
    """Open the Feast store of a home, by default with the served online store; the rest as in `settings`."""
    from feast import FeatureStore, RepoConfig

    logging.getLogger("feast").setLevel(logging.ERROR)
    config = settings(root, online or root / CURRENT, url, offline)
    return FeatureStore(config=RepoConfig(**config, repo_path=root))


def apply(root: Path, spec: TableSpec, url: str = "", offline: str = "asof") -> None:
    """Write `feature_store.yaml` and register the views of a declaration; views of an older one are removed."""
    text = yaml.safe_dump(settings(root, root / CURRENT, url, offline), sort_keys=False)
    mark = hashlib.sha256(json.dumps([text, spec.to_json()]).encode()).hexdigest()
    done = root / "applied.sha256"
    if (root / "registry.db").exists() and done.exists() and done.read_text() == mark:
        return
    write_text(root / "feature_store.yaml", text)
    # Feast removes the rows of views that are gone; those belong to a generation, so it is shown an empty place.
    with tempfile.TemporaryDirectory() as scratch:
        store = open_store(root, online=Path(scratch))
        wanted = objects(spec)
        names = {o.name for o in wanted}
        gone: list[Any] = [v for v in store.list_feature_views() if v.name not in names]
        store.apply(wanted, objects_to_delete=gone, partial=not gone)
    write_text(done, mark)


def objects(spec: TableSpec) -> list[Any]:
    """Entities, views and the feature service."""
    from feast import Entity, FeatureService, ValueType

    declared = views(spec)
    names = dict.fromkeys(e for v in declared for e in v.entities)
    entities = {e: Entity(name=e, join_keys=[JOIN_KEY[e]], value_type=ValueType.STRING) for e in names}
    found = {v: _feature_view(v, [entities[e] for e in v.entities]) for v in declared}
    service = FeatureService(name=SERVICE, features=[fv for v, fv in found.items() if v.offline])
    return [*entities.values(), *found.values(), service]


def _feature_view(view: View, entities: list[Any]) -> Any:
    from feast import FeatureView, Field, FileSource, PushSource
    from feast.data_format import ParquetFormat
    from feast.types import Array, Float32, Float64, Int64, String

    types: dict[ColumnType, Any] = {
        "string": String,
        "strings": Array(String),
        "float": Float64,
        "floats": Array(Float32),
        "int": Int64,
        "ints": Array(Int64),
    }
    source: Any = FileSource(
        name=view.name,
        path=f"views/{view.name}/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    keys = [Field(name=k, dtype=String) for k in view.keys]
    if view.name == HISTORY:
        source = PushSource(name=f"{HISTORY}_push", batch_source=source)  # actions arrive as they happen
    fields = [*keys, *(Field(name=n, dtype=types[t]) for n, t in view.columns)]
    return FeatureView(name=view.name, entities=entities, ttl=view.ttl, schema=fields, source=source)
