"""Serving with everything real: KServe servers, Envoy, MLflow, Feast's online store, PyTorch bundles.

The tests run in order on one home, as a week in its life: a first model, `evergreen up`, harmful challengers, a good
one, a killed rollout, `evergreen down`. While challengers come and go, a client keeps asking and must see no error.
"""

import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from engagement.errors import EvergreenError
from evergreen.settings import TELEMETRY_OFF
from serving.laptop_plane import PREDICTOR, LaptopPlane
from serving.plane import Serving
from serving.processes import Processes, free_port, http_get
from serving.protocol import MAX_CANDIDATES, RankRequest, from_json, to_json
from serving.registry import Registry
from serving.rollout import Rollout
from serving.rollout_state import Journal
from serving.stack import down, serving_state, up
from serving.traffic import Asked
from tests.fault.rollouts_lab import PATH, Crowd, post, predictor
from tests.serving_lab import Feed, feed_home, left_over, replay_requests, write_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def feed(tmp_path_factory) -> Feed:
    return feed_home(tmp_path_factory.mktemp("feed"))


@pytest.fixture(scope="module")
def requests(feed) -> list[RankRequest]:
    return replay_requests(feed, 120)


@pytest.fixture(scope="module")
def registry(feed, requests, tmp_path_factory) -> Registry:
    """Versions 1 and 2 are good, 3 has a NaN embedding for one item, 4 is NaN throughout, 5 and 6 are good."""
    root, found = tmp_path_factory.mktemp("bundles"), Registry(feed.settings)
    harm = {3: {"poisoned_item": requests[-1].item_ids[0]}, 4: {"broken": True}}
    for n in range(1, 7):
        bundle = write_bundle(root / str(n), feed.table, seed=n, **harm.get(n, {}))
        assert found.register(bundle, f"key-{n}") == str(n)
    return found


@pytest.fixture(scope="module")
def running(feed, registry):
    """The home under `evergreen up`, with UIs; the first model is champion by then."""
    if registry.champion() is None:
        registry.promote("1")
    started = up(feed.settings)
    Processes(feed.settings).stop("promoter")
    yield {s["name"]: s for s in started}
    down(feed.settings)


def asked(requests: list[RankRequest]) -> list[Asked]:
    """As a rollout gets them; of every other one it is known what was saved."""
    return [Asked(r, frozenset(r.item_ids[:1]) if i % 2 else None) for i, r in enumerate(requests)]


def test_first_model_goes_live_alone_and_leaves_nothing_running(feed, registry, requests):
    said: list[str] = []
    result = Rollout(feed.settings, registry).run("1", asked(requests), said.append)
    assert (result.outcome, result.serving_version) == ("champion", "1"), result.reason
    assert [(s["percent"], s["verdict"], s["errors"]) for s in result.steps] == [(0, "pass", 0), (100, "pass", 0)]
    dark, full = result.steps
    assert dark["answered"] == dark["pairs"] == 60 and full["answered"] == full["requests"] == 60
    assert registry.aliases()["champion"] == "1" and "previous" not in registry.aliases()
    assert any("100 %" in line for line in said)
    assert left_over(feed.settings.root) == []
    assert json.loads((feed.settings.serving / "rollouts" / "1.json").read_text())["outcome"] == "champion"


def test_up_serves_the_champion_and_both_uis_on_loopback(feed, running):
    assert running["gateway"]["note"] == "serves v1"
    assert "by itself; next:" in running["scheduler"]["note"]
    assert http_get(running["mlflow"]["url"])[0] == 200 and http_get(running["evidently"]["url"])[0] == 200
    assert running["metrics"]["url"].endswith("/metrics") and http_get(running["metrics"]["url"])[0] == 200
    assert serving_state(feed.settings)["summary"] == "v1 100 %"
    for process in Processes(feed.settings).running():
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [c.laddr.ip for p in family for c in p.connections() if c.status == psutil.CONN_LISTEN]
        assert listening and set(listening) == {"127.0.0.1"}, process.name


def test_wish_in_mlflow_is_heard_through_its_webhook_and_refused_without_evidence(feed, registry, running):
    from mlflow import MlflowClient

    up(feed.settings)  # with the promoter, which `running` has stopped: it would finish what tests leave half done
    try:
        url = running["mlflow"]["url"]
        MlflowClient(url, url).set_registered_model_alias("homefeed-ranker", "candidate", "5")
        deadline = time.monotonic() + 60
        while registry.aliases().get("candidate") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert registry.get("5").tags["promotion"] == "refused: the gate said nothing"
        assert registry.aliases()["champion"] == "1"
        counted = http_get(f"http://127.0.0.1:{feed.settings.promoter_port}/metrics")[1]
        assert 'evergreen_webhooks_total{outcome="accepted"} ' in counted
        assert 'evergreen_promotions_total{outcome="refused"} 1.0' in counted
    finally:
        Processes(feed.settings).stop("promoter")


