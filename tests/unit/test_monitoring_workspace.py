"""The Evidently workspace: one run a check, whatever is lost, killed or done twice; and the real UI over it."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from test_monitoring_frame import SPEC, window

from engagement.errors import EvergreenError
from evergreen.settings import TELEMETRY_OFF
from monitoring import workspace as workspaces
from monitoring.drift import Skew, check

FIRST = datetime(2026, 3, 2, 3, tzinfo=UTC)
MODEL = "homefeed-ranker"


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Three checks, a day apart."""
    directories = []
    for day in range(3):
        out = tmp_path_factory.mktemp(f"check{day}")
        current = window(users=30, seed=2 + day)
        quality = {"HIT@3/save": 0.30 + day / 100}
        skew = Skew(0.01, {"user_stats__impressions_1h": "3 of 300 values differ (3 stale)"}, unexplained=False)
        check(window(users=60, seed=1), current, SPEC, FIRST + timedelta(days=day), "7", out, quality, skew=skew)
        directories.append(out)
    return directories


@pytest.fixture
def home(tmp_path):
    return tmp_path / "evidently"


def runs(home):
    return sorted((home / str(workspaces.project_id_of(MODEL)) / "snapshots").glob("*.json"))


def test_same_check_twice_is_one_run(home, checks):
    first = workspaces.record(home, MODEL, checks[0])
    second = workspaces.record(home, MODEL, checks[0])
    assert (first.added, second.added) == (True, False)
    assert first.run_id == second.run_id
    assert [p.stem for p in runs(home)] == [str(first.run_id)]
    assert not list(home.parent.glob(".evidently-staging"))


def test_same_instant_for_another_model_version_is_another_run(home, checks, tmp_path):
    workspaces.record(home, MODEL, checks[0])
    other = tmp_path / "other"
    shutil.copytree(checks[0], other)
    text = (other / "drift.json").read_text()
    (other / "drift.json").write_text(text.replace('"model_version": "7"', '"model_version": "8"'))
    assert workspaces.record(home, MODEL, other).added
    assert len(runs(home)) == 2


def test_only_the_newest_run_keeps_its_plots_whatever_the_order(home, checks, monkeypatch):
    monkeypatch.setattr(workspaces, "_FULL_BYTES", 60_000)
    for directory in (checks[1], checks[2], checks[0]):
        workspaces.record(home, MODEL, directory)
    times, plots = [], []
    for path in runs(home):
        data = json.loads(path.read_text())
        times.append(data["timestamp"])
        plots.append(any(w["type"] == "tabs" for w in data["widgets"]))
        assert data["tests_widgets"]
        assert "features drifted" in json.dumps(data["widgets"][0])
    assert times == sorted(times)  # run ids sort by time
    assert plots == [False, False, True]


def test_half_written_files_are_set_aside_and_the_next_record_repairs(home, checks):
    old = workspaces.record(home, MODEL, checks[0])
    new = workspaces.record(home, MODEL, checks[1])
    project = home / str(old.project_id)
    torn = project / "snapshots" / f"{old.run_id}.json"
    torn.write_text(torn.read_text()[:5000])
    (project / "dashboard.json").write_text("")
    (project / "metadata.json").write_text('{"id": ')
    again = workspaces.record(home, MODEL, checks[0])
    assert again.added
    assert len(again.notes) == 3
    assert all("half-written and is set aside" in note and "\n" not in note for note in again.notes)
    assert {p.stem for p in runs(home)} == {str(old.run_id), str(new.run_id)}
    assert json.loads((project / "metadata.json").read_text())["name"] == MODEL
    assert json.loads((project / "dashboard.json").read_text())["panels"]
    assert workspaces.repair(home) == []


def test_lost_workspace_is_built_anew_at_the_same_address(home, checks):
    before = workspaces.record(home, MODEL, checks[0])
    shutil.rmtree(home)
    after = workspaces.record(home, MODEL, checks[0])
    assert after == before


