"""The gateway with a real Envoy: who goes where, live, without a dropped request."""

import contextlib
import http.client
import threading
import time
from pathlib import Path

import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.buckets import BUCKET_HEADER, bucket, in_canary, threshold
from serving.envoy_config import MAX_REQUEST_BYTES
from serving.gateway import Backend, Gateway, Routing
from serving.processes import Processes, free_port
from tests import serving_lab

PATH = "/v2/models/homefeed-ranker/infer"


@pytest.fixture(scope="module")
def backends():
    found = {v: serving_lab.Backend(v) for v in ("1", "2")}
    yield found
    for backend in found.values():
        backend.stop()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, backends):
    settings = Settings(home=tmp_path_factory.mktemp("gateway"))
    processes = Processes(settings)
    door = Gateway(settings, processes)
    door.start(routing(backends, 0), free_port())
    yield door
    processes.stop_all()


def routing(backends, percent: int, salt: str = "s") -> Routing:
    return Routing(*(Backend(v, backends[v].port) for v in ("1", "2")), percent, salt)


def send(
    gateway: Gateway, header: str | None, body: bytes = b"x", path: str = PATH, connection=None
) -> tuple[int, str]:
    """Status and answering version of one request."""
    own = connection or http.client.HTTPConnection("127.0.0.1", gateway.process.ports["http"], timeout=10)
    own.request("POST", path, body, {BUCKET_HEADER: header} if header is not None else {})
    response = own.getresponse()
    response.read()
    if connection is None:
        own.close()
    return response.status, response.getheader("x-model-version", "")


def versions(gateway: Gateway, *headers: str | None) -> list[str]:
    return [send(gateway, header)[1] for header in headers]


def test_share_is_cut_exactly_at_the_bucket(gateway, backends):
    gateway.apply(routing(backends, 10))
    edge = threshold(10)
    assert versions(gateway, "0", str(edge - 1), str(edge), "9999") == ["2", "2", "1", "1"]
    gateway.shift(0)
    assert versions(gateway, "0", str(edge - 1)) == ["1", "1"]
    gateway.shift(100)
    assert versions(gateway, "0", "9999", None) == ["2", "2", "2"]


def test_request_without_a_sane_bucket_goes_to_the_champion(gateway, backends):
    gateway.apply(routing(backends, 50))
    assert set(versions(gateway, None, "", "-1", "abc", "1e3", "10000", "9" * 40)) == {"1"}


