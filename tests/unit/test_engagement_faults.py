"""Faults: killed imports, concurrent writers, damaged files."""

import hashlib
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engagement.errors import EvergreenError
from engagement.importers import contract_dir
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from tests.synth import dataset, write_contract_dir

REPO = Path(__file__).parents[2]
LATER = datetime(2030, 1, 1, tzinfo=UTC)
# Imports argv[2] into argv[1]; with argv[3] and argv[4], kills itself when that stage reports for the n-th time.
IMPORT = """
import os, signal, sys
from pathlib import Path
from engagement.importers import contract_dir
from engagement.store import EngagementStore
seen = {}
def progress(stage, rows):
    seen[stage] = seen.get(stage, 0) + 1
    if sys.argv[3:] == [stage, str(seen[stage])]:
        os.kill(os.getpid(), signal.SIGKILL)
report = EngagementStore(Path(sys.argv[1])).append(contract_dir.read(Path(sys.argv[2])), progress=progress)
print(report.imported, report.already_present, report.sampled)
"""


def start(store, delivery, *kill):
    command = [sys.executable, "-c", IMPORT, str(store), str(delivery), *kill]
    environment = os.environ | {"PYTHONPATH": str(REPO), "POLARS_MAX_THREADS": "2"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def content(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two deliveries that overlap in two days, and the bytes of stores that hold the first, and both."""
    root = tmp_path_factory.mktemp("halves")
    world = {"users": 10, "items": 60, "exposure": "positives"}
    first = write_contract_dir(root / "first", days=6, **world)
    both = write_contract_dir(root / "second", days=9, first=4, **world)
    store = EngagementStore(root / "store")
    store.append(contract_dir.read(first))
    after_first = content(store.root)
    store.append(contract_dir.read(both))
    return first, both, after_first, content(store.root)


@pytest.mark.parametrize(
    ("stage", "number"),
    [("read", "2"), ("settle", "1"), ("write", "1"), ("write", "3")],
    ids=["while-reading", "after-settling", "after-the-first-part", "before-the-commit"],
)
def test_killed_import_leaves_the_store_and_the_next_one_finishes_it(halves, tmp_path, stage, number):
    first, second, after_first, after_both = halves
    store = EngagementStore(tmp_path / "store")
    store.append(contract_dir.read(first))
    killed = start(store.root, second, stage, number)
    assert killed.wait(60) == -signal.SIGKILL, killed.communicate()
    alive = store.snapshot(LATER)  # readable without any repair
    assert {p.path for p in alive.files} == {p for p in after_first if p.startswith(("eng", "items", "users"))}
    assert alive.engagements().num_rows == sum(p.rows for p in alive.parts("engagements"))
    store.append(contract_dir.read(second))
    assert content(store.root) == after_both


def test_what_a_killed_import_left_is_gone_after_the_next_one(halves, tmp_path):
    first, second, after_first, _ = halves
    store = EngagementStore(tmp_path)
    store.append(contract_dir.read(first))
    assert start(store.root, second, "write", "3").wait(60) == -signal.SIGKILL
    assert content(store.root) != after_first
    store.append(contract_dir.read(first))  # another delivery than the killed one
    assert content(store.root) == after_first


def test_killed_first_import_leaves_no_store(halves, tmp_path):
    first, _, after_first, _ = halves
    store = EngagementStore(tmp_path)
    assert start(store.root, first, "write", "2").wait(60) == -signal.SIGKILL
    assert not store.exists()
    store.append(contract_dir.read(first))
    assert content(store.root) == after_first


def test_two_writers_of_one_delivery_import_it_once(halves, tmp_path):
    first, _, after_first, _ = halves
    writers = [start(tmp_path, first) for _ in range(2)]
    told = sorted(writer.communicate(timeout=60)[0].split() for writer in writers)
    assert [w.returncode for w in writers] == [0, 0]
    assert told[0][0] == "0" and told[0][1] == told[1][0] and told[1][1] == "0"
    assert content(tmp_path) == after_first


def test_two_writers_of_overlapping_deliveries_lose_no_row(halves, tmp_path):
    first, second, _, _ = halves
    writers = [start(tmp_path, delivery) for delivery in (first, second)]
    outcomes = [writer.communicate(timeout=60) for writer in writers]
    assert [w.returncode for w in writers] == [0, 0], outcomes
    store = EngagementStore(tmp_path)
    rows = store.snapshot(LATER).engagements()
    one_after_the_other = EngagementStore(tmp_path / "reference")
    for delivery in (first, second):
        one_after_the_other.append(contract_dir.read(delivery))
    # Equal rows: which delivery wins the lock decides only into which part files they are cut.
    assert rows.equals(one_after_the_other.snapshot(LATER).engagements())


def test_waiting_for_another_writer_ends_with_a_clear_line(tmp_path, monkeypatch):
    import filelock

    monkeypatch.setattr("engagement.store.LOCK_SECONDS", 0.05)
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(EvergreenError, match="another import into .* is running"),
    ):
        EngagementStore(tmp_path).append(dataset([{}]))


@pytest.fixture
def stored(tmp_path):
    store = EngagementStore(tmp_path / "store")
    store.append(contract_dir.read(write_contract_dir(tmp_path / "d", users=10, days=3)))
    snapshot = store.snapshot(LATER)
    snapshot.save()
    return store, snapshot, store.root / snapshot.parts("engagements")[1].path


def test_missing_part_is_named(stored):
    store, snapshot, part = stored
    part.unlink()
    for call in (snapshot.engagements, lambda: Snapshot.load(store.root, snapshot.digest)):
        with pytest.raises(EvergreenError, match=f"{part.name} cannot be read"):
            call()


def test_truncated_part_is_named(stored):
    store, snapshot, part = stored
    part.write_bytes(part.read_bytes()[:-100])
    for call in (snapshot.engagements, lambda: Snapshot.load(store.root, snapshot.digest)):
        with pytest.raises(EvergreenError, match=f"{part.name} cannot be read"):
            call()


@pytest.mark.parametrize("where", [0.2, 0.4, 0.6])
def test_flipped_byte_in_a_page_is_named_not_read(stored, where):
    _, snapshot, part = stored
    damaged = bytearray(part.read_bytes())
    damaged[int(len(damaged) * where)] ^= 0xFF
    part.write_bytes(damaged)
    with pytest.raises(EvergreenError, match=f"{part.name} cannot be read"):
        snapshot.engagements()


def test_other_days_stay_readable_beside_a_corrupt_part(stored):
    _, snapshot, part = stored
    part.write_bytes(b"rubbish")
    first, second = snapshot.parts("engagements")[0], snapshot.parts("engagements")[1]
    assert snapshot.engagements(end=datetime.fromtimestamp(second.first // 10**6, UTC)).num_rows == first.rows


def test_altered_snapshot_record_is_refused(stored):
    store, snapshot, _ = stored
    record = store.root / "snapshots" / f"{snapshot.digest}.json"
    record.write_text(record.read_text().replace("synth-0", "synth-1"))
    with pytest.raises(EvergreenError, match="was changed"):
        Snapshot.load(store.root, snapshot.digest)
    with pytest.raises(EvergreenError, match="no readable snapshot"):
        Snapshot.load(store.root, "0" * 64)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"parts": [{"room": 1}]}'])
def test_damaged_index_is_named_and_nothing_is_swept(stored, text):
    store, _, part = stored
    (store.root / "index.json").write_text(text)
    with pytest.raises(EvergreenError, match="index.json cannot be read"):
        store.snapshot(LATER)
    with pytest.raises(EvergreenError, match="index.json cannot be read"):
        store.append(contract_dir.read(store.root.parent / "d"))
    assert part.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvergreenError, match="the import stopped"):
        EngagementStore(tmp_path / "file" / "data").append(dataset([{}]))