def test_up_again_leaves_everything_alone(feed, running):
    before = {p.name: p.pid for p in Processes(feed.settings).running()}
    assert {s["name"] for s in up(feed.settings) if not s["already"]} == {"promoter"}
    Processes(feed.settings).stop("promoter")
    assert {p.name: p.pid for p in Processes(feed.settings).running()} == before


def test_answers_are_the_registered_models_scores_best_first(feed, registry, running, requests):
    from serving.scoring import Scorer, open_features

    scorer = Scorer(registry.fetch("1"), open_features(feed.settings))
    port = predictor(feed, "1").ports["http"]
    for request in requests[:10]:
        status, body, headers = post(port, json.dumps(to_json(request)).encode())
        assert (status, body["id"], body["model_version"]) == (200, request.request_id, "1")
        assert headers["x-model-version"] == "1"
        ranked, scores, _ = from_json(body, scorer.spec.actions)
        truth = dict(zip(request.item_ids, scorer(request), strict=True))
        assert sorted(ranked) == sorted(request.item_ids)
        np.testing.assert_allclose(scores, [truth[i] for i in ranked], atol=1e-6)
        assert (np.diff(scores[:, scorer.spec.actions.index("save")]) <= 0).all()


def test_request_without_an_id_gets_one(feed, running, requests):
    body = to_json(requests[0])
    del body["id"]
    status, answer, _ = post(predictor(feed, "1").ports["http"], json.dumps(body).encode())
    assert status == 200 and isinstance(answer["id"], str) and answer["id"]


def test_binary_tensors_give_the_same_answer_as_json(feed, running, requests):
    from kserve import InferInput, InferRequest, InferResponse

    inputs = []
    for tensor in to_json(requests[0])["inputs"]:
        values = np.array(tensor["data"], dtype=object if tensor["datatype"] == "BYTES" else np.int64)
        made = InferInput(tensor["name"], tensor["shape"], tensor["datatype"])
        made.set_data_from_numpy(values, binary_data=True)
        inputs.append(made)
    body, size = InferRequest("homefeed-ranker", inputs, "r", parameters={"binary_data_output": True}).to_rest()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(size)}
    connection = http.client.HTTPConnection("127.0.0.1", predictor(feed, "1").ports["http"], timeout=20)
    connection.request("POST", PATH, body, headers)
    response = connection.getresponse()
    length = int(response.getheader("inference-header-content-length"))
    binary = InferResponse.from_bytes(response.read(), length)
    connection.close()
    _, plain, _ = post(predictor(feed, "1").ports["http"], json.dumps(to_json(requests[0])).encode())
    saves = next(o["data"] for o in plain["outputs"] if o["name"] == "save")
    np.testing.assert_allclose(binary.get_output_by_name("save").as_numpy(), saves, atol=1e-6)