def test_python_and_proxy_agree_on_every_user_and_nobody_leaves_as_it_widens(gateway, backends):
    users = [f"u{i}" for i in range(120)]
    inside: set[str] = set()
    for percent in (10, 50, 100):
        gateway.apply(routing(backends, percent))
        port = gateway.process.ports["http"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        now = {u for u in users if send(gateway, str(bucket(u, "s")), connection=connection)[1] == "2"}
        connection.close()
        assert now == {u for u in users if in_canary(u, "s", percent)}
        assert inside <= now
        inside = now


class Load:
    """Three clients that ask all the time as different users, and remember what went wrong."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.failures, self.sent, self._stop = gateway, [], 0, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.process.ports["http"], timeout=10)
        while not self._stop.is_set():
            try:
                # Every fourth client knows nothing of buckets.
                header = str(self.sent * 7919 % 10_000) if self.sent % 4 else None
                status, _ = send(self.gateway, header, connection=connection)
                if status != 200:
                    self.failures.append(status)
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
            self.sent += 1
        connection.close()


def test_weight_changes_under_load_drop_no_request(gateway, backends):
    with Load(gateway) as load:
        for change in range(50):
            gateway.apply(routing(backends, change * 37 % 101))
        gateway.apply(Routing(champion=Backend("2", backends["2"].port)))  # promotion
        gateway.apply(Routing(champion=Backend("1", backends["1"].port)))  # and back
    assert load.failures == [] and load.sent > 100


def test_challenger_that_dies_and_a_rollback_at_half_drop_no_request(gateway, backends):
    dying = serving_lab.Backend("3")
    with Load(gateway) as load:
        gateway.apply(Routing(Backend("1", backends["1"].port), Backend("3", dying.port), 50, "s"))
        until(lambda: dying.served > 50)
        dying.stop()
        seen = load.sent
        until(lambda: load.sent > seen + 100)
        gateway.apply(Routing(Backend("1", backends["1"].port)))
        seen = load.sent
        until(lambda: load.sent > seen + 100)
    assert load.failures == []


def test_champion_that_dies_and_comes_back_drops_no_request_while_the_one_before_stands_by(gateway, backends):
    dying = serving_lab.Backend("4")
    line = Routing(Backend("4", dying.port), standby=Backend("1", backends["1"].port))
    with Load(gateway) as load:
        gateway.apply(line)
        until(lambda: dying.served > 50)
        before = backends["1"].served
        dying.stop()
        until(lambda: backends["1"].served > before + 100)
        again = serving_lab.Backend("4")
        gateway.apply(Routing(Backend("4", again.port), standby=line.standby))
        until(lambda: again.served > 100)
    again.stop()
    assert load.failures == []


def until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_standby_answers_nobody_while_the_champion_lives(gateway, backends):
    gateway.apply(Routing(Backend("1", backends["1"].port), standby=Backend("2", backends["2"].port)))
    assert versions(gateway, "0", "9999", None) == ["1"] * 3


def test_headers_that_predictors_read_arrive_as_they_were_sent(gateway, backends):
    gateway.apply(routing(backends, 10))
    headers = {"x-bucket": "3", "x-purpose": "replay", "x-priority": "low", "x-deadline-ms": "80"}
    connection = http.client.HTTPConnection("127.0.0.1", gateway.process.ports["http"], timeout=10)
    connection.request("POST", PATH, b"x", headers)
    assert connection.getresponse().getheader("x-model-version") == "2"
    connection.close()
    assert headers.items() <= backends["2"].heard.items()


@pytest.mark.parametrize("who", ["champion", "challenger"])
def test_shed_request_is_told_so_and_falls_on_nobody_else(gateway, backends, who):
    """429 is an answer: were it retried, one version's overload would become the other's."""
    gateway.apply(Routing(*(Backend(v, backends[v].port) for v in "12"), 50, "s", Backend("2", backends["2"].port)))
    version, bucket_of_one = ("1", "9999") if who == "champion" else ("2", "0")
    others = {v: b.served for v, b in backends.items() if v != version}
    backends[version].status = 429
    try:
        assert [send(gateway, bucket_of_one) for _ in range(20)] == [(429, version)] * 20
    finally:
        backends[version].status = 200
    assert {v: b.served for v, b in backends.items() if v != version} == others


def test_dead_challengers_users_get_the_champion_and_no_error(gateway, backends):
    dying = serving_lab.Backend("3")
    gateway.apply(Routing(Backend("1", backends["1"].port), Backend("3", dying.port), 50, "s"))
    assert versions(gateway, "0") == ["3"]
    dying.stop()
    assert [send(gateway, "0") for _ in range(30)] == [(200, "1")] * 30


def test_challengers_server_error_is_answered_by_the_champion(gateway, backends):
    gateway.apply(routing(backends, 50))
    backends["2"].status = 500
    try:
        assert send(gateway, "0") == (200, "1")
    finally:
        backends["2"].status = 200


def test_challengers_refusal_of_a_bad_request_is_not_retried(gateway, backends):
    gateway.apply(routing(backends, 50))
    backends["2"].status = 400
    try:
        assert send(gateway, "0") == (400, "2")
    finally:
        backends["2"].status = 200


def test_first_model_alone_gets_all_or_nothing(gateway, backends):
    alone = Backend("2", backends["2"].port)
    gateway.apply(Routing(challenger=alone, percent=0))
    assert send(gateway, "0")[0] == 503
    gateway.apply(Routing(challenger=alone, percent=100))
    assert versions(gateway, "0", "9999", None) == ["2", "2", "2"]


def test_no_model_is_a_clear_503_and_a_foreign_path_a_clear_404(gateway):
    gateway.apply(Routing())
    for path, status, says in ((PATH, 503, "no model serves yet"), ("/admin", 404, "nothing here")):
        connection = http.client.HTTPConnection("127.0.0.1", gateway.process.ports["http"], timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == status and says in response.read().decode()
        connection.close()


def test_repository_api_of_the_model_server_is_not_reachable_from_outside(gateway, backends):
    gateway.apply(routing(backends, 0))
    assert send(gateway, None, path="/v2/repository/models/homefeed-ranker/unload")[0] == 404


def test_oversized_body_is_refused_by_the_gateway(gateway, backends):
    gateway.apply(routing(backends, 0))
    assert send(gateway, None, body=b"x" * (MAX_REQUEST_BYTES - 1000))[0] == 200
    served = backends["1"].served
    with contextlib.suppress(OSError):  # it may hang up while we are still sending, which says the same
        assert send(gateway, None, body=b"x" * (20 * MAX_REQUEST_BYTES))[0] == 413
    assert backends["1"].served == served
    assert send(gateway, None)[0] == 200


def test_routing_survives_a_killed_envoy(gateway, backends):
    gateway.apply(routing(backends, 10))
    port = gateway.process.ports["http"]
    gateway._processes.stop("gateway", grace=0)
    assert gateway.process is None and gateway.url == ""
    asked = gateway.routing
    assert asked == routing(backends, 10)
    gateway.start(asked, port)
    assert versions(gateway, "999", "1000") == ["2", "1"]


def test_gateway_listens_on_loopback_only(gateway):
    import psutil

    listening = [c for c in psutil.Process(gateway.process.pid).connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) == 2 and {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_second_envoy_on_the_same_port_is_refused_and_the_first_goes_on(gateway, backends, tmp_path):
    gateway.apply(routing(backends, 0))
    settings = Settings(home=tmp_path)
    processes = Processes(settings)
    port = gateway.process.ports["http"]
    with pytest.raises(EvergreenError, match=f"port {port}, wanted by gateway, is in use.*EVERGREEN_GATEWAY_PORT"):
        Gateway(settings, processes).start(Routing(), port, "EVERGREEN_GATEWAY_PORT")
    assert processes.running() == [] and send(gateway, None) == (200, "1")


def test_change_without_a_running_gateway_is_a_clear_error_and_is_kept_for_the_next_start(tmp_path, backends):
    settings = Settings(home=tmp_path)
    door = Gateway(settings, Processes(settings))
    with pytest.raises(EvergreenError, match="the gateway does not run"):
        door.apply(routing(backends, 10))
    assert door.routing.percent == 10


def test_damaged_routing_file_is_one_clear_line(tmp_path: Path):
    settings = Settings(home=tmp_path)
    (settings.serving / "gateway").mkdir(parents=True)
    (settings.serving / "gateway" / "routing.json").write_text("[]")
    with pytest.raises(EvergreenError, match="unreadable gateway state"):
        _ = Gateway(settings, Processes(settings)).routing


def test_change_is_in_force_when_apply_returns(gateway, backends):
    for percent in (0, 100) * 15:
        gateway.apply(routing(backends, percent))
        assert versions(gateway, "5000") == ["2" if percent else "1"]
