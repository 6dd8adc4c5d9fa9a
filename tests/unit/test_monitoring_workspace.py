"""The Evidently workspace: one run a check, whatever is lost, killed or done twice; and the real UI over it."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from engagement.errors import EvergreenError
from monitoring import keep, page
from monitoring import workspace as workspaces
from monitoring.verdict import DriftVerdict
from tests.drift_lab import FIRST, MODEL, pairs, verdict, write_check
from tests.evidently_lab import serve

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Five hourly checks in one directory, as a monitor leaves them; the second one drifted."""
    root = tmp_path_factory.mktemp("written") / "checks"
    for hour in range(5):
        drawn = pairs(0.8 if hour == 1 else 0.0, rows=4000, seed=hour)
        found = verdict(drawn, FIRST + HOUR * hour, hit3=0.30 + hour / 100)
        write_check(root, FIRST + HOUR * hour, drawn, outcome=found.outcome)
    return root


@pytest.fixture
def checks(written, tmp_path):
    """The five check directories, oldest first, in a home of their own."""
    shutil.copytree(written, tmp_path / "checks")
    return [tmp_path / "checks" / name for name in keep.stamps(tmp_path / "checks")]


@pytest.fixture
def home(tmp_path):
    return tmp_path / "evidently"


def runs(home):
    return sorted((home / str(workspaces.project_id_of(MODEL)) / "snapshots").glob("*.json"))


def test_same_check_twice_is_one_run(home, checks):
    first = workspaces.record(home, MODEL, checks[4])
    held = {p.stem for p in runs(home)}
    second = workspaces.record(home, MODEL, checks[4])
    assert (first.added, second.added) == (True, False)
    assert first.run_id == second.run_id
    assert {p.stem for p in runs(home)} == held and len(held) == 5  # those beside it are built again
    assert not list(home.parent.glob(".evidently-staging"))


def alone(checks, number, tmp_path):
    """One check without those beside it."""
    return shutil.copytree(checks[number], tmp_path / f"alone{number}" / checks[number].name)


def test_same_instant_for_another_model_version_is_another_run(home, checks, tmp_path):
    assert workspaces.record(home, MODEL, alone(checks, 0, tmp_path)).added
    other = alone(checks, 0, tmp_path / "other")
    found = replace(DriftVerdict.load(other / "drift.json"), model_version="8")
    (other / "drift.json").write_text(found.to_json())
    assert workspaces.record(home, MODEL, other).added
    assert len(runs(home)) == 2


def test_only_the_newest_runs_keep_their_plots_whatever_the_order(home, checks, tmp_path):
    for number in (3, 4, 0, 1, 2):
        workspaces.record(home, MODEL, alone(checks, number, tmp_path))
    texts = [path.read_text() for path in runs(home)]
    times = [json.loads(text)["timestamp"] for text in texts]
    assert times == sorted(times)  # run ids sort by time
    assert [page.has_plots(text) for text in texts] == [False, False, True, True, True]
    for text in texts:
        assert json.loads(text)["tests_widgets"]
        assert "threshold" in json.dumps(json.loads(text)["widgets"])


def test_half_written_files_are_set_aside_and_the_next_record_brings_them_back(home, checks):
    workspaces.record(home, MODEL, checks[4])
    project = home / str(workspaces.project_id_of(MODEL))
    before = runs(home)
    before[1].write_text(before[1].read_text()[:5000])
    (project / "dashboard.json").write_text("")
    (project / "metadata.json").write_text('{"id": ')
    again = workspaces.record(home, MODEL, checks[4])
    assert len(again.notes) == 3
    assert all("half-written and is set aside" in note and "\n" not in note for note in again.notes)
    assert runs(home) == before
    assert json.loads((project / "metadata.json").read_text())["name"] == MODEL
    assert json.loads((project / "dashboard.json").read_text())["panels"]
    assert workspaces.repair(home) == []


def test_lost_workspace_is_built_again_at_the_same_address(home, checks):
    before = workspaces.record(home, MODEL, checks[4])
    held = [p.name for p in runs(home)]
    shutil.rmtree(home)
    after = workspaces.record(home, MODEL, checks[4])
    assert after.project_id == before.project_id
    assert [p.name for p in runs(home)] == held
    assert after.notes == (f"the project {MODEL} was not in {home}; 4 runs were built again from {checks[0].parent}",)


def test_rebuild_by_hand_passes_over_damaged_and_unfinished_checks(home, checks):
    (checks[0] / "snapshot.json").write_text('{"report":')
    (checks[2] / "drift.json").unlink()
    assert "3 runs were built again" in workspaces.rebuild(home, MODEL, checks[0].parent)[0]
    assert len(runs(home)) == 3
    assert workspaces.rebuild(home, MODEL, checks[0].parent) == []
    assert workspaces.rebuild(home.parent / "other", MODEL, home.parent / "nothing") == []
    assert not (home.parent / "other" / str(workspaces.project_id_of(MODEL))).exists()


