"""The rest of Feast's offline interface on our store: streaming, calls without entity rows, mapped keys, writing."""

from datetime import timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engagement.errors import EvergreenError
from tests.features_world import scratch, world
from tests.unit.test_features_pit import _brute

TTL = {"short": 3, "long": 6}  # microseconds


def _t(ticks, unit="us"):
    return pd.to_datetime(pd.Series(ticks), unit=unit, utc=True).astype(f"datetime64[{unit}, UTC]")


def _rows(seed, key):
    """Sources where a dozen instants serve sixty rows: ties, late rows, nulls."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            key: draw.choice(["1", "2", "3", None], 60),
            "event_timestamp": _t(draw.integers(0, 13, 60)),
            "created": _t(draw.integers(0, 13, 60)),
            "n": np.arange(60),
            "list": [[i] * (i % 3) for i in range(60)],
        }
    )
    frame.loc[draw.choice(60, 6), "created"] = pd.NaT
    frame.loc[draw.choice(60, 4), "event_timestamp"] = pd.NaT
    return frame


@pytest.fixture(scope="module")
def root():
    world()  # Feast is imported once for all
    return scratch()


@pytest.fixture(scope="module")
def sources(root):
    found = {}
    for seed, name in enumerate(TTL):
        (root / name).mkdir()
        found[name] = _rows(seed, "k")
        # Several files, the last of one row: groups of rows that no entity row sees are not read.
        for i, part in enumerate((found[name][:30], found[name][30:59], found[name][59:])):
            part.to_parquet(root / name / f"{i}.parquet", row_group_size=7)
    return found


def _source(path, created=""):
    from feast import FileSource
    from feast.data_format import ParquetFormat

    return FileSource(
        name=path,
        path=path,
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column=created,
    )


@pytest.fixture(scope="module")
def store(root, sources):
    from feast import Entity, FeatureStore, FeatureView, Field, RepoConfig, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Array, Int64, String

    _t([1]).to_frame("event_timestamp").assign(rate=0.5).to_parquet(root / "global.parquet")
    one = pd.DataFrame({"name": ["x"], "event_timestamp": _t([1]), "n": [1]})
    one.to_parquet(root / "single.parquet")
    config = RepoConfig(
        project="p",
        provider="local",
        registry=str(root / "registry.pb"),
        offline_store={"type": "feature_repo.offline_store.AsofOfflineStore"},
        online_store={"type": "sqlite", "path": str(root / "online.db")},
        entity_key_serialization_version=3,
        repo_path=root,
    )

    k = Entity(name="k", join_keys=["k"], value_type=ValueType.STRING)
    name = Entity(name="name", join_keys=["name"], value_type=ValueType.STRING)
    fields = [Field(name="k", dtype=String), Field(name="n", dtype=Int64), Field(name="list", dtype=Array(Int64))]
    views = {
        view: FeatureView(
            name=view, entities=[k], ttl=timedelta(microseconds=ttl), schema=fields, source=_source(view, "created")
        )
        for view, ttl in TTL.items()
    }
    own = [Field(name="name", dtype=String), Field(name="n", dtype=Int64)]
    single = FeatureView(name="single", entities=[name], schema=own, source=_source("single.parquet"))

    @on_demand_feature_view(sources=[views["long"]], schema=[Field(name="rank", dtype=Int64)], mode="pandas")
    def ranked(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"rank": frame["n"].rank(method="first").fillna(0).astype("int64")})

    feast = FeatureStore(config=config)
    feast.apply([k, name, *views.values(), single, ranked])
    return feast


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("feature_repo.offline_join.BATCH_ROWS", 3)


def _entities(rows, unit="us"):
    return pd.DataFrame(
        {
            "k": pd.Series([k for k, _ in rows], dtype=object),
            "event_timestamp": _t([t for _, t in rows], unit),
            "label": range(len(rows)),
        }
    )


def _expected(source, rows, view):
    known = [
        (k, *(None if pd.isna(t) else t.value // 1000 for t in times))
        for k, *times in zip(source["k"], source["event_timestamp"], source["created"], strict=True)
    ]
    return [_brute(known, k, t, TTL[view], True) for k, t in rows]


KEY = st.sampled_from(["1", "2", "3", "never", None])
ROWS = st.lists(st.tuples(KEY, st.one_of(st.integers(0, 20), st.none())), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS.filter(lambda rows: any(t is not None for _, t in rows)))
def test_two_views_of_two_lifetimes_in_one_call_equal_brute_force_across_batch_borders(
    store, sources, small_batches, rows
):
    refs = [f"{view}:{f}" for view in TTL for f in ("n", "list")]
    found = pa.concat_tables(store.get_historical_features(_entities(rows), refs, full_feature_names=True).batches())
    assert found["label"].to_pylist() == list(range(len(rows)))
    for view in TTL:
        answers = _expected(sources[view], rows, view)
        assert found[f"{view}__n"].to_pylist() == answers
        assert found[f"{view}__list"].to_pylist() == [None if i is None else [i] * (i % 3) for i in answers]


def test_a_streamed_result_has_one_schema_though_its_first_batch_knows_no_key(store, sources, small_batches):
    rows = [(None, 5)] * 3 + [("1", 5), ("2", 12), ("3", 7), ("1", 9)]
    job = store.get_historical_features(_entities(rows), ["long:n"])
    parts = list(job.batches())
    assert [len(p) for p in parts] == [3, 3, 1] and len({p.schema for p in parts}) == 1
    assert pa.concat_tables(parts).equals(job.to_arrow())
    assert job.to_df()["n"].isna().tolist() == [i is None for i in _expected(sources["long"], rows, "long")]


def test_a_saved_dataset_streams_to_a_directory_and_replaces_what_was_there(store, root, small_batches):
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    job = store.get_historical_features(_entities([("1", t) for t in range(8)]), ["long:n"])
    storage = SavedDatasetFileStorage(path=str(root / "kept"))
    for _ in range(2):
        saved = store.create_saved_dataset(job, "kept", storage, allow_overwrite=True)
        columns = ["k", "n", "event_timestamp"]  # Feast reads back no more than keys, features and time
        assert saved.to_df()[columns].equals(job.to_df()[columns])
        assert store.get_saved_dataset("kept").to_df()[columns].equals(job.to_df()[columns])
        assert pq.read_table(root / "kept")["label"].to_pylist() == list(range(8))
    with pytest.raises(EvergreenError, match="local files only"):
        job.persist(SavedDatasetFileStorage(path="s3://bucket/kept"))


def test_an_on_demand_view_sees_all_rows_at_once_also_when_streamed(store, small_batches):
    job = store.get_historical_features(_entities([("1", 9 + t % 3) for t in range(7)]), ["ranked:rank"])
    parts = list(job.batches())
    assert len(parts) == 1 and parts[0]["rank"].to_pylist() == job.to_df()["rank"].tolist()
    assert sorted(parts[0]["rank"].to_pylist()) == list(range(1, 8))


def test_no_entity_rows_at_all_give_no_rows_with_all_columns(store):
    found = store.get_historical_features(_entities([("1", 5)])[:0], ["long:n", "short:list"]).to_arrow()
    assert found.num_rows == 0 and found.column_names == ["k", "event_timestamp", "label", "n", "list"]


def test_integer_keys_find_string_keys_and_nanoseconds_are_not_rounded(store, root):
    rows = _entities([(1, 999), (1, 1000), (2, 1000)], "ns").rename(columns={"k": "name"})
    rows["name"] = ["x", "x", "nobody"]
    assert store.get_historical_features(rows, ["single:n"]).to_df()["n"].fillna(-1).tolist() == [-1, 1, -1]
    numbers = _entities([(1, 12), (2, 12), (9, 12)]).astype({"k": "int64"})
    words = numbers.astype({"k": str})
    refs = ["long:n"]
    assert (
        store.get_historical_features(numbers, refs).to_arrow()["n"]
        == store.get_historical_features(words, refs).to_arrow()["n"]
    )


def test_one_view_asked_twice_under_two_keys_gives_each_its_own_answer(store, sources):
    rows = [("1", 9), ("2", 9), (None, 9)]
    frame = _entities(rows).rename(columns={"k": "buyer", "event_timestamp": "when"})
    frame["seller"] = ["2", "2", "1"]
    view = store.get_feature_view("long")
    from feast import FeatureService

    twice = [view[["n"]].with_name(name).with_join_key_map({"k": name}) for name in ("buyer", "seller")]
    store.apply(FeatureService(name="twice", features=twice))
    found = store.get_historical_features(frame, store.get_feature_service("twice"), full_feature_names=True).to_arrow()
    assert found["buyer__n"].to_pylist() == _expected(sources["long"], rows, "long")
    asked = [(k, 9) for k in frame["seller"]]
    assert found["seller__n"].to_pylist() == _expected(sources["long"], asked, "long")


def test_without_entity_rows_every_key_comes_at_each_instant_at_which_it_changed(store, sources):
    start, end = (pd.Timestamp(t, unit="us", tz="UTC").to_pydatetime() for t in (4, 9))
    job = store.get_historical_features(
        features=["long:n", "short:n"], full_feature_names=True, start_date=start, end_date=end
    )
    found = job.to_df()
    asked = [(k, t.value // 1000) for k, t in zip(found["k"], found["event_timestamp"], strict=True)]
    changed = set()
    for view in TTL:
        every = [(k, t) for k in ("1", "2", "3") for t in range(3, 10)]
        was = dict(zip(every, _lasting(sources[view], every), strict=True))
        changed |= {(k, t) for k, t in every if t > 3 and was[k, t] != was[k, t - 1]}
        assert [None if pd.isna(n) else n for n in found[f"{view}__n"]] == _expected(sources[view], asked, view)
    assert asked == sorted(changed, key=lambda kt: (kt[1], kt[0]))
    with pytest.raises(EvergreenError, match="different keys"):
        store.get_historical_features(features=["long:n", "single:n"], full_feature_names=True, end_date=end)


def _lasting(source, rows):
    known = [
        (k, *(None if pd.isna(t) else t.value // 1000 for t in times))
        for k, *times in zip(source["k"], source["event_timestamp"], source["created"], strict=True)
    ]
    return [_brute(known, k, t, 0, True) for k, t in rows]


def test_late_rows_show_when_the_store_is_told_so_unless_the_call_hides_them(store, root):
    from feature_repo.offline_store import AsofOfflineStore

    rows = pd.DataFrame({"name": ["x"], "event_timestamp": _t([1]), "n": [1], "created": _t([9])})
    rows.to_parquet(root / "late.parquet")
    view = store.get_feature_view("single")
    view.batch_source = _source("late.parquet", "created")
    asked = pd.DataFrame({"name": ["x"], "event_timestamp": _t([5])})
    config = store.config.model_copy(deep=True)
    for hidden, hide_late_rows, call in ((True, True, False), (False, False, False), (True, False, True)):
        config.offline_store.hide_late_rows = hide_late_rows
        job = AsofOfflineStore.get_historical_features(
            config, [view], ["single:n"], asked, store.registry, "p", filter_by_created_timestamp=call
        )
        assert (job.to_arrow()["n"].to_pylist() == [None]) == hidden


def test_rows_are_added_to_a_single_file_and_refused_when_their_columns_are_others(store, root):
    more = pd.DataFrame({"event_timestamp": _t([2], "us"), "n": [5], "name": ["y"]})
    store.write_to_offline_store("single", more)
    store.write_to_offline_store("single", more.assign(name="z"))
    assert pq.read_table(root / "single.parquet")["name"].to_pylist() == ["x", "y", "z"]
    with pytest.raises(ValueError, match="columns"):
        store.write_to_offline_store("single", more.assign(other=1), reorder_columns=False)


def test_pulled_rows_lie_between_both_ends_and_a_view_without_key_gets_feasts_own(store, root):
    from feast.feature_view import DUMMY_ENTITY_ID

    from feature_repo.offline_store import AsofOfflineStore

    source = store.get_feature_view("long").batch_source
    start, end = (pd.Timestamp(t, unit="us", tz="UTC").to_pydatetime() for t in (4, 9))
    pulled = AsofOfflineStore.pull_all_from_table_or_query(
        store.config, source, ["k"], ["n"], "event_timestamp", None, start, end
    ).to_df()
    assert set(pulled["event_timestamp"].astype("int64")) == set(range(4, 10))
    source = _source("global.parquet")
    for pull in (AsofOfflineStore.pull_all_from_table_or_query, AsofOfflineStore.pull_latest_from_table_or_query):
        one = pull(store.config, source, [], ["rate"], "event_timestamp", None, start.replace(microsecond=0), end)
        assert one.to_arrow().num_rows == 1 and DUMMY_ENTITY_ID in one.to_arrow().column_names


@pytest.mark.parametrize("as_file", [True, False])
def test_logged_features_are_added_beside_those_before(store, root, as_file):
    from feast.feature_logging import LoggingConfig
    from feast.infra.offline_stores.file_source import FileLoggingDestination

    from feature_repo.offline_store import AsofOfflineStore

    directory = root / f"log-{as_file}"
    config = LoggingConfig(destination=FileLoggingDestination(path=str(directory)))
    rows = pa.table({"a": [1, 2]})
    pq.write_table(rows, root / "rows.parquet")
    data = root / "rows.parquet" if as_file else rows
    for _ in range(2):
        AsofOfflineStore.write_logged_features(store.config, data, None, config, store.registry)
    assert pq.read_table(directory)["a"].to_pylist() == [1, 2, 1, 2]