def test_dashboard_is_written_once_and_a_person_s_changes_stay(home, checks):
    recorded = workspaces.record(home, MODEL, checks[0])
    path = home / str(recorded.project_id) / "dashboard.json"
    dashboard = json.loads(path.read_text())
    assert (
        len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"]) == len(dashboard["tabs"][0]["panels"])
    )
    dashboard["panels"][0]["title"] = "mine"
    path.write_text(json.dumps(dashboard))
    workspaces.record(home, MODEL, checks[1])
    assert json.loads(path.read_text())["panels"][0]["title"] == "mine"


def test_check_of_an_empty_window_records_nothing_and_says_why(home, tmp_path):
    reference = window(users=30)
    check(reference, reference.slice(0, 0), SPEC, FIRST, "7", tmp_path / "empty")
    recorded = workspaces.record(home, MODEL, tmp_path / "empty")
    assert recorded.run_id is None
    assert recorded.notes == ("No rows in the current window, nothing to compare",)


def test_unwritable_workspace_is_one_clear_line(tmp_path, checks):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvergreenError, match="workspace .* cannot be written"):
        workspaces.record(tmp_path / "file", MODEL, checks[0])


def fork(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def test_two_monitors_at_once_give_one_run(home, checks):
    processes = [fork(workspaces.record, home, MODEL, checks[0]) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(runs(home)) == 1
    assert workspaces.repair(home) == []


def record_for_ever(home, checks):
    while True:
        shutil.rmtree(home / str(workspaces.project_id_of(MODEL)), ignore_errors=True)
        for directory in checks:
            workspaces.record(home, MODEL, directory)


def test_kill_at_any_moment_leaves_whole_files_only(home, checks):
    for trial in range(6):
        process = fork(record_for_ever, home, checks)
        time.sleep(0.25 + 0.037 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert workspaces.repair(home) == []
        assert workspaces.record(home, MODEL, checks[2]).notes == ()


@pytest.fixture
def ui(home):
    """The real UI on a free port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start():
        environment = {**os.environ, **TELEMETRY_OFF}
        command = [sys.executable, "-m", "evidently.cli", "ui", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workspace", str(home)]
        log = (home.parent / "ui.log").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        for _ in range(600):
            assert started[0].poll() is None, (home.parent / "ui.log").read_text()[-2000:]
            try:
                client.get("/api/version").raise_for_status()
                return client
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the UI did not start")

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def until(condition):
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_ui_shows_the_project_its_runs_and_series_while_checks_arrive(home, checks, ui):
    project = workspaces.record(home, MODEL, checks[0]).project_id
    torn = home / str(project) / "snapshots" / "01a2002f-25e8-7253-9398-89b27553d92a.json"
    torn.write_text('{"report":')
    client = ui()
    assert client.get("/api/projects").status_code == 500  # one torn file, and nothing is shown
    assert len(workspaces.record(home, MODEL, checks[0]).notes) == 1
    assert until(lambda: client.get("/api/projects").status_code == 200)  # without a restart
    assert [p["name"] for p in client.get("/api/projects").json()] == [MODEL]

    def reports():
        return client.get(f"/api/projects/{project}/reports").json()

    assert len(reports()) == 1
    for directory in checks:  # the first one a second time
        workspaces.record(home, MODEL, directory)
    assert until(lambda: len(reports()) == 3)
    assert all("model:7" in r["tags"] for r in reports())

    other = workspaces.record(home, "other-ranker", checks[0])  # a project that is born while the UI runs
    assert until(lambda: len(client.get("/api/projects").json()) == 2)
    assert until(lambda: len(client.get(f"/api/projects/{other.project_id}/reports").json()) == 1)

    panels = client.get(f"/api/v2/dashboards/{project}").json()["panels"]
    for panel in panels:
        filters = [
            {"tags": v["tags"], "metadata": v["metadata"], "metric": v["metric"], "metric_labels": v["metric_labels"]}
            for v in panel["values"]
        ]
        url = f"/api/v2/snapshots/{project}/data_series_batch"
        series = client.post(url, json={"series_filter": filters}).json()["series"]
        assert len(series) == len(filters), panel["title"]
        assert all(len(s["values"]) == 3 and None not in s["values"] for s in series), panel["title"]
        if panel["title"] == "Quality on the window":
            assert series[0]["values"] == pytest.approx([0.30, 0.31, 0.32])
    for report in reports():
        page = client.get(f"/api/projects/{project}/{report['id']}/data").text
        assert "features drifted" in page
