"""Compaction and retention: fewer files, the same rows at every instant, recorded runs repeatable."""

import hashlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engagement.compact import MANY_PARTS
from engagement.errors import EvergreenError
from engagement.index import load_index, to_us
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.store_lab import LATER, Died, content, dying_at, hours, in_small_appends, parts_of_log
from tests.synth import dataset

SIX = [[{"request_id": f"r{n}", "at": n / 2, "known": n}] for n in range(1, 7)]  # one day, known one after another


def seen(store, instants=(0.5, 2, 3.5, 5, 24, 60)):
    """Digest and rows at several instants."""
    snapshots = [store.snapshot(hours(h)) for h in instants]
    return [(s.digest, s.engagements().to_pylist(), s.items().to_pylist(), s.users().to_pylist()) for s in snapshots]


def test_small_parts_of_a_day_become_one_and_nothing_that_is_seen_changes(tmp_path):
    store = in_small_appends(tmp_path, [*SIX, [{"request_id": "other-day", "at": 30}]])
    before = seen(store)
    report = store.compact()
    assert (report.days, report.merged, report.parts, report.parts_left) == (1, 6, 7, 2)
    assert [p.rows for p in parts_of_log(store)] == [6, 1]
    assert sorted(tmp_path.rglob("part-*.parquet")) == sorted(tmp_path / p.path for p in load_index(tmp_path))
    assert seen(store) == before


def test_compacting_again_changes_no_byte(tmp_path):
    store = in_small_appends(tmp_path, SIX)
    store.compact()
    before = content(tmp_path)
    assert store.compact().merged == 0
    assert content(tmp_path) == before


def test_merged_part_has_the_bytes_of_a_single_import(tmp_path):
    pieces, whole = in_small_appends(tmp_path / "a", SIX), in_small_appends(tmp_path / "b", [sum(SIX, [])])
    pieces.compact()
    assert [p.sha256 for p in parts_of_log(pieces)] == [p.sha256 for p in parts_of_log(whole)]


def test_merged_part_is_merged_again_with_later_data_under_the_same_digests(tmp_path):
    store = in_small_appends(tmp_path, SIX[:3])
    store.compact()
    store.append(dataset(SIX[3]))
    before = seen(store)
    store.compact()
    (part,) = parts_of_log(store)
    assert part.rows == 4 == len(part.leaves)
    assert seen(store) == before


def test_import_merges_a_day_that_has_more_than_the_many_parts(tmp_path):
    rows = [[{"request_id": f"r{n}", "at": n / 10}] for n in range(MANY_PARTS + 1)]
    store = in_small_appends(tmp_path, rows[:MANY_PARTS])
    assert len(parts_of_log(store)) == MANY_PARTS
    store.append(dataset(rows[MANY_PARTS]))
    assert [p.rows for p in parts_of_log(store)] == [MANY_PARTS + 1]


def test_import_succeeds_beside_a_part_that_cannot_be_merged(tmp_path):
    rows = [[{"request_id": f"r{n}", "at": n / 10}] for n in range(MANY_PARTS + 1)]
    store = in_small_appends(tmp_path, rows[:MANY_PARTS])
    broken = tmp_path / parts_of_log(store)[0].path
    # The request column stays readable for the import itself; the merge reads all.
    damaged = bytearray(broken.read_bytes())
    damaged[-len(damaged) // 2] ^= 0xFF
    broken.write_bytes(damaged)
    try:
        report = store.append(dataset(rows[MANY_PARTS]))
    except EvergreenError as error:
        assert broken.name in str(error)  # the byte hit what the import reads
    else:
        assert any(broken.name in note for note in report.notes) and report.imported == 1


def test_a_day_beyond_the_limit_of_a_part_keeps_several_and_is_not_merged_for_ever(tmp_path, monkeypatch):
    store = in_small_appends(tmp_path, SIX)
    monkeypatch.setattr("engagement.parts.PART_ROWS", 4)
    before = seen(store)
    store.compact()
    assert sorted(p.rows for p in parts_of_log(store)) == [2, 4]
    assert store.compact().merged == 0 and seen(store) == before


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 9])
def test_compaction_killed_at_any_step_leaves_the_same_rows_and_can_be_repeated(tmp_path, monkeypatch, step):
    store = in_small_appends(tmp_path, [*SIX, [{"request_id": "s1", "at": 30}], [{"request_id": "s2", "at": 31}]])
    recorded = store.snapshot(hours(5))
    recorded.save()
    before = seen(store)
    try:
        with dying_at(monkeypatch, step):
            store.compact()
    except Died:
        pass
    assert seen(store) == before
    assert Snapshot.load(tmp_path, recorded.digest).engagements().equals(recorded.engagements())
    store.compact()
    store.append(dataset([{"request_id": "s1", "at": 30}]))  # sweeps what the killed one left
    assert seen(store) == before and len(parts_of_log(store)) == 2
    assert sorted(tmp_path.rglob("part-*.parquet")) == sorted(tmp_path / p.path for p in load_index(tmp_path))