def body_with(**changes) -> bytes:
    """A good request with some inputs replaced; None takes one away."""
    inputs = {
        "user_id": {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u1"]},
        "item_id": {"name": "item_id", "datatype": "BYTES", "shape": [2], "data": ["i1", "i2"]},
    } | changes
    return json.dumps({"id": "x", "inputs": [i for i in inputs.values() if i]}).encode()


MANY = MAX_CANDIDATES + 1
BAD = {
    "not-json": (b"{", {}, 400),
    "no-body": (b"", {}, 400),
    "no-inputs": (b"{}", {}, 400),
    "inputs-of-the-wrong-kind": (b'{"inputs": {"user_id": "u1"}}', {}, 400),
    "no-candidates": (body_with(item_id={"name": "item_id", "datatype": "BYTES", "shape": [0], "data": []}), {}, 400),
    "too-many": (
        body_with(item_id={"name": "item_id", "datatype": "BYTES", "shape": [MANY], "data": ["i"] * MANY}),
        {},
        400,
    ),
    "wrong-type": (body_with(user_id={"name": "user_id", "datatype": "FP32", "shape": [1], "data": [1.5]}), {}, 400),
    "no-user": (body_with(user_id=None), {}, 400),
    "unknown-output": (
        json.dumps(json.loads(body_with()) | {"outputs": [{"name": "colour"}]}).encode(),
        {},
        400,
    ),
    "binary-without-length": (b"\x00\x01", {"content-type": "application/octet-stream"}, 400),
    "binary-that-lies": (
        b'{"inputs":[{"name":"user_id","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":9}}]}\xff\xff',
        {"content-type": "application/octet-stream", "inference-header-content-length": "98"},
        400,
    ),
    "binary-not-utf8": (
        b'{"inputs":[{"name":"user_id","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}'
        b"\x01\x00\x00\x00\xff",
        {"content-type": "application/octet-stream", "inference-header-content-length": "98"},
        400,
    ),
    "length-is-no-number": (
        b"{}",
        {"content-type": "application/octet-stream", "inference-header-content-length": "many"},
        400,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_the_clients_fault_and_told_in_one_line(feed, running, requests, name):
    body, headers, wanted = BAD[name]
    status, answer, _ = post(predictor(feed, "1").ports["http"], body, headers)
    assert status == wanted, answer
    assert list(answer) == ["error"] and "\n" not in answer["error"] and len(answer["error"]) < 400


def test_unknown_model_is_not_found(feed, running):
    port = predictor(feed, "1").ports["http"]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v2/models/nobody/infer", body_with(), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 404 and "nobody" in json.loads(response.read())["error"]
    connection.close()


def test_bad_requests_fill_no_log_and_disturb_nobody(feed, running, requests):
    process = predictor(feed, "1")
    for _ in range(20):
        assert post(process.ports["http"], body_with(user_id=None))[0] == 400
    assert post(process.ports["http"], json.dumps(to_json(requests[0])).encode())[0] == 200
    assert Path(process.log).stat().st_size < 2000


def test_challenger_with_a_nan_for_one_item_comes_back_and_no_user_sees_an_error(feed, registry, running, requests):
    poisoned = requests[-1].item_ids[0]
    showing = [r for r in requests if poisoned in r.item_ids]
    window = (showing * 60)[:30] + requests[:30]
    with Crowd(feed, requests) as crowd:
        result = Rollout(feed.settings, registry).run("3", asked(window))
    assert result.outcome == "rolled_back" and "model yields non-finite scores" in result.reason
    assert [s["percent"] for s in result.steps] == [0]  # no user ever had it
    assert registry.aliases()["champion"] == "1"
    assert registry.get("3").tags["rollout"].startswith("rolled_back: ")
    assert serving_state(feed.settings)["summary"] == "v1 100 %" and predictor(feed, "3") is None
    assert crowd.asked > 20 and crowd.failures == []


def test_good_challenger_takes_over_with_its_own_process_and_no_user_sees_an_error(feed, registry, running, requests):
    seen: list[int] = []

    def look(line: str) -> None:
        if "at 100 %: gathering" in line:
            seen.append(predictor(feed, "2").pid)

    with Crowd(feed, requests) as crowd:
        result = Rollout(feed.settings, registry).run("2", asked(requests), look)
        time.sleep(0.3)
    assert result.outcome == "champion", result.reason
    stages = [(s["percent"], s["verdict"], s["errors"]) for s in result.steps]
    assert stages == [(p, "pass", 0) for p in (0, 1, 10, 50, 100)]
    assert registry.aliases()["champion"] == "2" and registry.aliases()["previous"] == "1"
    process = predictor(feed, "2")
    assert [process.pid] == seen and process.parent == 0
    assert predictor(feed, "1") is not None and serving_state(feed.settings)["summary"] == "v2 100 %"
    unpacked = {d.name for d in (feed.settings.serving / "models").iterdir()}
    assert unpacked == {"1", "2"}  # the champion's, and that of the one that stands by
    assert crowd.asked > 20 and crowd.failures == []


def test_way_back_to_the_standby_is_a_change_of_routes_without_the_registry(feed, registry, running, requests):
    """And while the champion is dead, the standby answers by itself."""
    away = feed.settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:1"})
    plane = LaptopPlane(away, Registry(away))
    with Crowd(feed, requests) as crowd:
        for champion, standby in (("1", "2"), ("2", "1")):
            plane.settle(champion, standby)
            assert serving_state(feed.settings)["summary"] == f"v{champion} 100 %"
        psutil.Process(predictor(feed, "2").pid).kill()
        time.sleep(0.5)
        plane = LaptopPlane(feed.settings, registry)
        assert plane.serving() == Serving()  # not version 2: so the promoter starts it again
        plane.settle("2", "1")  # as whoever watches does when the champion died
        time.sleep(0.3)
    assert predictor(feed, "2").alive and crowd.asked > 5 and crowd.failures == []


DRIVER = """
import pickle, sys
from evergreen.settings import Settings
from serving.registry import Registry
from serving.protocol import RankRequest
from serving.rollout import Rollout
from serving.traffic import Asked
import json, datetime
settings = Settings(**json.loads(sys.argv[1]))
rows = json.load(open(sys.argv[2]))
at = datetime.datetime.fromisoformat(sys.argv[3])
requests = [Asked(RankRequest(r[0], r[1], tuple(r[2]), {}, at)) for r in rows]
Rollout(settings, Registry(settings)).run("6", requests, lambda line: print(line, flush=True))
""".replace("import pickle, sys", "import sys")


def test_rollout_killed_at_half_is_finished_by_the_next_and_promoted_once(feed, registry, running, requests, tmp_path):
    rows = tmp_path / "requests.json"
    rows.write_text(json.dumps([(r.request_id, r.user_id, r.item_ids) for r in requests]))
    settings = feed.settings.model_dump(mode="json")
    command = [sys.executable, "-c", DRIVER, json.dumps(settings), str(rows), feed.as_of.isoformat()]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | TELEMETRY_OFF)
    with Crowd(feed, requests) as crowd:
        assert any("at 50 %: gathering" in line for line in driver.stdout)
        challenger = predictor(feed, "6")
        driver.kill()
        driver.wait()
        time.sleep(0.5)
        assert not challenger.alive  # nobody watches any more: the champion has all users
        assert registry.aliases()["champion"] == "2"
        result = Rollout(feed.settings, registry).run("6", asked(requests))
    assert result.outcome == "champion", result.reason
    # What had passed before the kill was not repeated.
    assert [(s["percent"], s["looks"]) for s in result.steps] == [(p, 1) for p in (0, 1, 10, 50, 100)]
    ends = [line["version"] for line in Journal(feed.settings.serving).transitions() if line["to"] == "champion"]
    assert ends == ["1", "2", "6"]
    assert registry.aliases()["champion"] == "6" and registry.aliases()["previous"] == "2"
    names = ["evidently", "gateway", "metrics", "mlflow", PREDICTOR + "2", PREDICTOR + "6", "scheduler"]
    assert sorted(serving_state(feed.settings)["processes"]) == names
    assert crowd.failures == []


def test_corrupted_bundle_is_never_served(feed, registry, running, requests):
    stored = registry.fetch("5")
    before = (stored / "model.safetensors").read_bytes()
    for copy in (feed.settings.root / "mlflow").rglob("model.safetensors"):
        if copy.read_bytes() == before:
            data = bytearray(before)
            data[-1] ^= 1
            copy.write_bytes(data)
    (stored / "model.safetensors").write_bytes(data)
    result = Rollout(feed.settings, registry).run("5", asked(requests), again=True)
    assert result.outcome == "rolled_back" and "are not those that were registered" in result.reason
    assert result.steps == () and registry.aliases()["champion"] == "6"


def test_server_refuses_a_bundle_that_changed_after_it_was_fetched(feed, registry):
    bundle = registry.fetch("4")
    command = [sys.executable, "-m", "serving.server", "--bundle", str(bundle), "--port", "1", "--digest", "0" * 64]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "digest differs" in done.stderr and len(done.stderr.splitlines()) == 1


def test_taken_port_is_told_with_its_setting_before_anything_starts(feed, running, tmp_path):
    taken = Processes(feed.settings).get("gateway").ports["http"]
    names = ("gateway_port", "mlflow_port", "evidently_port", "scheduler_port", "metrics_port")
    for setting in names:
        ports = {name: free_port() for name in names} | {setting: taken}
        other = feed.settings.model_copy(update={"home": tmp_path} | ports)
        with pytest.raises(EvergreenError, match=f"port {taken}.*is in use.*EVERGREEN_{setting.upper()}"):
            up(other)
        assert left_over(tmp_path) == []


def test_down_stops_exactly_what_up_started(feed, running):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        predictors = [PREDICTOR + "2", PREDICTOR + "6"]
        assert sorted(down(feed.settings)) == ["evidently", "gateway", "metrics", "mlflow", *predictors, "scheduler"]
        assert left_over(feed.settings.root) == [] and bystander.poll() is None
        assert down(feed.settings) == []
        assert "does not run" in serving_state(feed.settings)["summary"]
    finally:
        bystander.kill()
        bystander.wait()
