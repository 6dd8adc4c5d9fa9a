"""Our offline store behind Feast's own interface: no row lost, no row early, Feast's habits kept."""

from datetime import timedelta

import numpy as np
import pandas as pd
import polars as pl
import pytest

from engagement.errors import EvergreenError
from tests.features_world import scratch, world

T0 = pd.Timestamp("2024-03-01", tz="UTC")


def _h(hours):
    return T0 + pd.Timedelta(hours=hours)


@pytest.fixture(scope="module")
def store():
    """A repository of its own: two views of two entities, one with a time to live, mapped names, lists and nulls."""
    world()  # Feast is imported once for all
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.data_format import ParquetFormat
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Array, Float64, Int64, String

    root = scratch() / "home [1]"  # a home may have any name
    for name in ("u", "i"):
        (root / name).mkdir(parents=True)
    users = pd.DataFrame(
        {
            "uid": ["a", "a", "a", "b", "b"],
            "ts": [_h(1), _h(1), _h(5), _h(2), _h(3)],
            "created": [_h(1), _h(2), _h(5), _h(9), _h(3)],
            "x": [1.0, 2.0, 3.0, 4.0, np.nan],
            "tags": [["p"], ["q", "r"], None, [], ["s"]],
        }
    )
    users = users.astype({"ts": "datetime64[us, UTC]", "created": "datetime64[us, UTC]"})
    users.iloc[:2].to_parquet(root / "u" / "1.parquet")
    users.iloc[2:].to_parquet(root / "u" / "2.parquet")
    items = pd.DataFrame({"item_id": ["i", "j"], "event_timestamp": [_h(0), _h(4)], "n": [7, 8]})
    items.to_parquet(root / "i" / "items.parquet")  # nanoseconds, no created column
    config = RepoConfig(
        project="p",
        provider="local",
        registry=str(root / "registry.pb"),
        offline_store={"type": "feature_repo.offline_store.AsofOfflineStore"},
        online_store={"type": "sqlite", "path": str(root / "online.db")},
        entity_key_serialization_version=3,
        repo_path=root,
        materialization={"pull_latest_features": True},
    )
    feast = FeatureStore(config=config)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
    u = FeatureView(
        name="u",
        entities=[user],
        ttl=timedelta(hours=4),
        schema=[Field(name=n, dtype=t) for n, t in (("user_id", String), ("x", Float64), ("tags", Array(String)))],
        source=FileSource(
            name="u",
            path="u",
            file_format=ParquetFormat(),
            timestamp_field="ts",
            created_timestamp_column="created",
            field_mapping={"uid": "user_id"},
        ),
    )
    i = FeatureView(
        name="i",
        entities=[item],
        ttl=timedelta(0),
        schema=[Field(name="item_id", dtype=String), Field(name="n", dtype=Int64)],
        source=FileSource(name="i", path="i/*.parquet", file_format=ParquetFormat(), timestamp_field="event_timestamp"),
    )

    @on_demand_feature_view(sources=[u, i], schema=[Field(name="both", dtype=Float64)], mode="pandas")
    def added(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"both": frame["x"] + frame["n"]})

    feast.apply([user, item, u, i, added, FeatureService(name="s", features=[u, i])])
    return feast


def test_candidates_of_one_instant_duplicates_expired_future_and_unknown_rows_all_stay_in_order(store):
    hours = [2, 2, 2, 2, 0, 30, 3, 1, 5.5, 2]
    entities = pd.DataFrame(
        {
            "user_id": ["a", "a", "a", "a", "a", "a", "b", "nobody", "a", None],
            "item_id": ["i", "j", "i", "i", "i", "j", "j", "i", "none", "i"],
            "event_timestamp": [_h(h) for h in hours],
            "label": range(10),
        },
        index=[5] * 10,
    )
    found = store.get_historical_features(entities, store.get_feature_service("s"), full_feature_names=True).to_df()
    assert list(found["label"]) == list(range(10))
    nan = None
    assert [None if pd.isna(v) else v for v in found["u__x"]] == [2, 2, 2, 2, nan, nan, nan, nan, 3, nan]
    assert [None if pd.isna(v) else v for v in found["i__n"]] == [7, nan, 7, 7, 7, 8, nan, 7, nan, 7]
    assert [None if v is None else list(v) for v in found["u__tags"]][:7] == [["q", "r"]] * 4 + [None, None, ["s"]]
    assert len(entities.columns) == 4 and list(entities.index) == [5] * 10  # the caller's frame is left alone


def test_on_demand_views_naive_times_and_short_names_work_as_in_feast(store):
    naive = pd.DataFrame({"user_id": ["a"], "item_id": ["i"], "event_timestamp": [_h(2).tz_localize(None)]})
    found = store.get_historical_features(naive, ["added:both", "u:x"]).to_df()
    assert found["both"][0] == 9.0 and found["x"][0] == 2.0


def test_a_result_can_be_kept_as_a_saved_dataset(store):
    from feast.errors import SavedDatasetLocationAlreadyExists
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    entities = pd.DataFrame({"user_id": ["a", "b"], "event_timestamp": [_h(2), _h(3)]})
    path = scratch() / "saved.parquet"
    job = store.get_historical_features(entities, ["u:x"])
    store.create_saved_dataset(job, "kept", SavedDatasetFileStorage(path=str(path)))
    assert pl.read_parquet(path)["x"].to_list() == [2.0, None]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(SavedDatasetFileStorage(path=str(path)))
    assert store.get_saved_dataset("kept").to_df()["x"][0] == 2.0


def test_entity_rows_without_the_key_are_refused_by_name(store):
    from feast.errors import FeastEntityDFMissingColumnsError

    with pytest.raises(FeastEntityDFMissingColumnsError, match="user_id"):
        store.get_historical_features(pd.DataFrame({"event_timestamp": [_h(1)]}), ["u:x"])
    with pytest.raises(EvergreenError, match="DataFrame of entity rows"):
        store.get_historical_features("SELECT 1", ["u:x"])


def test_materialised_values_are_those_of_the_offline_store_at_that_instant(store):
    for start, end in ((0, 4), (4, 8), (8, 12)):
        store.materialize(_h(start).to_pydatetime(), _h(end).to_pydatetime())
        online = store.get_online_features(["u:x", "u:tags"], {"user_id": ["a", "b", "nobody"]}).to_dict()
        entities = pd.DataFrame({"user_id": ["a", "b", "nobody"], "event_timestamp": [_h(end)] * 3})
        offline = store.get_historical_features(entities, ["u:x", "u:tags"]).to_df()
        if end == 4:  # later the offline values have expired, which Feast's SQLite does not check
            assert [None if v is None else list(v) for v in offline["tags"]] == online["tags"]
        # b's row of hour 2 became known at hour 9, after the one of hour 3: it never replaces it.
        assert online["tags"] == [["q", "r"] if end == 4 else None, ["s"], None]


def test_rows_written_through_feast_are_read_back(store):
    import pyarrow as pa

    from feature_repo.offline_store import AsofOfflineStore

    view = store.get_feature_view("i")
    more = pa.table(
        {
            "item_id": ["k"],
            "event_timestamp": pa.array([_h(1)], pa.timestamp("ns", tz="UTC")),
            "n": pa.array([9], pa.int64()),
        }
    )
    AsofOfflineStore.offline_write_batch(store.config, view, more, None)
    entities = pd.DataFrame({"item_id": ["k", "i"], "event_timestamp": [_h(1), _h(1)]})
    assert store.get_historical_features(entities, ["i:n"]).to_df()["n"].tolist() == [9, 7]