def test_recorded_snapshot_and_one_in_use_read_the_merged_files(tmp_path):
    store = in_small_appends(tmp_path, SIX)
    in_use = store.snapshot(hours(4))
    rows, files = in_use.engagements(), in_use.files
    in_use.save()
    store.compact()
    assert not any((tmp_path / p.path).exists() for p in files if p.room == "engagements")
    loaded = Snapshot.load(tmp_path, in_use.digest)
    assert loaded.digest == in_use.digest
    assert loaded.engagements().equals(rows) and in_use.engagements().equals(rows)


def test_late_row_imported_after_the_record_stays_out_of_it_through_a_compaction(tmp_path):
    store = in_small_appends(tmp_path, SIX[:3])
    recorded = store.snapshot(hours(24))
    recorded.save()
    rows = recorded.engagements()
    store.append(dataset([{"request_id": "late", "at": 1, "known": 20}]))  # known by then, yet not what was read
    store.compact()
    assert Snapshot.load(tmp_path, recorded.digest).engagements().equals(rows)
    assert store.snapshot(hours(24)).engagements().num_rows == rows.num_rows + 1


def test_record_stays_readable_when_the_merged_day_then_leaves_the_store(tmp_path):
    store = in_small_appends(tmp_path, [*SIX, [{"request_id": "new", "at": 24 * 40}]])
    recorded = store.snapshot(hours(24))
    recorded.save()
    rows = recorded.engagements()
    store.compact()
    assert store.retain(7).days_left_out == 1
    assert Snapshot.load(tmp_path, recorded.digest).engagements().equals(rows)


actions = st.lists(
    st.one_of(
        st.just("compact"),
        st.lists(
            st.fixed_dictionaries(
                {
                    "request_id": st.sampled_from(["a", "b", "c", "d"]),
                    "item_id": st.sampled_from(["i1", "i2", "i3"]),
                    "at": st.sampled_from([0, 1, 23, 24, 25]),
                    "late": st.sampled_from([0, 0, 3, 30]),
                    "save": st.booleans(),
                }
            ),
            min_size=1,
            max_size=3,
        ),
    ),
    min_size=2,
    max_size=7,
)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(actions)
def test_compactions_between_any_imports_change_no_digest_and_no_row(tmp_path_factory, steps):
    """The store beside a twin that never compacts; snapshots recorded on the way stay as they were."""
    good = [{"request_id": f"ok{n}", "at": 2} for n in range(30)]  # keeps the share of bad rows below 10 %
    store, twin = (EngagementStore(tmp_path_factory.mktemp(n)) for n in ("store", "twin"))
    instants, recorded = (0.5, 4, 24.5, 60), {}
    for step in [[], *steps, "compact"]:
        if step == "compact":
            store.compact()
        else:
            rows = [{k: v for k, v in r.items() if k != "late"} | {"known": r["at"] + r.get("late", 0)} for r in step]
            for each in (store, twin):
                each.append(dataset([*good, *rows]))
        assert seen(store, instants) == seen(twin, instants)
        for h in instants:
            snapshot = store.snapshot(hours(h))
            snapshot.save()
            recorded.setdefault(snapshot.digest, snapshot.engagements())
    for digest, rows in recorded.items():
        assert Snapshot.load(store.root, digest).engagements().equals(rows)


