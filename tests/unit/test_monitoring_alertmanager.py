"""Our payload beside that of a real Alertmanager, for the same alert: what reads theirs, reads ours."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest

from monitoring import alerts as rules
from monitoring.notify import Alerts
from monitoring.webhook import payload
from tests.alert_receiver import receiving

ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
pytestmark = pytest.mark.skipif(not ALERTMANAGER, reason="no Alertmanager here (Debian: prometheus-alertmanager)")

MODEL = "homefeed-ranker"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A receiver, and a function that posts alerts to an Alertmanager that tells it."""
    room = tmp_path_factory.mktemp("alertmanager")
    with receiving() as receiver:
        (room / "config.yml").write_text(
            json.dumps(  # YAML, too
                {
                    "route": {
                        "receiver": "evergreen",
                        "group_by": ["model"],
                        "group_wait": "0s",
                        "group_interval": "1s",
                    },
                    "receivers": [{"name": "evergreen", "webhook_configs": [{"url": receiver.url}]}],
                }
            )
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [ALERTMANAGER, f"--config.file={room}/config.yml", f"--storage.path={room}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
        with (room / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait(lambda: answers(port), room / "log")
            yield receiver, lambda alerts: post(port, alerts), room / "log"
        finally:
            process.terminate()
            process.wait(20)


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(port, alerts):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/v2/alerts",
        json.dumps(alerts).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def wait(until, log):
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def shape(value):
    """Keys and types of a JSON value, all the way down; what labels and annotations hold is left to the next."""
    if isinstance(value, dict):
        return {key: shape(held) for key, held in sorted(value.items())}
    if isinstance(value, list):
        return [shape(held) for held in value]
    return type(value).__name__


def test_firing_and_resolved_payloads_have_the_keys_types_and_names_of_alertmanagers(real, tmp_path):
    receiver, post_alerts, log = real
    now = datetime.now(UTC)
    drift = rules._alert("EvergreenDrift", MODEL, "3 columns keep drifting", ["age – “élan”"], now.isoformat())
    [ours] = payload([{**asdict(drift), "ends_at": ""}], MODEL)["alerts"]
    theirs = {name: ours[name] for name in ("labels", "annotations", "startsAt")}

    post_alerts([theirs])
    wait(lambda: len(receiver.got) >= 1, log)
    post_alerts([{**theirs, "endsAt": (now + timedelta(milliseconds=1)).isoformat()}])
    wait(lambda: receiver.got[-1]["status"] == "resolved", log)
    told = {body["status"]: body for body in receiver.got}
    assert set(told) == {"firing", "resolved"}

    with receiving() as mine:
        alerts = Alerts(tmp_path / "alerts.json", MODEL, mine.url)
        for hours, found in enumerate(([drift], [], [])):
            alerts.update(found, now + timedelta(hours=hours))
    assert [body["status"] for body in mine.got] == ["firing", "resolved"]

    for body in mine.got:
        real_one = told[body["status"]]
        assert shape(body) == shape(real_one)
        same = ("receiver", "status", "version", "groupKey", "groupLabels", "commonLabels", "commonAnnotations")
        assert {k: body[k] for k in same} == {k: real_one[k] for k in same}
        [one], [other] = body["alerts"], real_one["alerts"]
        for name in ("status", "labels", "annotations", "fingerprint"):
            assert one[name] == other[name]
        assert instant(one["startsAt"]) == instant(other["startsAt"])
    assert mine.got[0]["alerts"][0]["endsAt"] == told["firing"]["alerts"][0]["endsAt"]  # year 1: it fires still


def instant(text):
    return datetime.fromisoformat(text).replace(microsecond=0)
