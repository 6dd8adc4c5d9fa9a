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
from feature_repo.features import SERVICE, ColumnType, View, views

if TYPE_CHECKING:
    from feast import FeatureStore


def _unchanged(target: Any = None, **options: Any) -> Any:
    return (lambda function: function) if target is None else target


# Importing Feast rewrites 260 of its functions with run-time type checks: half of its import, 3 CPU seconds a process.
typeguard.typechecked = _unchanged

PROJECT = "evergreen"
CURRENT = "online/current"  # link to the version of the online store that is served


def settings(registry: Path, online: Path) -> dict[str, Any]:
    """The content of `feature_store.yaml`.

    Args:
        registry: Directory of the registry.
        online: Directory of the online store.
    """
    return {
        "project": PROJECT,
        "provider": "local",
        "registry": {
            "registry_type": "sql",
            "path": f"sqlite:///{registry / 'registry.db'}",
            "cache_ttl_seconds": 0,  # never expires; a reader opens anew when a version is published
            "serve_features_while_materializing": True,
        },
        "offline_store": {"type": "feature_repo.offline_store.AsofOfflineStore"},
        "online_store": {"type": "sqlite", "path": str(online / "online.db")},
        "materialization": {"pull_latest_features": True, "online_write_batch_size": 10_000},
        "entity_key_serialization_version": 3,
    }


def open_store(root: Path, registry: Path | None = None, online: Path | None = None) -> "FeatureStore":
    """Open the Feast store of a home, by default with its own registry and the served online store."""
    from feast import FeatureStore, RepoConfig

    logging.getLogger("feast").setLevel(logging.ERROR)
    config = settings(registry or root, online or root / CURRENT)
    return FeatureStore(config=RepoConfig(**config, repo_path=root))


def apply(root: Path, spec: TableSpec) -> None:
    """Write `feature_store.yaml` and register the views of a declaration; views of an older one are removed."""
    text = yaml.safe_dump(settings(root, root / CURRENT), sort_keys=False)
    mark = hashlib.sha256(json.dumps([text, spec.to_json()]).encode()).hexdigest()
    done = root / "applied.sha256"
    if (root / "registry.db").exists() and done.exists() and done.read_text() == mark:
        return
    write_text(root / "feature_store.yaml", text)
    # Feast also makes online tables here; those belong to a version, so these go with the scratch directory.
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

    entities = {e: Entity(name=e, join_keys=[f"{e}_id"], value_type=ValueType.STRING) for e in ("user", "item")}
    found = {v: _feature_view(v, entities[v.entity]) for v in views(spec)}
    service = FeatureService(name=SERVICE, features=[fv for v, fv in found.items() if v.offline])
    return [*entities.values(), *found.values(), service]


def _feature_view(view: View, entity: Any) -> Any:
    from feast import FeatureView, Field, FileSource
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
    source = FileSource(
        name=view.name,
        path=f"views/{view.name}/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    fields = [Field(name=view.key, dtype=String), *(Field(name=n, dtype=types[t]) for n, t in view.columns)]
    return FeatureView(name=view.name, entities=[entity], ttl=view.ttl, schema=fields, source=source)