def days_store(tmp_path, days=10):
    return in_small_appends(tmp_path, [[{"request_id": f"r{d}", "at": 24 * d}] for d in range(days)])


@pytest.mark.parametrize(("kept", "left"), [(1, 1), (3, 3), (10, 10), (99, 10)])
def test_retention_keeps_exactly_the_newest_days(tmp_path, kept, left):
    store = days_store(tmp_path)
    report = store.retain(kept)
    assert report.days_left_out == 10 - left
    rows = store.snapshot(LATER).engagements()["request_id"].to_pylist()
    assert rows == [f"r{d}" for d in range(10 - left, 10)]
    assert len(list(tmp_path.rglob("engagements/*/part-*"))) == left


def test_zero_days_are_refused(tmp_path):
    with pytest.raises(EvergreenError, match="at least 1"):
        days_store(tmp_path, 1).retain(0)


def test_files_of_a_recorded_snapshot_stay_until_its_record_is_dropped(tmp_path):
    store = days_store(tmp_path)
    recorded = store.snapshot(hours(24 * 5))
    path, rows = recorded.save(), recorded.engagements()
    store.retain(3)
    assert Snapshot.load(tmp_path, recorded.digest).engagements().equals(rows)
    again = path.stat().st_mtime
    os.utime(path, (again - 4 * 86_400,) * 2)  # asked for four days ago
    assert store.retain(3).snapshots_dropped == 1
    assert not path.exists() and len(list(tmp_path.rglob("engagements/*/part-*"))) == 3
    with pytest.raises(EvergreenError, match="no readable snapshot"):
        Snapshot.load(tmp_path, recorded.digest)


def test_record_that_was_asked_for_again_is_kept(tmp_path):
    store = days_store(tmp_path)
    recorded = store.snapshot(hours(24 * 5))
    os.utime(recorded.save(), (0, 0))
    recorded.save()
    assert store.retain(3).snapshots_dropped == 0


def test_days_that_left_come_back_when_imported_again(tmp_path):
    store = days_store(tmp_path)
    before = seen(store, (24 * 20,))
    store.retain(2)
    for d in range(10):
        store.append(dataset([{"request_id": f"r{d}", "at": 24 * d}]))
    assert seen(store, (24 * 20,)) == before


def test_retention_without_a_log_changes_nothing(tmp_path):
    store = days_store(tmp_path, 1)
    assert store.retain(1).days_left_out == 0
    assert store.snapshot(LATER).engagements().num_rows == 1


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_retention_killed_at_any_step_can_be_repeated(tmp_path, monkeypatch, step):
    store = days_store(tmp_path, 5)
    recorded = store.snapshot(hours(24 * 2))
    recorded.save()
    try:
        with dying_at(monkeypatch, step):
            store.retain(2)
    except Died:
        pass
    store.retain(2)
    assert store.snapshot(LATER).engagements()["request_id"].to_pylist() == ["r3", "r4"]
    assert Snapshot.load(tmp_path, recorded.digest).engagements().num_rows == 2


def test_store_written_before_there_were_leaves_is_read_as_it_was(tmp_path):
    """The digest of a store that was never compacted is that of the plain list of its files."""
    store = days_store(tmp_path, 2)
    parts = json.loads((tmp_path / "index.json").read_text())["parts"]
    assert all("merged" not in part for part in parts)
    files = sorted([p["path"], p["sha256"]] for p in parts)
    named = {"manifest": store.manifest.to_json(), "files": files, "as_of": to_us(LATER)}
    assert store.snapshot(LATER).digest == hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
