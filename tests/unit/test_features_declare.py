"""The declaration, the encoding of single values, and datasets with few or odd features."""

import math

import numpy as np
import pyarrow as pa
import pytest

from engagement.contract import Manifest
from engagement.errors import EvergreenError
from engagement.table import MISSING, Feature, TableSpec, hash_id
from feature_repo.encode import DAY_US, HOUR_US, candidate_values, encode, request_values
from feature_repo.features import category_of, declare, sized, views
from feature_repo.repo import FeatureRepo
from tests.features_world import DAY, import_synth, scratch, world
from tests.synth import START

NAMES = {"name": "x", "actions": ("like", "hide"), "primary_action": "like", "exposure": "impressions"}
STRINGS = pa.list_(pa.string())
ITEMS = pa.schema([("item_id", pa.string()), ("embedding", pa.list_(pa.float32(), 4)), ("kinds", STRINGS)])


def _spec(*features):
    return TableSpec(features, ("like",), "like")


def test_every_declared_feature_is_in_exactly_one_view_or_is_worked_out():
    manifest = Manifest(**NAMES, item_features=("kinds",), context_features=("page",))
    spec = declare(manifest, ITEMS, pa.schema([("user_id", pa.string())]))
    names = [f.name for f in spec.features]
    assert len(set(names)) == len(names)
    stored = {f"{v.name}__{c}" for v in views(spec) for c, _ in v.columns if v.offline and not c.startswith("_")}
    worked_out = {"user_id", "item_id", "context__page", "hour_of_day", "day_of_week"}
    worked_out |= {"days_since_action", "item_age_days"}
    assert stored | worked_out == set(names) and not stored & worked_out
    embedding = next(f for f in spec.features if f.name == "item_profile__embedding")
    assert (embedding.kind, embedding.width, embedding.level) == ("embedding", 4, "candidate")
    assert {"item_stats__count_like_7d", "user_stats__rate_hide_30d", "user_category_stats__rate_like_1h"} <= stored
    levels = {f.name.split("__")[0]: f.level for f in spec.features if "_stats__" in f.name}
    assert levels == {v.name: v.level for v in views(spec) if v.name.endswith("_stats")}
    assert levels.pop("user_stats") == "request" and set(levels.values()) == {"candidate"} and len(levels) == 3
    assert TableSpec.from_json(spec.to_json()) == spec


def _items(**types):
    return pa.schema([("item_id", pa.string()), *types.items()])


@pytest.mark.parametrize(
    ("items", "category"),
    [
        (_items(shop=pa.string(), kinds=STRINGS, tags=STRINGS), "kinds"),
        (_items(price=pa.float64(), shop=pa.string(), kind=pa.string()), "shop"),
        (_items(price=pa.float64()), None),
        (_items(), None),
    ],
)
def test_the_category_is_the_first_list_of_text_else_the_first_text(items, category):
    spec = declare(Manifest(**NAMES, item_features=tuple(items.names[1:])), items, pa.schema([]))
    assert category_of(spec) == category
    names = {v.name for v in views(spec)}
    assert ({"category_stats", "user_category_stats"} <= names) == (category is not None)
    profile = next(v for v in views(spec) if v.name == "item_profile")
    assert (("_category", "string") in profile.columns) == (category is not None)


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.list_(pa.int64()), pa.binary()])
def test_a_type_that_no_feature_can_have_is_told_by_column(kind):
    manifest = Manifest(**NAMES, item_features=("odd",))
    with pytest.raises(EvergreenError, match="column 'odd' of the items has the type"):
        declare(manifest, pa.schema([("item_id", pa.string()), ("odd", kind)]), pa.schema([]))


def test_a_missing_column_and_a_taken_name_are_told():
    with pytest.raises(EvergreenError, match="users lack the column 'age'"):
        declare(Manifest(**NAMES, user_features=("age",)), ITEMS, pa.schema([]))
    with pytest.raises(EvergreenError, match="'event_timestamp' cannot name a feature"):
        declare(Manifest(**NAMES, item_features=("event_timestamp",)), ITEMS, pa.schema([]))


def test_embeddings_get_the_commonest_width_and_the_others_become_null():
    values = [[1.0, 2.0], None, [3.0], [], [4.0, 5.0]]
    items = pa.table({"item_id": list("abcde"), "embedding": pa.array(values, pa.list_(pa.float32()))})
    fixed = sized(items).column("embedding")
    assert fixed.type.list_size == 2
    assert fixed.to_pylist() == [[1.0, 2.0], None, None, None, [4.0, 5.0]]
    nothing = items.set_column(1, "embedding", pa.array([None] * 5, pa.list_(pa.float32())))
    assert sized(nothing).column_names == ["item_id"]


