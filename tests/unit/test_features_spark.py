"""The store on Spark gives what the laptop's gives: the same rows in the same order, value for value.

One local Spark of two threads serves the whole file. Skipped where pyspark or Java is missing.
"""

import dataclasses
import os
import random
import shutil
from datetime import timedelta

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from feature_repo.repo import FeatureRepo
from tests.features_world import AS_OF, WINDOW, scratch, world
from tests.redis_lab import redis_server

pytest.importorskip("pyspark", reason="pyspark is not installed (requirements-spark.lock)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("java") or os.environ.get("JAVA_HOME")), reason="there is no Java"),
]

T0 = pd.Timestamp("2024-03-01", tz="UTC")
UTC_US = pa.timestamp("us", tz="UTC")
KEYS = [("a", "bc"), ("ab", "c"), ("a", "c"), (None, "c"), ("a", None)]  # the first two read the same when joined
SHORT, EVER = 3, 0  # times to live, microseconds
CASES = 60


@pytest.fixture(scope="module", autouse=True)
def spark():
    world()
    from pyspark.sql import SparkSession

    import feature_repo.spark_store  # noqa: F401 - says which Python the workers run

    conf = {
        "spark.master": "local[2]",
        "spark.driver.memory": "1g",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1",  # a short life: no time to optimise
        "spark.sql.codegen.wholeStage": "false",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.session.timeZone": "Asia/Tokyo",  # whatever it was: instants are UTC
        "spark.local.dir": str(scratch()),
        "spark.sql.warehouse.dir": str(scratch()),
    }
    session = SparkSession.builder.config(map=conf).getOrCreate()
    yield session
    session.stop()


def _at(us):
    return None if us is None else T0 + pd.Timedelta(us, "us")


@pytest.fixture(scope="module")
def rows():
    """Feature rows of many small worlds; a dozen instants for all of them: ties, late rows and nulls everywhere."""
    draw = random.Random(7)
    found = []
    for case in range(CASES):
        for _ in range(draw.randrange(12)):
            user, category = draw.choice(KEYS)
            event, created = (draw.choice([*range(13), None]) for _ in range(2))
            number = draw.choice([None, float(len(found))])
            words = draw.choice([None, [], [f"w{len(found)}", None]])
            found.append((case, user, category, event, created, number, words, len(found)))
    return found


