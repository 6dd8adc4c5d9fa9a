"""Evidence from requests that are asked again: over real HTTP, from servers that misbehave in known ways."""

import http.server
import json
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engagement.importers import contract_dir
from engagement.store import EngagementStore
from engagement.table import TableSpec
from evergreen.settings import Settings
from model.exam import kept
from model.metrics import ranks
from serving import client as clients
from serving.buckets import BUCKET_HEADER, bucket, in_canary
from serving.client import Call, Client
from serving.evidence import CHALLENGER, CHAMPION, Arm, Evidence, Pairs
from serving.plane import Doors
from serving.protocol import RankRequest
from serving.replay import ReplayTraffic, _Truth
from serving.traffic import Asked, Portion, Stage, Together, latest_requests, plus
from tests.serving_lab import small_table
from tests.synth import START, write_contract_dir

SPEC = TableSpec((), ("save", "click"), "save")
ITEMS = tuple(f"i{n}" for n in range(6))


def scores(item: str) -> list[float]:
    return [(int(item[1:]) * 37 % 11) / 11, 0.5]


class Server:
    """Ranks by `scores`; `act(request id)` may return another status, or change the rows it answers with."""

    def __init__(self, version: str, act=lambda name, rows: 200) -> None:
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", -1

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.heard.append((body["id"], dict(self.headers)))
                owner.peers.add(self.client_address)
                rows = {i: scores(i) for i in body["inputs"][1]["data"]}
                status = act(body["id"], rows)
                ranked = sorted(rows, key=lambda i: -rows[i][0])
                outputs = [{"name": "item_id", "data": ranked}]
                outputs += [{"name": a, "data": [rows[i][n] for i in ranked]} for n, a in enumerate(SPEC.actions)]
                found = {"model_version": version, "outputs": outputs} if status == 200 else {"error": "no"}
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.heard, self.peers = [], set()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.door = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    started = []

    def start(*arguments):
        started.append(Server(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop()


class Truth:
    spec = SPEC

    def __call__(self, request):
        return np.array([scores(i) for i in request.item_ids], np.float32)


def asked(count: int, saved=frozenset({"i3"})) -> list[Asked]:
    return [Asked(RankRequest(f"r{n}", f"u{n % 7}", ITEMS), saved if n % 2 else None) for n in range(count)]


def traffic(tmp_path, requests) -> ReplayTraffic:
    found = ReplayTraffic(Settings(home=tmp_path), None, requests)
    found._truth = _Truth(Truth())
    return found


def stage(percent, champion, challenger, gateway=None) -> Stage:
    return Stage("1", "2", percent, "s", Doors((gateway or champion).door, champion.door, challenger.door))


def test_dark_stage_puts_every_request_to_both_and_neither_is_always_first(serve, tmp_path):
    order = []
    one, two = (serve(v, lambda name, rows, v=v: order.append((name, v)) or 200) for v in "12")
    evidence = traffic(tmp_path, asked(40)).look(stage(0, one, two), None).evidence
    assert len(evidence.pairs) == 40 and len(evidence.champion) == len(evidence.challenger) == 0
    assert not evidence.pairs.failed_P2.any() and not evidence.pairs.invalid_P2.any()
    assert np.isfinite(evidence.pairs.latency_P2).all()
    first = [next(v for n, v in order if n == f"r{r}") for r in range(40)]
    assert 10 <= first.count("1") <= 30
    assert all(h["x-purpose"] == "shadow" and h["x-priority"] == "low" for _, h in one.heard + two.heard)
    assert len(one.peers) <= clients.WORKERS and len(two.peers) <= clients.WORKERS  # connections are kept


def test_hits_are_counted_where_the_outcome_is_known_and_by_the_rule_of_the_gate(serve, tmp_path):
    def ties(name, rows):
        for row in rows.values():
            row[0] = 0.5
        return 200

    one, two = serve("1"), serve("2", ties)
    pairs = traffic(tmp_path, asked(10, frozenset(ITEMS[:2]))).look(stage(0, one, two), None).evidence.pairs
    assert np.isnan(pairs.hits_P2[::2]).all()
    best = sorted(ITEMS, key=lambda i: -scores(i)[0])[:3]
    assert (pairs.hits_P2[1::2, CHAMPION] == len({"i0", "i1"} & set(best))).all()
    assert pairs.invalid_P2[:, CHALLENGER].all()  # not the registered model's scores
    assert np.isnan(pairs.hits_P2[1::2, CHALLENGER]).all()


def test_first_three_are_those_of_the_gates_metric_also_under_ties():
    from model.metrics import first

    table = small_table(requests=8, candidates=6)
    rng = np.random.default_rng(0)
    by_row = rng.integers(0, 3, table.rows).astype(np.float32)  # many ties
    place = ranks(table, by_row)
    for r in range(table.requests):
        rows = slice(table.offsets[r], table.offsets[r + 1])
        found = first(table.request_id[r], table.item_id[rows].tolist(), by_row[rows])
        assert found.tolist() == np.argsort(place[rows])[:3].tolist()


def test_requests_that_were_shed_off_the_users_path_are_no_evidence(serve, tmp_path):
    one = serve("1")
    two = serve("2", lambda name, rows: 429 if int(name[1:]) % 4 == 0 else 200)
    pairs = traffic(tmp_path, asked(20)).look(stage(0, one, two), None).evidence.pairs
    assert len(pairs) == 15 and not pairs.failed_P2.any()


def wrong_order(rows):
    best, worst = max(rows, key=lambda i: rows[i][0]), min(rows, key=lambda i: rows[i][0])
    rows[best], rows[worst] = rows[worst], rows[best]


FAULTS = {
    "off": (lambda rows: rows["i3"].__setitem__(1, 0.5 + 2e-4), "wrong scores: request r0 is off by 0.0002"),
    "nan": (lambda rows: rows["i3"].__setitem__(1, float("nan")), "request r0 has non-finite scores"),
    "short": (lambda rows: rows.pop("i3"), "request r0 has predictions for 5 of 6 candidates"),
    "swapped": (wrong_order, "wrong scores: request r0 is off by"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_answer_with_wrong_content_is_invalid_and_says_why(serve, tmp_path, name):
    spoil, says = FAULTS[name]
    one, two = serve("1"), serve("2", lambda _, rows: spoil(rows) and None or 200)
    pairs = traffic(tmp_path, asked(1)).look(stage(0, one, two), None).evidence.pairs
    assert pairs.invalid_P2.tolist() == [[False, True]] and pairs.problems[0].startswith(says)


def test_scores_within_the_tolerance_are_the_registered_models(serve, tmp_path):
    one, two = serve("1"), serve("2", lambda _, rows: rows["i3"].__setitem__(1, 0.5 + 9e-5) or 200)
    assert not traffic(tmp_path, asked(1)).look(stage(0, one, two), None).evidence.pairs.invalid_P2.any()


def test_users_go_through_the_gateway_and_count_for_the_version_that_they_should_get(serve, tmp_path):
    one, two = serve("1"), serve("2")  # the gateway is the champion itself: it steps in for all of the canary's users
    requests = asked(40)
    evidence = traffic(tmp_path, requests).look(stage(50, one, two), None).evidence
    ours = [a.request for a in requests if in_canary(a.request.user_id, "s", 50)]
    assert len(evidence.challenger) == len(ours) and len(evidence.champion) == 40 - len(ours) > 0
    assert evidence.challenger.failed_N.all() and not evidence.champion.failed_N.any()
    assert any("v1 stepped in" in p for p in evidence.challenger.problems)
    replayed = [(name, h) for name, h in one.heard if h["x-purpose"] == "replay"]
    users = {a.request.request_id: a.request.user_id for a in requests}
    assert len(replayed) == 40
    assert all(h[BUCKET_HEADER] == str(bucket(users[name], "s")) for name, h in replayed)


def test_looks_of_a_stage_take_up_where_the_last_one_left_off(serve, tmp_path):
    one, two = serve("1"), serve("2")
    source = traffic(tmp_path, asked(130))
    portion = source.look(stage(0, one, two), {"percent": 10, "turn": 3})
    again = source.look(stage(0, one, two), json.loads(json.dumps(portion.mark)))
    seen = [int(name[1:]) for name, _ in two.heard]
    assert sorted(seen) == list(range(120)) and len(portion.evidence.pairs) == len(again.evidence.pairs) == 60


def test_door_behind_which_somebody_hangs_is_given_up_and_nothing_is_invented(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "SLOW", 0.1)
    monkeypatch.setattr("serving.replay.SLOW", 0.1)
    hang = threading.Event()
    one, two = serve("1"), serve("2", lambda name, rows: hang.wait(20) and 200 or 200)
    pairs = traffic(tmp_path, asked(60)).look(stage(0, one, two), None).evidence.pairs
    hang.set()
    assert clients.HUNG <= len(pairs) <= clients.HUNG + clients.WORKERS
    assert pairs.failed_P2[:, CHALLENGER].all() and np.isfinite(pairs.latency_P2[:, CHAMPION]).all()


def test_connection_that_the_server_closed_in_between_costs_no_request(serve):
    server = serve("1")
    with Client("m", SPEC.actions) as client:
        call = Call(server.door, asked(1)[0].request)
        assert client.ask(call).status == 200
        client._opened[0].sock.shutdown(2)
        assert client.ask(call).status == 200


def test_sources_together_add_up_and_keep_their_own_marks():
    class Source:
        def __init__(self, count):
            self.count = count

        def look(self, stage, mark):
            arm = Arm(
                *(np.zeros(self.count, bool) for _ in range(4)), *(np.ones(self.count),) * 2, np.arange(self.count)
            )
            memory = (1.0, float("nan")) if self.count == 2 else (float("nan"), 7.0)
            return Portion(Evidence(stage.percent, challenger=arm, memory_mb=memory), (mark or 0) + self.count)

    both, at = Together(Source(2), Source(3)), Stage("1", "2", 10, "s", Doors("", "", ""))
    portion = both.look(at, None)
    assert len(portion.evidence.challenger) == 5 and portion.evidence.memory_mb == (1.0, 7.0)
    assert portion.mark == [2, 3] and both.look(at, portion.mark).mark == [4, 6]
    empty = plus(Evidence(10), Evidence(10))
    assert len(empty.pairs) == 0 and empty.pairs.failed_P2.shape == Pairs().failed_P2.shape == (0, 2)


def test_outcomes_are_told_of_requests_that_no_model_was_trained_on(tmp_path):
    store = EngagementStore(tmp_path / "data")
    store.append(contract_dir.read(write_contract_dir(tmp_path / "feed", users=20, items=40, days=6)))
    as_of, unseen = START + timedelta(days=6), START + timedelta(days=5)
    snapshot = store.snapshot(as_of)
    found, only_kept = latest_requests(snapshot, as_of, unseen), latest_requests(snapshot, as_of)
    assert [a.request.request_id for a in found] == [a.request.request_id for a in only_kept]
    assert len(found) > 50
    saves = {(r["request_id"], r["item_id"]) for r in snapshot.engagements().to_pylist() if r["save"]}
    for all_of, held in zip(found, only_kept, strict=True):
        name = all_of.request.request_id
        assert (held.saved is not None) == bool(kept(np.array([name.encode()]))[0])
        if all_of.saved is None:
            assert all_of.request.time == as_of
        else:
            assert held.saved is not None or all_of.request.time >= unseen
            assert all_of.saved == {i for i in all_of.request.item_ids if (name, i) in saves}
            assert all_of.request.time < datetime.now(UTC) and all_of.request.time < as_of
    assert any(a.saved for a in found) and any(a.saved is None for a in found)
