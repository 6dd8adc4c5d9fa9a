"""The store: idempotent, additive, point-in-time, and stable under newer data."""

import hashlib
from datetime import UTC, datetime, timedelta, timezone

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engagement.contract import engagement_schema
from engagement.errors import EvergreenError
from engagement.importers import contract_dir
from engagement.index import from_us
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.synth import START, UTC_US, dataset, write_contract_dir

LATER = datetime(2030, 1, 1, tzinfo=UTC)


def hours(n):
    return START + timedelta(hours=n)


def content(root):
    """Bytes of everything that makes up a store, by path."""
    skipped = {".lock"}
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in skipped
    }


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    return write_contract_dir(tmp_path_factory.mktemp("synth"), users=15, items=60, days=14)


@pytest.fixture(scope="module")
def store(delivered, tmp_path_factory):
    made = EngagementStore(tmp_path_factory.mktemp("store"))
    made.append(contract_dir.read(delivered))
    return made


def test_what_went_in_comes_out(store, delivered):
    given_rows = pl.read_parquet(delivered / "engagements" / "*.parquet")
    stored = store.snapshot(LATER).engagements()
    assert stored.schema == engagement_schema(store.manifest)
    order = ["event_timestamp", "request_id", "item_id"]
    found = pl.from_arrow(stored)
    assert found.drop("sampled").equals(given_rows.sort(order).select(found.drop("sampled").columns))
    assert not found["sampled"].any()
    assert store.time_range() == (found["event_timestamp"].min(), found["event_timestamp"].max())


def test_importing_again_changes_no_byte(store, delivered):
    before = content(store.root)
    report = store.append(contract_dir.read(delivered))
    assert (report.imported, report.already_present, report.sampled) == (0, report.read, 0)
    assert content(store.root) == before


def test_order_and_batches_of_a_delivery_change_no_byte(store, delivered, tmp_path):
    made = contract_dir.read(delivered)
    whole = pa.concat_tables(made.engagements)
    turned = whole.take(pa.array(range(whole.num_rows))[::-1])
    batches = [turned.slice(n, 97) for n in range(0, turned.num_rows, 97)]
    other = EngagementStore(tmp_path)
    other.append(type(made)(made.manifest, iter(batches), made.items, made.users))
    assert content(tmp_path) == {k: v for k, v in content(store.root).items() if not k.startswith("snapshots")}


@pytest.mark.parametrize("exposure", ["impressions", "positives"])
def test_many_small_groups_on_disk_give_the_bytes_of_one_in_memory(tmp_path, monkeypatch, exposure):
    made = write_contract_dir(tmp_path / "d", users=15, items=60, days=4, exposure=exposure)
    again = pq.read_table(made / "engagements" / "day-0000.parquet").slice(0, 9)
    pq.write_table(again, made / "engagements" / "day-0009.parquet")  # duplicates, so that there is a quarantine
    whole, pieces = EngagementStore(tmp_path / "whole"), EngagementStore(tmp_path / "pieces")
    whole.append(contract_dir.read(made))
    monkeypatch.setattr("engagement.spill.GROUP_ROWS", 200)
    monkeypatch.setattr("engagement.spill.FLUSH_ROWS", 100)
    monkeypatch.setattr("engagement.importers.contract_dir.BATCH_ROWS", 70)
    report = pieces.append(contract_dir.read(made))
    assert report.quarantined == {"duplicate": 9}
    assert pieces.snapshot(LATER).digest == whole.snapshot(LATER).digest


def test_a_large_day_becomes_several_parts_with_the_same_rows(delivered, store, tmp_path, monkeypatch):
    monkeypatch.setattr("engagement.parts.PART_ROWS", 100)
    split = EngagementStore(tmp_path)
    split.append(contract_dir.read(delivered))
    snapshot, reference = split.snapshot(LATER), store.snapshot(LATER)
    parts = snapshot.parts("engagements")
    assert len(parts) > len(reference.parts("engagements")) == 14 and sum(p.rows for p in parts) == sum(
        p.rows for p in reference.parts("engagements")
    )
    assert snapshot.engagements().equals(reference.engagements())


def test_newer_days_leave_an_old_snapshot_as_it_was(tmp_path):
    world = {"users": 15, "items": 60}
    store = EngagementStore(tmp_path / "store")
    store.append(contract_dir.read(write_contract_dir(tmp_path / "a", days=14, **world)))
    as_of = START + timedelta(days=10, hours=3)
    old = store.snapshot(as_of)
    rows = old.engagements()
    report = store.append(contract_dir.read(write_contract_dir(tmp_path / "b", days=21, first=12, **world)))
    assert report.imported and report.already_present  # days 12 and 13 overlap
    again = store.snapshot(as_of)
    assert (again.digest, again.files) == (old.digest, old.files) and again.engagements().equals(rows)
    once = EngagementStore(tmp_path / "once")
    once.append(contract_dir.read(write_contract_dir(tmp_path / "c", days=21, **world)))
    assert once.snapshot(LATER).engagements().equals(store.snapshot(LATER).engagements())


