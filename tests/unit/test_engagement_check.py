"""Damage: a damaged file of a delivery is left out, a damaged part of the store is set aside and its rows come back."""

import polars as pl
import pyarrow.parquet as pq
import pytest

from engagement.errors import EvergreenError
from engagement.importers import contract_dir
from engagement.index import load_index
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.store_lab import LATER, Died, content, dying_at, parts_of_log, synth_store
from tests.synth import dataset, write_contract_dir


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 5] ^= 0xFF  # in a page; the end of so small a file is all footer
    path.write_bytes(damaged)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def remove(path):
    path.unlink()


def parquet_from(room):
    return lambda store: next(store.root / p.path for p in load_index(store.root) if p.room == room)


def rows_of(store):
    snapshot = store.snapshot(LATER)
    return snapshot.digest, snapshot.engagements(), snapshot.items(), snapshot.users()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("exposure", ["impressions", "positives"])
def test_check_and_import_bring_back_exactly_the_rows_that_damage_took(tmp_path, damage, exposure):
    store, delivery = synth_store(tmp_path, exposure=exposure)
    before = rows_of(store)
    part = parts_of_log(store)[1]
    damage(store.root / part.path)
    with pytest.raises(EvergreenError, match="evergreen data check`, then import the dataset again"):
        store.snapshot(LATER).engagements()
    report = store.check()
    (found,) = report.damaged
    assert (found.path, found.rows) == (part.path, part.rows)
    assert store.snapshot(LATER).engagements().num_rows < before[1].num_rows  # readable, and honest about the loss
    again = store.append(contract_dir.read(delivery))
    assert again.imported + again.sampled == part.rows
    assert rows_of(store) == before
    assert store.check().damaged == ()


@pytest.mark.parametrize("room", ["items", "users"])
def test_damaged_profiles_come_back_too(tmp_path, room):
    store, delivery = synth_store(tmp_path)
    before = rows_of(store)
    flip(parquet_from(room)(store))
    assert len(store.check().damaged) == 1
    store.append(contract_dir.read(delivery))
    assert rows_of(store) == before


def test_request_over_midnight_is_completed_again_with_the_same_candidates(tmp_path):
    rows = [{"at": 23.9, "save": True}, {"at": 24.1, "item_id": "i2", "save": True}]
    items = [f"i{n}" for n in range(1, 60)]
    store = EngagementStore(tmp_path)
    store.append(dataset(rows, items=items, exposure="positives"))
    before = rows_of(store)
    assert before[1].num_rows == 20
    for part in parts_of_log(store):  # first the day that holds the candidates, then the other one
        (store.root / part.path).unlink()
        store.check()
        store.append(dataset(rows, items=items, exposure="positives"))
        assert rows_of(store) == before


def test_damaged_part_is_kept_in_quarantine_and_survives_the_next_import(tmp_path):
    store, delivery = synth_store(tmp_path)
    part = parts_of_log(store)[0]
    truncate(store.root / part.path)
    damaged = (store.root / part.path).read_bytes()
    kept = store.root / store.check().damaged[0].kept
    store.append(contract_dir.read(delivery))
    assert kept.name.startswith("corrupt-") and kept.read_bytes() == damaged


def test_a_whole_store_is_reported_whole_and_not_touched(tmp_path):
    store, _ = synth_store(tmp_path)
    before = content(store.root)
    report = store.check()
    assert report.damaged == () and report.parts == len(load_index(store.root))
    assert report.bytes == sum((store.root / p.path).stat().st_size for p in load_index(store.root))
    assert content(store.root) == before


