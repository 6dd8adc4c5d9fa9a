"""Webhooks: MLflow's new deliveries wake the promoter, nothing else does."""

import base64
import hashlib
import hmac
import http.client
import json
import re
import time
from collections import Counter

import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.processes import free_port
from serving.webhook import (
    FERNET,
    LARGEST,
    NAME,
    SECRET,
    WINDOW,
    Deliveries,
    Hooks,
    Refused,
    register,
    server_environment,
)

BODY = json.dumps({"entity": "x", "action": "created", "data": {"name": "homefeed-ranker", "alias": "a"}}).encode()


def headers(secret: str, body: bytes = BODY, delivery: str = "d1", at: float | str = 1000.0) -> dict[str, str]:
    """What MLflow 3.17 sends."""
    stamp = str(int(at)) if isinstance(at, float) else at
    mac = hmac.new(secret.encode(), f"{delivery}.{stamp}.".encode() + body, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(mac).decode()
    return {"X-MLflow-Signature": signature, "X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": stamp}


def refused(deliveries: Deliveries, given: dict[str, str], body: bytes = BODY, now: float = 1000.0) -> tuple[int, str]:
    with pytest.raises(Refused) as error:
        deliveries.check(given, body, now)
    return error.value.status, error.value.outcome


def test_signature_is_the_one_that_mlflow_makes():
    from mlflow.webhooks.delivery import _generate_hmac_signature

    theirs = _generate_hmac_signature("s", "d1", "1000", BODY.decode())
    assert theirs == headers("s")["X-MLflow-Signature"]


def test_delivery_counts_once():
    deliveries = Deliveries("s")
    deliveries.check(headers("s"), BODY, 1000.0)
    assert refused(deliveries, headers("s")) == (409, "repeated")
    deliveries.check(headers("s", delivery="d2"), BODY, 1000.0)  # later ones may come first
    deliveries.check(headers("s", delivery="d0", at=999.0), BODY, 1000.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda h: h | {"X-MLflow-Signature": "v1,AAAA"},
        lambda h: h | {"X-MLflow-Signature": "\xff"},
        lambda h: h | {"X-MLflow-Delivery-Id": "another"},
        lambda h: h | {"X-MLflow-Timestamp": "1001"},
        lambda h: {},
    ],
)
def test_forged_delivery_is_refused(spoil):
    assert refused(Deliveries("s"), spoil(headers("s"))) == (401, "forged")


def test_changed_body_and_another_secret_are_refused():
    assert refused(Deliveries("s"), headers("s"), BODY + b" ") == (401, "forged")
    assert refused(Deliveries("s"), headers("other")) == (401, "forged")
    assert refused(Deliveries("s"), headers("s", at="soon")) == (400, "forged")


@pytest.mark.parametrize("side", [-1, 1])
def test_delivery_is_stale_beyond_the_window(side):
    deliveries = Deliveries("s")
    deliveries.check(headers("s", at=1000.0 + side * WINDOW), BODY, 1000.0)
    late = headers("s", delivery="d2", at=1000.0 + side * (WINDOW + 1))
    assert refused(deliveries, late) == (400, "stale")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    settings = Settings(home=tmp_path_factory.mktemp("hooks") / "home", promoter_port=free_port())
    woken: list[int] = []
    Hooks(settings, lambda: woken.append(1), lambda: {"acting": True, "problem": ""}).start()
    return settings, (settings.keys / SECRET).read_text(), woken


def post(settings: Settings, given: dict[str, str], body: bytes = BODY) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", settings.promoter_port, timeout=5)
    connection.request("POST", "/webhook", body, given)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def get(settings: Settings, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", settings.promoter_port, timeout=5)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def test_only_new_deliveries_about_the_model_wake_and_all_are_counted(running):
    settings, secret, woken = running
    other = BODY.replace(b"homefeed-ranker", b"example_model")
    now = time.time()
    big = b"x" * (LARGEST + 1)
    calls = [
        (200, headers(secret, delivery="a", at=now), BODY),
        (409, headers(secret, delivery="a", at=now), BODY),
        (401, headers("wrong", delivery="b", at=now), BODY),
        (400, headers(secret, delivery="c", at=now - WINDOW - 5), BODY),
        (413, headers(secret, big, delivery="d", at=now), big),
        (200, headers(secret, other, delivery="e", at=now), other),
        (200, headers(secret, b"[]", delivery="f", at=now), b"[]"),
        (401, headers(secret, delivery="g", at=now) | {"X-MLflow-Signature": b"v1,\xff"}, BODY),
        (401, headers(secret, delivery="h", at=now) | {"X-MLflow-Delivery-Id": b"\xff"}, BODY),
    ]
    before = counted(settings)
    answers = [post(settings, given, body) for _, given, body in calls]
    assert [status for status, _ in answers] == [status for status, *_ in calls]
    assert all(len(text) == 1 and "\n" not in next(iter(text.values())) for _, text in answers)
    assert woken == [1]
    assert counted(settings) - before == {
        "accepted": 1,
        "repeated": 1,
        "forged": 3,
        "stale": 1,
        "too large": 1,
        "ignored": 2,
    }


def counted(settings: Settings) -> Counter[str]:
    """Deliveries so far by outcome; the counters are the whole process's."""
    found = re.findall(r'evergreen_webhooks_total\{outcome="([^"]+)"\} (\d+)', get(settings, "/metrics"))
    return Counter({outcome: int(times) for outcome, times in found})


def test_health_tells_whether_it_acts(running):
    assert json.loads(get(running[0], "/healthz")) == {"acting": True, "problem": ""}


def test_pod_listens_where_its_service_and_its_probes_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERGREEN_PROMOTER_HOST", "127.0.0.2")  # stands for the pod's address
    settings = Settings(home=tmp_path / "home", promoter_port=free_port())
    Hooks(settings, lambda: None, lambda: {"acting": True}).start()
    connection = http.client.HTTPConnection("127.0.0.2", settings.promoter_port, timeout=5)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200


def test_taken_port_is_one_clear_line(running):
    with pytest.raises(EvergreenError, match=r"port \d+, wanted by the promoter, is in use.*EVERGREEN_PROMOTER_PORT"):
        Hooks(running[0], lambda: None, dict).start()


def test_webhook_is_registered_once_and_follows_the_port(tmp_path, monkeypatch):
    from serving.registry import Registry

    settings = Settings(home=tmp_path, promoter_port=20_001)
    for name, value in server_environment(settings).items():
        monkeypatch.setenv(name, value)
    register(settings, settings.tracking_uri)
    moved = settings.model_copy(update={"promoter_port": 20_002})
    register(moved, settings.tracking_uri)
    with Registry(settings).client() as client:
        hooks = client.list_webhooks()
    assert [(w.name, w.url, str(w.status)) for w in hooks] == [(NAME, "http://127.0.0.1:20002/webhook", "ACTIVE")]
    assert {p.name for p in settings.keys.iterdir()} >= {SECRET, FERNET}
