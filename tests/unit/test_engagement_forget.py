"""Forgetting a user: gone from every file at once, kept out for good, and honest about who saw the user."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from engagement.contract import Dataset
from engagement.errors import EvergreenError
from engagement.forget import TOMBSTONES, quarantined_user
from engagement.importers import contract_dir
from engagement.index import load_index
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.store_lab import LATER, Died, content, dying_at, hours, in_small_appends, parts_of_log, synth_store
from tests.synth import START, UTC_US, dataset

USER = "u3"


def without(table, user=USER):
    return table.filter(pc.not_equal(table["user_id"], user))


def on_disk(root, user=USER):
    """Files below a directory that name the user in their bytes once decoded, or in a text."""
    found = []
    for path in (p for p in root.rglob("*") if p.is_file()):
        if path.suffix == ".parquet" and not path.name.startswith("corrupt-"):
            frame = pl.read_parquet(path)
            text = frame.select(pl.selectors.string()).select(pl.all().str.contains(rf'(^|"){user}("|$)').any())
            if any(text.row(0)) if text.height else False:
                found.append(path)
        elif user in path.read_bytes().decode("utf-8", "replace").split('"'):
            found.append(path)
    return found


def test_store_tells_whom_it_has_forgotten(tmp_path):
    store, _ = synth_store(tmp_path)
    assert not store.forgotten(np.array([USER, "u4"], "S")).any() and store.forgotten(np.zeros(0, "S")).size == 0
    store.forget(USER)
    assert store.forgotten(np.array(["u4", USER, USER], "S")).tolist() == [False, True, True]


@pytest.mark.parametrize("exposure", ["impressions", "positives"])
def test_user_is_gone_from_every_file_and_the_others_keep_every_row(tmp_path, exposure):
    store, _ = synth_store(tmp_path, exposure=exposure)
    before = store.snapshot(LATER)
    rows, users = before.engagements(), before.users()
    mine = rows.num_rows - without(rows).num_rows
    assert mine and on_disk(store.root)
    report = store.forget(USER)
    assert report.known and report.rows == {"engagements": mine, "users": 1, "quarantine": 0}
    after = store.snapshot(LATER)
    assert after.engagements().equals(without(rows)) and after.users().equals(without(users))
    assert after.digest != before.digest
    assert on_disk(store.root) == [] and store.check().damaged == ()


def test_forgetting_again_and_an_unknown_user_change_no_byte(tmp_path):
    store, _ = synth_store(tmp_path)
    unknown = content(store.root)
    report = store.forget("nobody")
    assert not report.known and report.files == 0 and content(store.root) == unknown
    store.forget(USER)
    before = content(store.root)
    again = store.forget(USER)
    assert again.known and again.rows == {"engagements": 0, "users": 0, "quarantine": 0} and again.files == 0
    assert content(store.root) == before


def test_importing_again_does_not_bring_the_user_back(tmp_path):
    store, delivery = synth_store(tmp_path)
    rows = store.snapshot(LATER).engagements()
    store.forget(USER)
    before = content(store.root)
    report = store.append(contract_dir.read(delivery))
    assert report.forgotten == rows.num_rows - without(rows).num_rows
    assert report.imported == 0 and report.read == report.already_present + report.forgotten
    assert content(store.root) == before


def test_later_rows_of_the_user_go_nowhere_good_or_bad(tmp_path):
    store = in_small_appends(tmp_path, [[{"request_id": f"r{n}", "user_id": f"u{n % 4}"} for n in range(40)]])
    store.forget(USER)
    good = [{"request_id": f"n{n}", "at": 2} for n in range(40)]
    mine = {"request_id": "new", "user_id": USER, "at": 3}
    bad = [{**mine, "item_id": "no-such-item"}, {**mine, "at": None}, {"request_id": "x", "item_id": "no-such-item"}]
    users = pa.table({"user_id": [USER, "u9"], "event_timestamp": pa.array([int(START.timestamp() * 1e6)] * 2, UTC_US)})
    report = store.append(dataset([*good, mine, *bad], users=users))
    assert (report.forgotten, report.imported, report.quarantined) == (3, 40, {"unknown_item": 1})
    assert pl.read_parquet(report.quarantine)["row_number"].to_list() == [43]  # as delivered, not as kept
    assert store.snapshot(LATER).users()["user_id"].to_pylist() == ["u9"]
    assert on_disk(tmp_path) == []


def test_user_delivered_under_a_number_is_left_out_too(tmp_path):
    rows = [{"request_id": f"r{n}", "user_id": str(n % 4)} for n in range(20)]
    store = in_small_appends(tmp_path, [rows])
    store.forget("3")
    made = dataset(rows)
    (table,) = made.engagements
    numbers = pa.array([float(r["user_id"]) for r in rows])
    table = table.set_column(table.column_names.index("user_id"), "user_id", numbers)
    assert store.append(Dataset(made.manifest, [table], made.items, made.users)).forgotten == 5


def test_rows_that_an_importer_rejected_are_left_out_too(tmp_path):
    rows = [{"request_id": f"r{n}", "user_id": f"u{n % 4}"} for n in range(40)]
    store = in_small_appends(tmp_path, [rows])
    store.forget(USER)
    made = dataset(rows)
    shown = [json.dumps({"user_id": u, "video_id": "1"}) for u in (USER, "u1")]
    made.remarks.rejected.append(pa.table({"reason": ["duplicate"] * 2, "file": ["f"] * 2, "row": shown}))
    report = store.append(made)
    assert report.forgotten == 11 and report.quarantined == {"duplicate": 1}
    assert on_disk(tmp_path) == []


def test_quarantined_rows_of_the_user_are_removed_and_the_others_kept(tmp_path):
    good = [{"request_id": f"r{n}", "user_id": f"u{n % 4}"} for n in range(60)]
    bad = [{"request_id": "b", "user_id": u, "item_id": "no-such-item"} for u in (USER, USER, "u1")]
    store = EngagementStore(tmp_path)
    store.append(dataset([*good, *bad]))
    assert store.forget(USER).rows["quarantine"] == 2
    (left,) = (tmp_path / "quarantine").glob("*.parquet")
    assert [json.loads(r)["user_id"] for r in pl.read_parquet(left)["row"]] == ["u1"]
    assert on_disk(tmp_path) == []


def test_the_user_is_read_from_a_quarantined_row_however_it_was_written():
    rows = ['{"request_id":"a","user_id":"u\\"1"}', '{"user_id":7}', '{"user_id":7.0}', "no json", '{"a":"user_id"}']
    assert quarantined_user(pl.Series(rows)).to_list() == ['u"1', "7", "7", None, None]


def test_the_tombstone_names_nobody(tmp_path):
    store, _ = synth_store(tmp_path, "a")
    other, _ = synth_store(tmp_path, "b")
    for each in (store, other):
        each.forget(USER)
    texts = [(each.root / TOMBSTONES).read_text() for each in (store, other)]
    assert USER not in json.loads(texts[0])["users"] and json.loads(texts[0])["users"] != json.loads(texts[1])["users"]


def test_damaged_tombstones_stop_an_import_instead_of_bringing_users_back(tmp_path):
    store, delivery = synth_store(tmp_path)
    store.forget(USER)
    (store.root / TOMBSTONES).write_text("{")
    with pytest.raises(EvergreenError, match="forgotten users could come back"):
        store.append(contract_dir.read(delivery))


def test_recorded_snapshots_that_read_the_user_say_so_and_the_others_load(tmp_path):
    rows = [{"request_id": "early", "at": 1}, {"request_id": "mine", "at": 26, "user_id": USER}]
    store = in_small_appends(tmp_path, [rows, [{"request_id": "late", "at": 50}]])
    recorded = {h: store.snapshot(hours(h)) for h in (3, 30, 60)}
    for snapshot in recorded.values():
        snapshot.save()
    report = store.forget(USER)
    assert report.snapshots == tuple((recorded[h].digest, recorded[h].as_of.isoformat()) for h in (30, 60))
    assert Snapshot.load(tmp_path, recorded[3].digest).engagements().num_rows == 1
    for h in (30, 60):
        with pytest.raises(EvergreenError, match="data of a forgotten user was removed .*: ask for the retrain again"):
            Snapshot.load(tmp_path, recorded[h].digest)
    assert store.forget(USER).snapshots == report.snapshots  # told again
    assert store.snapshot(hours(60)).digest != recorded[60].digest


def test_user_in_days_that_only_a_recorded_snapshot_keeps_is_removed_too(tmp_path):
    old = [{"request_id": "mine", "at": 1, "user_id": USER}, {"request_id": "other", "at": 1}]
    store = in_small_appends(tmp_path, [old, [{"request_id": "new", "at": 24 * 30}]])
    recorded = store.snapshot(hours(48))
    recorded.save()
    store.retain(5)
    assert on_disk(tmp_path)
    report = store.forget(USER)
    assert report.known and [digest for digest, _ in report.snapshots] == [recorded.digest]
    assert on_disk(tmp_path) == []


def test_user_in_a_compacted_part_is_removed_and_marks_the_records_made_before(tmp_path):
    rows = [[{"request_id": f"r{n}", "at": n, "user_id": f"u{n % 4}"}] for n in range(1, 8)]
    store = in_small_appends(tmp_path, rows)
    recorded = store.snapshot(hours(5))
    recorded.save()
    store.compact()
    report = store.forget(USER)
    assert report.rows["engagements"] == 2 and [d for d, _ in report.snapshots] == [recorded.digest]
    assert on_disk(tmp_path) == [] and store.snapshot(LATER).engagements().num_rows == 5


def test_the_last_row_of_a_day_takes_the_part_with_it(tmp_path):
    store = in_small_appends(tmp_path, [[{"request_id": "a", "user_id": USER}], [{"request_id": "b", "at": 30}]])
    store.forget(USER)
    assert [p.rows for p in parts_of_log(store)] == [1]


def test_damaged_files_in_quarantine_cannot_be_searched_and_go(tmp_path):
    store, _ = synth_store(tmp_path)
    path = store.root / parts_of_log(store)[0].path
    path.write_bytes(b"rubbish that may name anybody")
    with pytest.raises(EvergreenError, match="data check"):
        store.forget(USER)
    kept = store.root / store.check().damaged[0].kept
    store.forget(USER)
    assert not kept.exists()


def test_what_a_killed_import_had_read_goes_too(tmp_path):
    store, _ = synth_store(tmp_path)
    (store.root / ".tmp").mkdir()
    (store.root / ".tmp" / "bucket-00.arrow").write_text(USER)
    store.forget(USER)
    assert not (store.root / ".tmp").exists()


@pytest.mark.parametrize("step", range(1, 26, 2))
def test_forgetting_killed_at_any_step_is_never_half_and_ends_the_same_when_repeated(tmp_path, monkeypatch, step):
    rows = [{"request_id": f"r{n}", "at": n * 5, "user_id": f"u{n % 4}"} for n in range(30)]
    bad = [{"request_id": "b", "user_id": USER, "item_id": "no-such-item"}]
    store = in_small_appends(tmp_path / "s", [[*rows, *bad]])
    recorded = [store.snapshot(hours(h)) for h in (10, 40, 300)]
    for snapshot in recorded:
        snapshot.save()
    before = store.snapshot(LATER).engagements()
    try:
        with dying_at(monkeypatch, step):
            store.forget(USER)
    except Died:
        after = store.snapshot(LATER).engagements()
        assert after.equals(before) or after.equals(without(before))
        if (store.root / TOMBSTONES).exists():
            assert store.append(dataset(rows)).forgotten == 7
    report = store.forget(USER)
    assert {digest for digest, _ in report.snapshots} == {s.digest for s in recorded[1:]}
    assert store.snapshot(LATER).engagements().equals(without(before)) and on_disk(tmp_path) == []
    assert {Path(p.path) for p in load_index(store.root)} == {
        p.relative_to(store.root) for p in store.root.rglob("part-*")
    }