def test_a_run_that_a_person_deleted_does_not_come_back(home, checks):
    workspaces.record(home, MODEL, checks[4])
    runs(home)[1].unlink()
    workspaces.record(home, MODEL, checks[4])
    assert len(runs(home)) == 4


def clones(checks, count, tmp_path):
    """Hourly checks that are copies of two whole ones but for their instant; returns their directory."""
    root = tmp_path / "many"
    for hour in range(count):
        at = FIRST + HOUR * hour
        out = root / keep.stamp(at)
        source = checks[1 if 22 <= hour < 24 else 0]
        shutil.copytree(source, out)
        found = replace(DriftVerdict.load(source / "drift.json"), as_of=at.isoformat())
        (out / "drift.json").write_text(found.to_json())
        data = json.loads(page.trimmed((source / "snapshot.json").read_text()))
        (out / "snapshot.json").write_text(json.dumps({**data, "timestamp": at.replace(tzinfo=None).isoformat()}))
    return root


def test_old_runs_are_thinned_in_workspace_and_checks_alike_and_events_stay(home, checks, tmp_path):
    root = clones(checks, 90, tmp_path)
    workspaces.rebuild(home, MODEL, root)
    kept = sorted(p.parent.name for p in root.glob("*/snapshot.json"))
    assert [workspaces._stamp(run) for run in runs(home)] == kept
    assert {keep.stamp(FIRST + HOUR * h) for h in (0, 3, 9, 15, 21, 22, 24)} <= set(
        kept
    )  # blocks, begin and end of drift
    assert keep.stamp(FIRST + HOUR * 23) not in kept  # the drift went on
    assert len(keep.stamps(root)) == 90
    assert len(kept) == 51 + 7 + 2
    stands = {p: p.read_bytes() for p in [*root.rglob("*.*"), *runs(home)]}
    workspaces.record(home, MODEL, root / kept[-1])
    assert {p: p.read_bytes() for p in [*root.rglob("*.*"), *runs(home)]} == stands


def test_what_a_kill_between_runs_and_checks_left_is_done_by_the_next_record(home, checks, tmp_path):
    root = clones(checks, 70, tmp_path)
    workspaces.rebuild(home, MODEL, root)
    kept = {p.parent.name for p in root.glob("*/snapshot.json")}
    victim = keep.stamp(FIRST + HOUR)
    shutil.copy(root / max(kept) / "snapshot.json", root / victim / "snapshot.json")  # its run went, its page did not
    workspaces.record(home, MODEL, root / max(kept))
    assert {p.parent.name for p in root.glob("*/snapshot.json")} == kept


def test_a_check_of_long_ago_that_is_made_now_keeps_its_page_until_the_next(home, checks, tmp_path):
    root = clones(checks, 70, tmp_path)
    workspaces.rebuild(home, MODEL, root)
    old = root / keep.stamp(FIRST + HOUR)
    shutil.rmtree(old)
    write_check(root, FIRST + HOUR, pairs(rows=2000))
    recorded = workspaces.record(home, MODEL, old)
    assert (old / "drift.html").exists() and any(p.stem == str(recorded.run_id) for p in runs(home))
    workspaces.record(home, MODEL, root / keep.stamps(root)[-1])
    assert not (old / "drift.html").exists()


def test_dashboard_follows_the_worst_features_until_a_person_changes_it(home, checks, tmp_path):
    recorded = workspaces.record(home, MODEL, alone(checks, 0, tmp_path))
    path = home / str(recorded.project_id) / "dashboard.json"

    def first_feature():
        panel = next(p for p in json.loads(path.read_text())["panels"] if p["title"].startswith("Single features"))
        return panel["values"][0]["legend"]

    assert first_feature() != "spend (drift / threshold)"
    workspaces.record(home, MODEL, alone(checks, 1, tmp_path))
    assert first_feature() == "spend (drift / threshold)"
    dashboard = json.loads(path.read_text())
    dashboard["panels"][0]["title"] = "mine"
    path.write_text(json.dumps(dashboard))
    workspaces.record(home, MODEL, alone(checks, 2, tmp_path))
    assert json.loads(path.read_text())["panels"][0]["title"] == "mine"


def test_check_of_an_empty_window_is_a_run_without_plots(home, tmp_path):
    out = write_check(tmp_path / "checks", FIRST, (), columns=(), reason="No requests", requests=(9, 0), outcome=None)
    recorded = workspaces.record(home, MODEL, out)
    assert recorded.added and recorded.notes == ()
    assert "No requests" in runs(home)[0].read_text()


def test_a_check_without_its_snapshot_is_one_clear_line(home, checks):
    (checks[0] / "snapshot.json").unlink()
    with pytest.raises(EvergreenError, match="snapshot.json is missing"):
        workspaces.record(home, MODEL, checks[0])


def test_unwritable_workspace_is_one_clear_line(tmp_path, checks):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvergreenError, match="workspace .* cannot be written"):
        workspaces.record(tmp_path / "file", MODEL, checks[0])