def test_damage_that_page_checksums_cannot_see_is_found(tmp_path):
    store, _ = synth_store(tmp_path)
    path = store.root / parts_of_log(store)[0].path
    pq.write_table(pq.read_table(path).slice(1), path)  # a valid file, but not the one that was written
    assert [d.reason for d in store.check().damaged] == ["its bytes have changed"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_check_killed_at_any_step_can_be_repeated(tmp_path, monkeypatch, step):
    store, delivery = synth_store(tmp_path)
    before = rows_of(store)
    for part in parts_of_log(store)[:2]:
        flip(store.root / part.path)
    with dying_at(monkeypatch, step), pytest.raises(Died):
        store.check()
    store.check()
    store.append(contract_dir.read(delivery))
    assert rows_of(store) == before


def test_recorded_snapshot_whose_part_was_damaged_loads_again_after_the_import(tmp_path):
    store, delivery = synth_store(tmp_path)
    recorded = store.snapshot(LATER)
    recorded.save()
    rows = recorded.engagements()
    flip(store.root / parts_of_log(store)[0].path)
    store.check()
    with pytest.raises(EvergreenError, match="it is missing.*data check"):
        Snapshot.load(store.root, recorded.digest)
    store.append(contract_dir.read(delivery))
    assert Snapshot.load(store.root, recorded.digest).engagements().equals(rows)


def test_a_damaged_compacted_part_comes_back_with_the_same_rows(tmp_path):
    store, delivery = synth_store(tmp_path)
    before = rows_of(store)
    twin, _ = synth_store(tmp_path, "twin", days=2)
    twin.append(contract_dir.read(delivery))
    twin.compact()
    flip(twin.root / parts_of_log(twin)[0].path)
    twin.check()
    twin.append(contract_dir.read(delivery))
    assert rows_of(twin)[1:] == before[1:]


# A delivery's own files --------------------------------------------------------------------------------------------


def quarantined(report):
    return pl.read_parquet(report.quarantine).filter(reason="unreadable_file")


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damaged_file_of_a_delivery_is_named_counted_and_left_out(tmp_path, damage):
    made = write_contract_dir(tmp_path / "d", users=5, items=40, days=10)
    whole = EngagementStore(tmp_path / "whole")
    whole.append(contract_dir.read(made))
    broken = made / "engagements" / "day-0004.parquet"
    table = pq.read_table(broken)
    pq.write_table(table, broken, write_page_checksum=True)
    good = broken.read_bytes()
    damage(broken)
    store = EngagementStore(tmp_path / "store")
    report = store.append(contract_dir.read(made))
    assert list(report.unreadable) == [str(broken)] and report.quarantined == {}
    assert quarantined(report)["file"].to_list() == [str(broken)]
    assert report.read == report.imported == whole.snapshot(LATER).engagements().num_rows - table.num_rows
    broken.write_bytes(good)  # delivered again
    assert store.append(contract_dir.read(made)).imported == table.num_rows
    assert store.snapshot(LATER).engagements().equals(whole.snapshot(LATER).engagements())


def test_a_tenth_of_damaged_files_passes_and_more_stops_the_import(tmp_path):
    made = write_contract_dir(tmp_path / "d", users=5, items=40, days=10)
    files = sorted((made / "engagements").iterdir())
    truncate(files[0])
    assert EngagementStore(tmp_path / "one").append(contract_dir.read(made)).imported
    truncate(files[1])
    with pytest.raises(EvergreenError, match=f"{files[1].name} cannot be read .* 2 of 10 files .* more than 10%"):
        EngagementStore(tmp_path / "two").append(contract_dir.read(made))
    assert not EngagementStore(tmp_path / "two").exists()


def test_damage_deep_inside_a_file_leaves_no_half_of_it_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("engagement.importers.contract_dir.BATCH_ROWS", 20)
    made = write_contract_dir(tmp_path / "d", users=5, items=40, days=10)
    broken = made / "engagements" / "day-0003.parquet"
    table = pq.read_table(broken)
    pq.write_table(table, broken, row_group_size=20, write_page_checksum=True)
    damaged = bytearray(broken.read_bytes())
    damaged[len(damaged) * 3 // 5] ^= 0xFF  # most row groups before it are fine
    broken.write_bytes(damaged)
    store = EngagementStore(tmp_path / "store")
    assert list(store.append(contract_dir.read(made)).unreadable) == [str(broken)]
    stored = set(store.snapshot(LATER).engagements()["request_id"].to_pylist())
    assert not stored & set(table["request_id"].to_pylist())


@pytest.mark.parametrize("room", ["items", "users"])
def test_the_only_profile_file_damaged_stops_the_import(tmp_path, room):
    made = write_contract_dir(tmp_path / "d", users=5, items=40, days=2)
    truncate(made / room / f"{room}.parquet")
    with pytest.raises(EvergreenError, match=f"{room}.parquet cannot be read .* 1 of 1 files of {room}"):
        contract_dir.read(made)
