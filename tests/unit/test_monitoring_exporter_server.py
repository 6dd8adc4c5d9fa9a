"""The exporter as a server and as a process of a home: what it answers, where, and how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from monitoring.exporter import Exporter
from monitoring.scraped import targets
from serving import stack
from serving.processes import Processes, free_port, http_get
from tests import monitoring_lab as lab

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)


@pytest.fixture
def exporter(tmp_path):
    settings = Settings(home=tmp_path, now=NOW, metrics_port=free_port())
    lab.write_check(settings, lab.verdict(NOW), NOW)
    server = Exporter(settings)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield settings
    server.stop()
    thread.join(10)
    assert not thread.is_alive()


def get(settings, path, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", settings.metrics_port, timeout=60)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_server_answers_metrics_health_and_targets_and_nothing_else(exporter):
    status, text = get(exporter, "/metrics")
    assert status == 200 and "# HELP evergreen_drift_score Distance" in text
    assert get(exporter, "/healthz") == (200, '{"problems": []}')
    assert get(exporter, "/sd") == (200, "[]")
    assert get(exporter, "/")[0] == get(exporter, "/../etc/passwd")[0] == 404
    assert get(exporter, "/metrics", "POST")[0] == 405
    with socket.socket() as other, pytest.raises(OSError):  # on loopback alone, and of that on one address
        other.connect(("127.0.0.2", exporter.metrics_port))


def test_health_says_what_the_last_scrape_could_not_read(exporter):
    lab.write_check(exporter, "{", NOW - timedelta(hours=1))
    get(exporter, "/metrics")
    (said,) = json.loads(get(exporter, "/healthz")[1])["problems"]
    assert "is damaged" in said


def test_a_client_that_says_nothing_keeps_nobody_waiting(exporter):
    with socket.create_connection(("127.0.0.1", exporter.metrics_port)):
        assert get(exporter, "/metrics")[0] == 200


def test_a_port_in_use_is_told_in_one_line(exporter):
    with pytest.raises(EvergreenError, match=rf"{exporter.metrics_port}.*EVERGREEN_METRICS_PORT"):
        Exporter(exporter)


def test_targets_are_what_runs_under_this_home(tmp_path):
    settings = Settings(home=tmp_path)
    processes = Processes(settings)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    ports = {name: free_port() for name in ("predictor-3", "promoter", "mlflow", "predictor-2")}
    try:
        for name, port in ports.items():
            processes.start(name, sleeper, ready="", ports={"http": port})
        gone = processes.get("predictor-2")
        os.killpg(gone.pid, signal.SIGKILL)
        while processes.get("predictor-2"):
            time.sleep(0.01)
        torn = settings.processes / "torn.json"
        torn.write_text('{"name": "predictor-9"')
        found = targets(settings)
        torn.unlink()
        assert found == [
            {"targets": [f"127.0.0.1:{ports['predictor-3']}"], "labels": {"job": "ranker", "process": "predictor-3"}},
            {"targets": [f"127.0.0.1:{ports['promoter']}"], "labels": {"job": "promoter", "process": "promoter"}},
        ]
    finally:
        processes.stop_all()


def test_exporter_as_evergreen_starts_it_answers_and_ends_on_sigterm(tmp_path):
    settings = Settings(home=tmp_path, metrics_port=free_port())
    processes = Processes(settings)
    try:
        process = stack.metrics(settings, processes)
        processes.wait(process)
        assert http_get(f"http://127.0.0.1:{settings.metrics_port}/metrics")[0] == 200
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while processes.get("metrics"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "Traceback" not in (settings.processes / "metrics.log").read_text()
    finally:
        processes.stop_all()


def test_exporter_loads_nothing_heavy():
    heavy = {"torch", "pandas", "polars", "evidently", "numpy", "mlflow"}
    code = f"import monitoring.exporter, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