def fork(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def test_two_monitors_at_once_give_one_run_and_thin_once(home, checks, tmp_path):
    root = clones(checks, 60, tmp_path)
    newest = root / keep.stamps(root)[-1]
    processes = [fork(workspaces.record, home, MODEL, newest) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(runs(home)) == len(list(root.glob("*/snapshot.json"))) == 51 + 2
    assert workspaces.repair(home) == []


def record_for_ever(home, root):
    """A monitor that loses its workspace every few checks, over checks that are to be thinned."""
    while True:
        shutil.rmtree(home / str(workspaces.project_id_of(MODEL)), ignore_errors=True)
        for name in keep.stamps(root)[-4:]:
            workspaces.record(home, MODEL, root / name)


def test_kill_at_any_moment_leaves_whole_files_only(home, checks, tmp_path):
    for trial in range(3):
        root = clones(checks, 54, tmp_path)
        process = fork(record_for_ever, home, root)
        time.sleep(0.1 + 0.3 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert workspaces.repair(home) == []
        for name in keep.stamps(root):
            DriftVerdict.load(root / name / "drift.json")
        workspaces.record(home, MODEL, root / keep.stamps(root)[-1])
        assert {workspaces._stamp(r) for r in runs(home)} == {p.parent.name for p in root.glob("*/snapshot.json")}
        shutil.rmtree(root)


def until(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.1)
    return False


def series_of(client, project, panel):
    filters = [{k: v[k] for k in ("tags", "metadata", "metric", "metric_labels")} for v in panel["values"]]
    answer = client.post(f"/api/v2/snapshots/{project}/data_series_batch", json={"series_filter": filters})
    answer.raise_for_status()
    return {s["params"]["column"]: s["values"] for s in answer.json()["series"]}


def test_ui_shows_the_project_its_runs_and_series_while_checks_come_and_go(home, checks, tmp_path):
    first = alone(checks, 0, tmp_path)
    project = workspaces.record(home, MODEL, first).project_id
    torn = home / str(project) / "snapshots" / "01a2002f-25e8-7253-9398-89b27553d92a.json"
    torn.write_text('{"report":')
    with serve(home) as client:

        def reports():
            return client.get(f"/api/projects/{project}/reports").json()

        assert client.get("/api/projects").status_code == 500  # one torn file, and nothing is shown
        assert len(workspaces.record(home, MODEL, first).notes) == 1
        assert until(lambda: client.get("/api/projects").status_code == 200)  # without a restart
        assert [p["name"] for p in client.get("/api/projects").json()] == [MODEL]
        assert len(reports()) == 1
        for number in (0, 1, 2):  # the first one a second time
            workspaces.record(home, MODEL, alone(checks, number, tmp_path / "again"))
        assert until(lambda: len(reports()) == 3)
        assert all("model:7" in r["tags"] for r in reports())
        unknown = {"columns": (), "outcome": None, "serving": None, "skew_share": None, "kind": "population"}
        bare = write_check(tmp_path / "bare", FIRST + HOUR * 3, (), **unknown)
        workspaces.record(home, MODEL, bare)  # most numbers are absent in this run
        workspaces.record(home, MODEL, alone(checks, 4, tmp_path))
        assert until(lambda: len(reports()) == 5)

        panels = {p["title"]: p for p in client.get(f"/api/v2/dashboards/{project}").json()["panels"]}
        found = {title: series_of(client, project, panel) for title, panel in panels.items() if panel["values"]}
        assert all(found.values())
        quality = next(v for t, v in found.items() if t.startswith("HIT@3"))
        assert quality["HIT@3/save"] == pytest.approx([0.30, 0.31, 0.32, 0.34])  # the line goes on over the gap
        assert found["Kind of drift"]["population"] == [0, 1, 0, 1, 0]  # known of every run
        assert None not in [v for held in found.values() for values in held.values() for v in values[:3]]
        for report in reports():
            assert "threshold" in client.get(f"/api/projects/{project}/{report['id']}/data").text

        root = clones(checks, 60, tmp_path)
        shutil.rmtree(home / str(project))
        workspaces.record(home, MODEL, root / keep.stamps(root)[-1])  # lost, and built again under the UI's eyes
        assert until(lambda: {r["id"] for r in reports()} == {p.stem for p in runs(home)})
        assert len(runs(home)) == 53
        late = write_check(root, FIRST + HOUR * 66, pairs(rows=2000))
        workspaces.record(home, MODEL, late)  # thins six hours
        assert until(lambda: {r["id"] for r in reports()} == {p.stem for p in runs(home)})
        other = workspaces.record(home, "other-ranker", alone(checks, 1, tmp_path / "other")).project_id
        assert until(lambda: len(client.get("/api/projects").json()) == 2)  # born while the UI runs
        assert until(lambda: len(client.get(f"/api/projects/{other}/reports").json()) == 1)