@pytest.fixture(scope="module")
def home(rows):
    root = scratch() / "home [1]"  # a home may have any name
    for name in ("pairs", "items"):
        (root / name).mkdir(parents=True)
    case, user, category, event, created, number, words, place = zip(*rows, strict=True)
    pairs = pa.table(
        {
            "uid": [None if u is None else f"{c}-{u}" for c, u in zip(case, user, strict=True)],
            "category": pa.array(category, pa.string()),
            "ts": pa.array([_at(t) for t in event], UTC_US),
            "created": pa.array([_at(t) for t in created], UTC_US),
            "x": pa.array(number, pa.float64()),
            "words": pa.array(words, pa.list_(pa.string())),
            "place": pa.array(place, pa.int64()),
        }
    )
    half = len(rows) // 2
    pq.write_table(pairs.slice(0, half), root / "pairs" / "1.parquet")
    pq.write_table(pairs.slice(half), root / "pairs" / "2.parquet")
    items = {
        "item_id": ["i", "j"],
        "event_timestamp": pa.array([_at(0).tz_localize(None), _at(4).tz_localize(None)], pa.timestamp("us")),
        "n": pa.array([7, None], pa.int64()),
        "embedding": pa.array([[0.1, 0.2], None], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(items), root / "items" / "all.parquet")  # times without zone, no created column
    return root


@pytest.fixture(scope="module")
def stores(home):
    """(laptop's, Spark's): two stores that differ in nothing but who joins."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.data_format import ParquetFormat
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Array, Float32, Float64, Int64, String

    from feature_repo.definitions import OFFLINE

    def source(name, **options):
        return FileSource(name=name, path=f"{name}/*.parquet", file_format=ParquetFormat(), **options)

    keys = {n: Entity(name=n, join_keys=[k], value_type=ValueType.STRING) for n, k in
            (("user", "user_id"), ("category", "category"), ("item", "item_id"))}  # fmt: skip
    of_pair = {"timestamp_field": "ts", "created_timestamp_column": "created", "field_mapping": {"uid": "user_id"}}
    fields = [("user_id", String), ("category", String), ("x", Float64), ("words", Array(String)), ("place", Int64)]
    views = [
        FeatureView(
            name=name,
            entities=[keys["user"], keys["category"]],
            ttl=timedelta(microseconds=ttl),
            schema=[Field(name=n, dtype=t) for n, t in fields],
            source=source("pairs", **of_pair),
        )
        for name, ttl in (("short", SHORT), ("ever", EVER))
    ]
    fields = [("item_id", String), ("n", Int64), ("embedding", Array(Float32))]
    views += [
        FeatureView(
            name=name,
            entities=entities,
            ttl=timedelta(0),
            schema=[Field(name=n, dtype=t) for n, t in fields[1 - len(entities) :]],
            source=source("items", timestamp_field="event_timestamp"),
        )
        for name, entities in (("item", [keys["item"]]), ("everybody", []))
    ]

    @on_demand_feature_view(sources=[views[1], views[2]], schema=[Field(name="both", dtype=Float64)], mode="pandas")
    def added(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"both": frame["x"] + frame["n"]})

    made = [
        FeatureStore(
            config=RepoConfig(
                project="p",
                registry=str(home / "registry.pb"),
                online_store={"type": "sqlite", "path": str(home / f"{offline}.db")},
                materialization={"pull_latest_features": True},
                entity_key_serialization_version=3,
                repo_path=home,
                **OFFLINE[offline] | {"provider": "local"},
            )
        )
        for offline in ("asof", "spark")
    ]
    made[0].apply([*keys.values(), *views, added])
    return made


@pytest.fixture(scope="module")
def entities():
    draw = random.Random(8)
    asked = [
        (
            f"{draw.randrange(CASES)}-{u}" if u else None,
            c,
            draw.choice([*range(16), None]),
            draw.choice(["i", "j", "k"]),
        )
        for u, c in (draw.choice([*KEYS, ("never", "c")]) for _ in range(900))
    ]
    asked += asked[:50]
    user, category, t, item = zip(*asked, strict=True)
    frame = pd.DataFrame({"user_id": user, "category": category, "item_id": item, "label": range(len(asked))})
    frame["event_timestamp"] = pd.to_datetime([_at(v) for v in t], utc=True).as_unit("us")
    return frame.set_index(pd.Index([5] * len(frame)))


def _brute(rows, user, category, t, ttl):
    """By the definition: the latest event among the rows that are true and known at t; ties by created, then place."""
    seen = [
        (event, event if created is None else created, place)
        for case, u, c, event, created, *_, place in rows
        if u and c and (f"{case}-{u}", c) == (user, category) and event is not None
    ]
    seen = [s for s in seen if max(s[:2]) <= t]
    return None if not seen or (ttl and max(seen)[0] < t - ttl) else max(seen)[2]


def _same(found, expected):
    """Two ranking tables are equal to the last bit."""
    for field in dataclasses.fields(RankingTable):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name


def test_join_equals_brute_force_on_colliding_timestamps_under_two_times_to_live(stores, rows, entities):
    features = [f"{v}:{f}" for v in ("short", "ever") for f in ("place", "x", "words")]
    found = stores[1].get_historical_features(entities, features, full_feature_names=True).to_arrow()
    assert found.column("label").to_pylist() == list(range(len(entities)))
    asked = zip(entities["user_id"], entities["category"], entities["event_timestamp"], strict=True)
    asked = [(u, c, None if t is pd.NaT else (t - T0) // pd.Timedelta(1, "us")) for u, c, t in asked]
    for view, ttl in (("short", SHORT), ("ever", EVER)):
        expected = [None if t is None else _brute(rows, u, c, t, ttl) for u, c, t in asked]
        assert found.column(f"{view}__place").to_pylist() == expected
        for name, column in (("x", 5), ("words", 6)):
            values = [None if i is None else rows[i][column] for i in expected]
            assert found.column(f"{view}__{name}").to_pylist() == values
        assert 50 < sum(e is not None for e in expected) < len(expected) - 50


def test_every_habit_of_the_laptops_store_is_kept_down_to_the_column_types(stores, entities):
    features = ["ever:x", "ever:words", "item:n", "item:embedding", "everybody:n", "added:both"]
    laptop, cluster = (s.get_historical_features(entities, features, full_feature_names=True) for s in stores)
    assert laptop.to_arrow().equals(cluster.to_arrow())
    assert set(laptop.metadata.keys) == set(cluster.metadata.keys)
    pd.testing.assert_frame_equal(laptop.to_df(), cluster.to_df())
    assert len(entities.columns) == 5 and list(entities.index) == [5] * len(entities)  # the caller's is left alone
    naive = entities.assign(event_timestamp=entities["event_timestamp"].dt.tz_localize(None).dt.as_unit("ns"))
    naive["event_timestamp"] += pd.Timedelta(999, "ns")
    laptop, cluster = (s.get_historical_features(naive.dropna(), ["ever:place", "item:n"]).to_arrow() for s in stores)
    assert laptop.select(["place", "n"]).equals(cluster.select(["place", "n"]))


def test_entity_rows_that_cannot_be_joined_and_a_source_without_files_are_named(stores, home):
    from feast.errors import FeastEntityDFMissingColumnsError

    with pytest.raises(FeastEntityDFMissingColumnsError, match="user_id"):
        stores[1].get_historical_features(pd.DataFrame({"event_timestamp": [T0]}), ["ever:x"])
    with pytest.raises(EvergreenError, match="DataFrame of entity rows"):
        stores[1].get_historical_features("SELECT 1", ["ever:x"])
    (home / "items").rename(home / "gone")
    try:
        with pytest.raises(EvergreenError, match="has no files"):
            stores[1].get_historical_features(pd.DataFrame({"item_id": ["i"], "event_timestamp": [T0]}), ["item:n"])
    finally:
        (home / "gone").rename(home / "items")


@pytest.mark.parametrize("interval", [(0, 6), (6, 6), (7, 12)])
def test_what_a_materialisation_reads_is_what_the_laptops_reads(stores, interval):
    def pulled(store, how, **options):
        source = store.get_feature_view("ever").batch_source
        job = getattr(store.provider.offline_store, how)(
            config=store.config,
            data_source=source,
            join_key_columns=["uid", "category"],
            feature_name_columns=["x", "words", "place"],
            timestamp_field="ts",
            created_timestamp_column="created",
            start_date=_at(interval[0]).to_pydatetime(),
            end_date=_at(interval[1]).to_pydatetime(),
        )
        table = job.to_arrow()
        names = [source.field_mapping.get(n, n) for n in table.column_names]  # Feast renames ours after the read
        return pl.from_arrow(table.rename_columns(names)).sort("place")

    for how in ("pull_latest_from_table_or_query", "pull_all_from_table_or_query"):
        laptop, cluster = (pulled(s, how) for s in stores)
        assert laptop.equals(cluster) and len(laptop) > 10
        assert laptop.schema == cluster.schema


def test_training_table_of_the_spark_join_is_the_laptops_to_the_last_bit(tmp_path):
    w = world()
    shutil.copytree(w.home / "features", tmp_path / "features", symlinks=True)
    repo = FeatureRepo(tmp_path / "features", offline_store="spark")
    table = repo.table(w.snapshot, *WINDOW, tmp_path / "table")
    assert "SparkAsof" in (tmp_path / "features" / "feature_store.yaml").read_text()
    _same(table, w.table)
    assert pq.read_table(tmp_path / "table" / "sample.parquet").equals(w.sample)
    assert table.rows > 300


def test_spark_engine_writes_what_the_laptop_writes_to_the_online_store(tmp_path):
    w = world()
    shutil.copytree(w.home / "features", tmp_path / "features", ignore=shutil.ignore_patterns("online"))
    with pytest.raises(EvergreenError, match="SQLite"):
        FeatureRepo(tmp_path / "features", offline_store="spark").materialize(w.snapshot)
    users = sorted({r["user_id"] for r in w.rows}) + ["nobody"]
    items = sorted({r["item_id"] for r in w.rows}) + ["nothing"]
    with redis_server() as url:
        repo = FeatureRepo(tmp_path / "features", url, "spark")
        repo.materialize(w.snapshot)
        for user in users:
            laptop, cluster = (r.online().read(user, items, {}, AS_OF) for r in (w.repo, repo))
            _same(cluster, laptop)
