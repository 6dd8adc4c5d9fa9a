"""The manifest: what is accepted, and that every problem is told at once."""

import json

import pyarrow as pa
import pytest

from engagement.contract import Manifest, engagement_schema, feature_type, item_schema, user_schema
from engagement.errors import EvergreenError

GOOD = {"name": "x", "version": 1, "actions": ["like"], "primary_action": "like", "exposure": "impressions"}


def problems(**changes):
    with pytest.raises(EvergreenError) as caught:
        Manifest.from_json(GOOD | changes)
    assert "\n" not in str(caught.value)
    return caught.value.problem


def test_the_smallest_manifest_is_enough():
    manifest = Manifest.from_json(GOOD)
    assert (manifest.user_features, manifest.item_features, manifest.context_features) == ((), (), ())
    names = ["request_id", "user_id", "item_id", "event_timestamp", "created_timestamp", "position", "sampled", "like"]
    assert engagement_schema(manifest).names == names


def test_saved_and_loaded_it_is_the_same(tmp_path):
    manifest = Manifest.from_json(GOOD | {"item_features": ["a"], "negative_actions": [], "licence": "CC0"})
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_every_problem_is_named_in_one_line():
    told = problems(name="", version=2, exposure="clicks", actions="like", licence=3)
    for part in ("'name'", "'version' must be 1", "'exposure'", "'actions' must be a list", "'licence' must be text"):
        assert part in told


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"primary_action": "save"}, "'save' is not among the actions"),
        ({"negative_actions": ["hide"]}, "'hide' is not among the actions"),
        ({"negative_actions": ["like"]}, "cannot be negative"),
        ({"actions": ["like", "item_id"]}, "'item_id' is a fixed column of engagements"),
        ({"actions": ["like", "Sampled"]}, "'Sampled' is a fixed column"),
        ({"actions": ["like", "LIKE"]}, "'LIKE' is named twice"),
        ({"context_features": ["like"]}, "'like' is named twice"),
        ({"actions": ["like", "no good"]}, "'no good' cannot name a column"),
        ({"actions": ["like", "_x"]}, "'_x' cannot name a column"),
        ({"item_features": ["embedding"]}, "'embedding' is a fixed column of items"),
        ({"user_features": ["event_timestamp"]}, "'event_timestamp' is a fixed column of users"),
        ({"actions": []}, "not among the actions"),
        ({"primary_action": None}, "not among the actions"),
        ({"version": True}, "'version' must be 1"),
        ({"item_features": [1]}, "'item_features' must be a list of names"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong(changes, expected):
    assert expected in problems(**changes)


def test_user_and_item_features_may_share_a_name():
    assert Manifest.from_json(GOOD | {"user_features": ["language"], "item_features": ["language"]})


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{", ""])
def test_a_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(EvergreenError, match="manifest.json"):
        Manifest.load(tmp_path)


def test_a_directory_without_manifest_is_named(tmp_path):
    with pytest.raises(EvergreenError, match=str(tmp_path)):
        Manifest.load(tmp_path)


def test_licence_and_source_may_differ_between_deliveries():
    one = Manifest.from_json(GOOD | {"licence": "a", "source": "b"})
    assert one.difference(Manifest.from_json(GOOD)) == []
    assert one.difference(Manifest.from_json(GOOD | {"exposure": "positives"})) == ["exposure"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (pa.int8(), pa.float64()),
        (pa.float32(), pa.float64()),
        (pa.bool_(), pa.float64()),
        (pa.decimal128(9, 2), pa.float64()),
        (pa.large_string(), pa.string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.null(), pa.string()),
        (pa.large_list(pa.large_string()), pa.list_(pa.string())),
        (pa.list_(pa.null()), pa.list_(pa.string())),
    ],
)
def test_a_feature_is_stored_as_text_list_or_number(given, stored):
    assert feature_type("items", "f", pa.schema([("f", given)])) == stored


@pytest.mark.parametrize(
    "given", [pa.timestamp("us"), pa.list_(pa.int64()), pa.struct([("a", pa.int8())]), pa.binary()]
)
def test_a_feature_of_another_type_is_named(given):
    with pytest.raises(EvergreenError, match="column 'f' of items has the type"):
        feature_type("items", "f", pa.schema([("f", given)]))


def test_a_feature_that_is_missing_is_named():
    manifest = Manifest.from_json(GOOD | {"user_features": ["age"], "item_features": ["genre"]})
    with pytest.raises(EvergreenError, match="users lack the column 'age'"):
        user_schema(manifest, pa.schema([("user_id", pa.string())]))
    with pytest.raises(EvergreenError, match="items lack the column 'genre'"):
        item_schema(manifest, pa.schema([("item_id", pa.string())]))


def test_the_manifest_is_plain_json():
    assert json.loads(json.dumps(Manifest.from_json(GOOD).to_json())) == Manifest.from_json(GOOD).to_json()
