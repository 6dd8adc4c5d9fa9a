"""Real processes that change one store at the same time, and one that is killed among them: nothing is torn."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engagement.importers import contract_dir
from engagement.index import load_index
from engagement.store import EngagementStore
from tests.store_lab import LATER
from tests.synth import write_contract_dir

REPO = Path(__file__).parents[2]
# argv: store, job, delivery. `die` imports and kills itself while it writes; the others say when they are ready.
JOB = """
import os, signal, sys, time
from pathlib import Path
from engagement.importers import contract_dir
from engagement.store import EngagementStore
root, job, delivery = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
store, writes = EngagementStore(root), 0
def progress(stage, rows):
    global writes
    writes += stage == "write"
    if job == "die" and writes == 2:
        os.kill(os.getpid(), signal.SIGKILL)
(delivery.parent / f"ready-{os.getpid()}").touch()
while not (delivery.parent / "go").exists():
    time.sleep(0.005)
if job == "compact":
    for _ in range(4):
        store.compact()
else:
    store.append(contract_dir.read(delivery), progress=progress)
store.snapshot(store.time_range()[1]).engagements()
"""


def run_together(root, jobs, wait=60):
    """Start all jobs, let them go at the same instant, return their exit codes."""
    env = os.environ | {"PYTHONPATH": str(REPO), "POLARS_MAX_THREADS": "1"}
    gate = jobs[0][1].parent
    (gate / "go").unlink(missing_ok=True)
    for old in gate.glob("ready-*"):
        old.unlink()
    processes = [
        subprocess.Popen([sys.executable, "-c", JOB, str(root), job, str(delivery)], env=env, stderr=subprocess.PIPE)
        for job, delivery in jobs
    ]
    while len(list(gate.glob("ready-*"))) < len(jobs):
        time.sleep(0.02)
    (gate / "go").touch()
    outcomes = [p.communicate(timeout=wait)[1].decode()[-800:] for p in processes]
    return [p.returncode for p in processes], outcomes


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two halves of the same days, and a store that holds both."""
    root = tmp_path_factory.mktemp("halves")
    whole = write_contract_dir(root / "whole", users=10, items=60, days=6)
    made = {"whole": whole}
    for name, keep in (("even", 0), ("odd", 1)):
        half = write_contract_dir(root / name, users=10, items=60, days=6)
        for file in (half / "engagements").iterdir():
            table = pq.read_table(file)
            requests = table["request_id"].to_pylist()
            mine = [int(r.split("-")[1]) % 2 == keep for r in requests]
            pq.write_table(table.filter(mine), file)
        made[name] = half
    store = EngagementStore(root / "reference")
    store.append(contract_dir.read(whole))
    return made, store.snapshot(LATER).engagements()


def whole_and_equal(root, rows):
    store = EngagementStore(root)
    assert store.check().damaged == ()
    assert store.snapshot(LATER).engagements().equals(rows)
    # After the next import nothing is on disk that the index does not name.
    named = {root / p.path for p in load_index(root)}
    assert not (root / ".tmp").exists() and set(root.rglob("part-*.parquet")) == named


def test_halves_and_the_same_data_imported_at_once_lose_and_double_nothing(halves, tmp_path):
    made, rows = halves
    codes, told = run_together(tmp_path / "s", [("import", made[n]) for n in ("even", "odd", "whole", "even")])
    assert codes == [0, 0, 0, 0], told
    whole_and_equal(tmp_path / "s", rows)


def test_writer_killed_among_others_leaves_their_rows_whole(halves, tmp_path):
    made, rows = halves
    codes, told = run_together(tmp_path / "s", [("die", made["whole"]), ("import", made["even"])])
    assert codes == [-signal.SIGKILL, 0] or codes == [0, 0], told  # the dying one may find every row held
    EngagementStore(tmp_path / "s").append(contract_dir.read(made["odd"]))
    whole_and_equal(tmp_path / "s", rows)


def test_import_and_compaction_at_once(halves, tmp_path):
    made, rows = halves
    store = EngagementStore(tmp_path / "s")
    store.append(contract_dir.read(made["even"]))
    codes, told = run_together(
        tmp_path / "s", [("compact", made["odd"]), ("import", made["odd"]), ("compact", made["odd"])]
    )
    assert codes == [0, 0, 0], told
    store.compact()
    whole_and_equal(tmp_path / "s", rows)
    assert len([p for p in load_index(store.root) if p.room == "engagements"]) == 6