def test_late_row_is_invisible_before_it_was_known(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(dataset([{"at": 1}, {"at": 1, "item_id": "i2", "known": 30}]))
    seen = [store.snapshot(hours(n)).engagements()["item_id"].to_pylist() for n in (1, 1.01, 30, 30.01)]
    assert seen == [[], ["i1"], ["i1"], ["i1", "i2"]]


def test_row_shown_exactly_at_as_of_is_invisible(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(dataset([{"at": 1}]))
    assert store.snapshot(hours(1)).engagements().num_rows == 0
    assert store.snapshot(hours(1) + timedelta(microseconds=1)).engagements().num_rows == 1


def test_late_row_delivered_later_changes_only_snapshots_that_see_it(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(dataset([{"at": 1}, {"at": 2, "item_id": "i2"}]))
    before = {n: store.snapshot(hours(n)).digest for n in (3, 40, 50)}
    store.append(dataset([{"at": 1.5, "known": 40, "item_id": "i3"}]))
    assert [store.snapshot(hours(n)).digest for n in (3, 40)] == [before[3], before[40]]
    assert store.snapshot(hours(50)).digest != before[50]
    assert store.snapshot(hours(50)).engagements()["item_id"].to_pylist() == ["i1", "i3", "i2"]


def test_row_that_contradicts_the_store_is_quarantined_and_the_stored_one_kept(tmp_path):
    good = [{"request_id": f"x{n}"} for n in range(30)]
    store = EngagementStore(tmp_path)
    store.append(dataset([*good, {"at": 1}]))
    report = store.append(dataset([*good, {"at": 1, "save": True}, {"at": 1, "item_id": "i2", "user_id": "u2"}]))
    assert report.quarantined == {"other_user": 1, "repeated_item": 1} and report.already_present == 30
    assert store.snapshot(LATER).engagements(start=hours(1))["save"].to_pylist() == [False]


def test_window_includes_its_start_and_excludes_its_end(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(dataset([{"request_id": f"r{n}", "at": n} for n in (1, 24, 25, 48)]))
    snapshot = store.snapshot(LATER)
    rows = snapshot.engagements(start=hours(24), end=hours(48))
    assert rows["request_id"].to_pylist() == ["r24", "r25"]
    assert snapshot.engagements(start=hours(49)).num_rows == 0
    assert store.snapshot(hours(25)).engagements(start=hours(2), end=hours(48))["request_id"].to_pylist() == ["r24"]


def test_ties_come_out_in_one_order(tmp_path):
    rows = [{"request_id": r, "item_id": i, "at": 1} for r in ("b", "a") for i in ("i3", "i1", "i2")]
    store = EngagementStore(tmp_path)
    store.append(dataset(rows))
    out = store.snapshot(LATER).engagements()
    assert list(zip(out["request_id"].to_pylist(), out["item_id"].to_pylist(), strict=True)) == sorted(
        (r["request_id"], r["item_id"]) for r in rows
    )


def test_items_and_users_appear_when_they_are_valid(tmp_path):
    items = pa.table(
        {"item_id": ["i1", "i2"], "created_timestamp": pa.array([0, 9], pa.int64()).cast("timestamp[s]").cast(UTC_US)}
    )
    users = pa.table(
        {
            "user_id": ["u1", "u1"],
            "event_timestamp": pa.array([1, 5], pa.int64()).cast("timestamp[s]").cast(UTC_US),
            "age": [30, 31],
        }
    )
    store = EngagementStore(tmp_path)
    store.append(dataset([{}], items=items, users=users, user_features=("age",)))
    early, late = store.snapshot(from_us(5_000_000)), store.snapshot(from_us(9_000_001))
    assert early.items()["item_id"].to_pylist() == ["i1"] and late.items()["item_id"].to_pylist() == ["i1", "i2"]
    assert early.users()["age"].to_pylist() == [30.0] and late.users()["age"].to_pylist() == [30.0, 31.0]


def test_no_users_and_no_features_at_all(tmp_path):
    directory = write_contract_dir(
        tmp_path / "d", users=5, days=2, user_features=False, item_features=False, actions=("like",)
    )
    (directory / "users" / "users.parquet").unlink()
    (directory / "users").rmdir()
    store = EngagementStore(tmp_path / "s")
    assert store.append(contract_dir.read(directory)).imported
    users = store.snapshot(LATER).users()
    assert users.num_rows == 0 and users.column_names == ["user_id", "event_timestamp"]
    assert store.snapshot(LATER).items().column_names == ["item_id", "created_timestamp"]


def test_a_second_delivery_may_bring_embeddings_and_new_items(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(dataset([{}]))
    times = pa.array([0, 0], pa.int64()).cast("timestamp[s]").cast(UTC_US)
    items = pa.table({"item_id": ["n1", "n2"], "created_timestamp": times, "embedding": [[1.0], [2.0]]})
    store.append(dataset([{"request_id": "r2", "item_id": "n1"}, {"request_id": "r2", "item_id": "i1"}], items=items))
    stored = store.snapshot(LATER).items()
    assert dict(zip(stored["item_id"].to_pylist(), stored["embedding"].to_pylist(), strict=True)) == {
        "i1": None, "i2": None, "i3": None, "n1": [1.0], "n2": [2.0],
    }  # fmt: skip


def test_another_dataset_is_sent_to_another_home(store, tmp_path):
    made = write_contract_dir(tmp_path, users=3, days=1, actions=("save", "click"))
    with pytest.raises(EvergreenError, match="differs in actions, negative_actions.* another --home"):
        store.append(contract_dir.read(made))


def test_a_store_without_data_says_what_to_run(tmp_path):
    store = EngagementStore(tmp_path / "none")
    assert not store.exists()
    for call in (lambda: store.snapshot(LATER), store.time_range, lambda: store.manifest):
        with pytest.raises(EvergreenError, match="evergreen data fetch"):
            call()


def test_a_snapshot_before_all_data_is_empty_but_typed(store):
    empty = store.snapshot(datetime(1990, 1, 1, tzinfo=UTC))
    assert empty.files == () and empty.engagements().schema == engagement_schema(store.manifest)
    assert empty.items().num_rows == empty.users().num_rows == 0


def test_an_instant_without_a_zone_is_refused(store):
    with pytest.raises(EvergreenError, match="no time zone"):
        store.snapshot(datetime(2024, 1, 10))


def test_the_digest_names_instant_and_data(store):
    one, other = hours(24 * 9), hours(24 * 9 + 1)
    assert store.snapshot(one).digest == store.snapshot(one).digest != store.snapshot(other).digest
    tokyo = one.astimezone(timezone(timedelta(hours=9)))
    assert store.snapshot(tokyo) == store.snapshot(one)


def test_a_saved_snapshot_is_read_back_whole(store):
    snapshot = store.snapshot(hours(24 * 9))
    first = snapshot.save().read_bytes()
    assert snapshot.save().read_bytes() == first
    loaded = Snapshot.load(store.root, snapshot.digest)
    assert loaded == snapshot and loaded.engagements().equals(snapshot.engagements())


def test_reports_read_equals_the_sum_of_its_parts(store, delivered, tmp_path):
    made = contract_dir.read(delivered)
    whole = pa.concat_tables(made.engagements)
    doubled = [whole.slice(0, 900), whole.slice(800, 400)]
    report = EngagementStore(tmp_path).append(type(made)(made.manifest, doubled, made.items, made.users))
    assert report.quarantined == {"duplicate": 100} and report.read == 1300 == report.imported + 100
    plain = report.to_json()
    assert plain["first"].endswith("+00:00") and plain["quarantine"].endswith(".parquet")


rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "request_id": st.sampled_from(["a", "b", "c"]),
            "user_id": st.sampled_from(["u1", "u1", "u1", "u2"]),
            "item_id": st.sampled_from(["i1", "i2", "i3"]),
            "at": st.sampled_from([0, 1, 23, 24, 25]),
            "known": st.sampled_from([0, 24, 26, 50]),
            "save": st.booleans(),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(rows_strategy, st.integers(0, 12))
def test_any_split_into_deliveries_ends_as_a_brute_force_log(tmp_path_factory, rows, cut):
    good = [{"request_id": f"ok{n}", "item_id": "i1", "at": 2} for n in range(130)]  # keeps the bad share below 10 %
    store = EngagementStore(tmp_path_factory.mktemp("split"))
    for delivery in (rows[:cut], rows[cut:], rows):
        if delivery:
            report = store.append(dataset([*good, *({"known": r["at"]} | r for r in delivery)]))
            assert report.read == report.imported + report.already_present + sum(report.quarantined.values())
    owner, kept = {}, {}
    for row in rows:
        known = max(row["at"], row["known"])
        if owner.setdefault(row["request_id"], row["user_id"]) == row["user_id"]:
            kept.setdefault((row["request_id"], row["item_id"]), (row["at"], known, row["save"]))
    for as_of in (0.5, 24, 25.5, 60):
        seen = store.snapshot(hours(as_of)).engagements().to_pylist()
        found = {(r["request_id"], r["item_id"]): r for r in seen if not r["request_id"].startswith("ok")}
        expected = {k: v for k, v in kept.items() if v[1] < as_of}
        assert found.keys() == expected.keys()
        for key, (at, known, save) in expected.items():
            row = found[key]
            assert (row["event_timestamp"], row["created_timestamp"], row["save"]) == (hours(at), hours(known), save)
