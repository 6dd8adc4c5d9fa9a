"""The rollout's state machine on a cluster: the same states, evidence and judge as on a laptop, another plane.

The API server and KServe's controller are the lab's, the predictors light ones in this process; registry, journal,
replayed requests and judge are the real ones.
"""

import http.server
import json
import threading
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest
from kserve import KServeClient

from evergreen.settings import Settings
from serving.cluster.knative import KnativePlane
from serving.cluster.service import Service
from serving.cluster.standard import StandardPlane
from serving.manifests import Release
from serving.plane import Serving
from tests.fault.serving_light import ACTIONS, LightScorer, no_features, scores
from tests.kserve_lab import KServe
from tests.kube_lab import KubeLab

PLANES = {"standard": StandardPlane, "knative": KnativePlane}
GOOD, BROKEN = ("1", "2"), "3"


class Doors:
    """One HTTP server for all doors: the host that is asked for says whose it is, and the lab's route who answers."""

    def __init__(self, kserve: KServe) -> None:
        doors, self.kserve, self._asked = self, kserve, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                version = doors.answering(self.server.door)
                items = next(i["data"] for i in body["inputs"] if i["name"] == "item_id")
                rows = {i: scores(i, version) for i in items}
                ranked = sorted(items, key=lambda i: -rows[i][0])
                outputs = [{"name": "item_id", "data": ranked}]
                outputs += [{"name": a, "data": [rows[i][n] for i in ranked]} for n, a in enumerate(ACTIONS)]
                status = 500 if version == BROKEN else 200
                answer = {"error": "boom"} if version == BROKEN else {"id": body["id"], "outputs": outputs}
                data = json.dumps(answer | {"model_version": version}).encode()
                self.send_response(status)
                self.send_header("x-model-version", version)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._handler = Handler
        self._servers: dict[str, http.server.ThreadingHTTPServer] = {}

    def resolve(self, url: str) -> str:
        """A loopback address for a cluster-internal one."""
        host = urlsplit(url).netloc
        if host not in self._servers:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler)
            server.daemon_threads, server.door = True, host
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers[host] = server
        return f"http://127.0.0.1:{self._servers[host].server_port}"

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def answering(self, host: str) -> str:
        pods = self.kserve.pods
        if "-v" in host:  # Standard: a version's own Service
            return host.partition("-v")[2].partition("-")[0]
        if host.startswith(("latest-", "prev-")):  # Knative: tags
            names = sorted(pods)
            return pods[names[-1] if host.startswith("latest-") else names[-2]].version
        route = self.kserve.routes[-1]
        oldest, *newer = sorted(route)
        share = route[newer[0]] if newer else 0
        self._asked += 37  # spreads the share evenly, as a weighted round robin does
        return newer[0] if newer and self._asked % 100 < share else oldest


@pytest.fixture(scope="module")
def lab():
    with KubeLab() as lab:
        yield lab, KServe(lab)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Settings and registry with all versions, for all tests: to make one takes seconds."""
    from serving import mlflow_runs
    from serving.registry import Registry

    root = tmp_path_factory.mktemp("cluster")
    settings = Settings(home=root / "home")
    registry = Registry(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_runs, "_signature", lambda bundle: None)  # it would read a bundle, which these are not
        for version in (*GOOD, BROKEN):
            bundle = root / version
            bundle.mkdir()
            (bundle / "behaviour.json").write_text(json.dumps({"version": version}))
            assert registry.register(bundle, f"key-{version}") == version
    return settings, registry


@pytest.fixture(params=PLANES)
def world(request, lab, home):
    """Registry, plane and doors; version 1 serves."""
    server, kserve = lab
    server.clear()
    server.call(kserve.clear)
    settings, registry = home
    registry.promote("1")
    doors = Doors(kserve)
    service = Service(KServeClient(config_dict=server.config, persist_config=False))
    made = PLANES[request.param](service, lambda v: Release(v, f"s3://models/{v}"), doors.resolve, 10, 0.01)
    made.settle("1")
    yield settings, registry, made, doors, kserve
    doors.close()


def roll(world, version):
    from serving.protocol import RankRequest
    from serving.replay import ReplayTraffic
    from serving.rollout import Rollout
    from serving.traffic import Asked

    settings, registry, plane, *_ = world
    at = datetime(2024, 1, 1, tzinfo=UTC)
    items = [tuple(f"i{(r * 7 + c) % 50}" for c in range(5)) for r in range(60)]
    asked = [Asked(RankRequest(f"r{i}", f"u{i}", row, {}, at)) for i, row in enumerate(items)]
    rollout = Rollout(settings, registry, plane, lambda *known: ReplayTraffic(*known, no_features, LightScorer))
    return rollout.run(version, asked, again=True)  # a version is rolled out on both planes


def test_good_version_becomes_champion_through_every_stage(world):
    _, registry, plane, _, kserve = world
    result = roll(world, "2")
    assert (result.outcome, result.serving_version) == ("champion", "2"), result.reason
    shares = [shares.get("2", 0) for shares in kserve.routes]
    assert shares == [0, 1, 10, 50, 100]
    assert plane.serving() == Serving("2") and registry.aliases()["champion"] == "2"
    assert kserve.outages == [] and kserve.replaced == []


def test_version_that_answers_errors_comes_back_before_anybody_gets_it(world):
    _, registry, plane, _, kserve = world
    result = roll(world, BROKEN)
    assert (result.outcome, result.serving_version) == ("rolled_back", "1")
    assert all(BROKEN not in shares for shares in kserve.routes)
    assert plane.serving() == Serving("1") and registry.aliases()["champion"] == "1"


def test_setting_chooses_the_plane_and_says_what_it_needs(home, lab, tmp_path, monkeypatch):
    from kubernetes.config import kube_config

    from engagement.errors import EvergreenError
    from serving.laptop_plane import LaptopPlane
    from serving.plane import Unfit
    from serving.planes import serving_plane

    settings, registry = home
    assert isinstance(serving_plane(settings, registry), LaptopPlane)
    config = tmp_path / "config"
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
    on_cluster = settings.model_copy(update={"plane": "standard"})
    with pytest.raises(EvergreenError, match="no cluster is configured"):
        serving_plane(on_cluster, registry)
    config.write_text(json.dumps(lab[0].config))
    lab[0].clear()
    made = serving_plane(on_cluster, registry)
    assert isinstance(made, StandardPlane)
    with pytest.raises(Unfit, match="99"):  # unknown to the registry, which answers
        made.open("", "99", "salt")
    made.settle("1")
    model = lab[0].get("inferenceservices", "homefeed-ranker")["spec"]["predictor"]["model"]
    assert model["storageUri"] == "pvc://evergreen-home/serving/models/1"
    assert (settings.serving / "models" / "1").is_dir()  # unpacked where the cluster looks for it
    made = serving_plane(settings.model_copy(update={"plane": "knative"}), registry)
    assert isinstance(made, KnativePlane)