def test_lists_are_cut_at_their_width_and_nulls_are_missing():
    spec = _spec(Feature("kinds", "candidate", "categories", 3))
    values = pa.array([["a", "b", "c", "d"], [], None, ["b", None]], pa.list_(pa.string()))
    hashed, _ = encode(spec, "candidate", {"kinds": values}, 4)
    a, b, c = (hash_id("kinds", v) for v in "abc")
    assert hashed.tolist() == [[a, b, c], [MISSING] * 3, [MISSING] * 3, [b, MISSING, MISSING]]
    sliced, _ = encode(spec, "candidate", {"kinds": values.slice(3)}, 1)
    assert sliced.tolist() == [[b, MISSING, MISSING]]


def test_numbers_that_float32_cannot_hold_are_no_values():
    spec = _spec(Feature("n", "candidate", "numeric"), Feature("c", "candidate", "numeric", transform="log1p"))
    values = pa.array([1.5, None, math.nan, math.inf, 1e300])
    _, numbers = encode(spec, "candidate", {"n": values, "c": pa.array([0.0, -1.0, 1.0, None, math.inf])}, 5)
    np.testing.assert_array_equal(numbers[:, 0], np.array([1.5, np.nan, np.nan, np.nan, np.nan], np.float32))
    np.testing.assert_allclose(numbers[:, 1], [0, 0, np.log(2), np.nan, np.nan], rtol=1e-6)


def test_embeddings_of_another_length_are_no_values():
    spec = _spec(Feature("e", "candidate", "embedding", 2))
    values = pa.array([[1, 2], None, [3], [4, math.inf]], pa.list_(pa.float32()))
    _, numbers = encode(spec, "candidate", {"e": values}, 4)
    np.testing.assert_array_equal(numbers, np.array([[1, 2], [np.nan] * 2, [np.nan] * 2, [4, np.nan]], np.float32))


def test_a_feature_that_is_not_there_has_no_value_anywhere():
    spec = _spec(Feature("a", "request", "categorical"), Feature("b", "request", "numeric"))
    hashed, numbers = encode(spec, "request", {}, 2)
    assert (hashed == MISSING).all() and np.isnan(numbers).all()


def test_hours_weekdays_and_ages_are_those_of_utc():
    time = np.array([0, DAY_US * 4 + 23 * 3_600_000_000], np.int64)  # a Thursday midnight; a Monday, 23 h
    raw = request_values(time, np.array([np.nan, DAY_US * 4.0]))
    assert raw["hour_of_day"].to_pylist() == ["0", "23"]
    assert raw["day_of_week"].to_pylist() == ["3", "0"]
    assert raw["days_since_action"].to_pylist() == [None, pytest.approx(23 / 24)]
    age = candidate_values(np.array([5, 5, 5]), pa.array([0, 9, None], pa.int64()))["item_age_days"].to_pylist()
    assert age == [pytest.approx(5 / DAY_US), 0.0, None]


@pytest.mark.parametrize("exposure", ["impressions", "positives"])
def test_a_dataset_without_any_profile_feature_works_from_build_to_serving(exposure):
    world()  # Feast is imported once for all
    home = scratch()
    options = {"user_features": False, "item_features": False, "actions": ("like", "share"), "exposure": exposure}
    store = import_synth(home, users=8, items=20, days=4, **options)
    at = START + 3 * DAY + DAY / 8
    snapshot, repo = store.snapshot(at), FeatureRepo(home / "features")
    table = repo.table(snapshot, START, at, home / "out")
    assert table.spec.actions == ("like", "share")
    assert [f.name for f in table.spec.of("candidate", hashed=True)] == ["item_id"]
    assert bool(table.sampled.any()) == (exposure == "positives")
    assert not table.labels[table.sampled].any()
    assert set(np.unique(table.history_actions)) <= {1, 2, 3}
    # In the first hour nothing was known before: no numbers, yet every request is there.
    first = table.between(0, (int(table.time[0]) // HOUR_US + 1) * HOUR_US)
    stats = [i for i, f in enumerate(table.spec.of("candidate", False)) if "stats" in f.name]
    assert first.requests and len(stats) == 13 and np.isnan(first.item_num[:, stats]).all()
    repo.materialize(snapshot)
    served = repo.online().read("u1", ["i1", "i2"], {}, at)
    assert np.isfinite(served.request_num).any() and len(served.history_time)


def test_an_instant_on_the_first_day_has_features_too():
    world()
    home = scratch()
    store = import_synth(home, users=8, items=20, days=2)
    snapshot, repo = store.snapshot(START + DAY / 2), FeatureRepo(home / "features")
    table = repo.table(snapshot, START, START + DAY, home / "out")
    assert table.requests and table.time.max() < int((START + DAY / 2).timestamp() * 1e6)
    repo.materialize(snapshot)
    assert len(repo.online().read("u0", ["i0"], {}, START + DAY / 2).history_time)
