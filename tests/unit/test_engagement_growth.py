"""Deliveries with more features than the store has: they are taken, and what was there stays as it was."""

import json

import pyarrow.parquet as pq
import pytest

from engagement.compact import compact
from engagement.errors import EvergreenError
from engagement.importers import contract_dir
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.synth import START, dataset, write_contract_dir
from tests.unit.test_engagement_store import LATER, content, hours

OLD = [{"request_id": "r1", "item_id": i, "at": 1, "save": i == "i1", "surface": "home"} for i in ("i1", "i2")]
NEW = [{"request_id": "r2", "item_id": i, "at": 30, "surface": "home", "device": "phone"} for i in ("i1", "n1")]


def first(rows=OLD):
    return dataset(
        rows, context_features=("surface",), item_features=("colour",), items=items({"i1": "red", "i2": None})
    )


def items(colours, at=-24, **more):
    table = dataset([{}], items=tuple(colours)).items.append_column("colour", [list(colours.values())])
    for name, values in more.items():
        table = table.append_column(name, [values])
    return table


def second(rows=NEW, colours=("red", None, "blue"), lengths=(1.0, 2.0, 3.0)):
    given = items(dict(zip(("i1", "i2", "n1"), colours, strict=True)), length=list(lengths))
    return dataset(rows, context_features=("surface", "device"), item_features=("length", "colour"), items=given)


@pytest.fixture
def store(tmp_path):
    made = EngagementStore(tmp_path / "data")
    made.append(first())
    return made


def test_features_are_added_behind_those_of_the_store_and_old_rows_have_no_value(store):
    store.append(second())
    assert store.manifest.item_features == ("colour", "length")
    assert store.manifest.context_features == ("surface", "device")
    seen = store.snapshot(LATER)
    assert seen.manifest == store.manifest
    assert seen.engagements()["device"].to_pylist() == [None, None, "phone", "phone"]
    assert dict(zip(*seen.items().select(["item_id", "length"]).to_pydict().values(), strict=True)) == {
        "i1": None, "i2": None, "n1": 3.0,
    }  # fmt: skip


def test_old_snapshots_keep_their_digest_and_know_nothing_of_the_feature(store):
    before = store.snapshot(hours(10))
    before.save()
    rows = [dict(row, item_id=i) for row, i in zip(NEW, ("i1", "i2"), strict=True)]
    grown = dataset(rows, context_features=("surface", "device"), item_features=("colour",), items=first().items)
    store.append(grown)
    assert store.snapshot(hours(40)).manifest.context_features == ("surface", "device")
    after = store.snapshot(hours(10))
    assert after.digest == before.digest and after.manifest == before.manifest
    assert after.engagements().column_names == before.engagements().column_names
    assert Snapshot.load(store.root, before.digest).engagements().equals(before.engagements())


@pytest.mark.parametrize("again", [1, 2])
def test_old_rows_and_items_delivered_again_with_the_feature_are_present_and_no_fault(store, again):
    rows = [*({**row, "device": "phone"} for row in OLD), *NEW]
    for _ in range(again):
        report = store.append(second(rows))
    assert report.quarantined == report.quarantined_items == {}
    assert report.already_present == (2 if again == 1 else 4)


def test_stored_value_of_an_added_feature_is_right_against_a_later_other_one(store):
    store.append(second())
    other = [dict(row, device="desk") for row in NEW]
    with pytest.raises(EvergreenError, match="repeated_item"):
        store.append(second(other))
    assert store.append(second(lengths=(9.0, 9.0, 9.0))).quarantined_items == {"changed": 1}  # n1 alone has a value


def test_vanished_feature_is_refused_by_name_and_nothing_changes(store):
    store.append(second())
    before = content(store.root)
    with pytest.raises(EvergreenError, match="lacks the feature 'device' of engagements, 'length' of items"):
        store.append(first())
    assert content(store.root) == before


def test_import_of_more_features_twice_leaves_the_same_bytes_and_compaction_keeps_all(store):
    store.append(second())
    before = content(store.root)
    store.append(second())
    assert content(store.root) == before
    more = [dict(row, request_id="r4", at=2, device="desk") for row in OLD]
    store.append(second(more))
    seen = store.snapshot(LATER)
    old = store.snapshot(hours(1.5))
    compact(store.root)
    for was in (seen, old):
        now = store.snapshot(was.as_of)
        assert now.digest == was.digest and now.manifest == was.manifest
        assert now.engagements().equals(was.engagements())
    assert store.snapshot(LATER).engagements()["device"].to_pylist() == [None, None, "desk", "desk", "phone", "phone"]


def test_features_grow_from_one_directory_to_the_next(tmp_path):
    store = EngagementStore(tmp_path / "data")
    store.append(contract_dir.read(write_contract_dir(tmp_path / "a", users=8, items=40, days=7)))
    later = write_contract_dir(tmp_path / "b", users=8, items=40, days=10, first=7)
    table = pq.read_table(later / "users" / "users.parquet")
    pq.write_table(table.append_column("plan", [["free"] * table.num_rows]), later / "users" / "users.parquet")
    manifest = json.loads((later / "manifest.json").read_text())
    manifest["user_features"].append("plan")
    (later / "manifest.json").write_text(json.dumps(manifest))
    report = store.append(contract_dir.read(later))
    assert report.quarantined_users == {} and store.snapshot(START).users().num_rows == 8
    # No new user came: nothing holds the feature, and so the store does not have it.
    assert store.manifest.user_features == ("country", "age")
