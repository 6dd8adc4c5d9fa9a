"""One real predictor process: both protocols, bad requests beside good ones, overload, and how it stops."""

import asyncio
import http.client
import json
import re
import signal
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import psutil
import pytest
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from serving.processes import http_get
from serving.protocol import RankRequest, from_json, to_json
from serving.rest_door import DISCARDED, MAX_BODY
from tests.fault.serving_small import ACTIONS, MODEL, STRANGER, VERSION, scores
from tests.server_lab import PATH, Server, binary_body, message, start, text

GOOD = RankRequest("r1", "u1", ("a", "b", "c"), {"surface": "home"})
SLOW = RankRequest("r2", "u1", ("a", "slow"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    found = start(tmp_path_factory.mktemp("server"))
    yield found
    found.process.kill()
    found.process.wait()


def expected(request: RankRequest) -> tuple[list[str], np.ndarray]:
    ranked = sorted(request.item_ids, key=lambda i: -scores(i)[0])
    return ranked, np.array([scores(i) for i in ranked], np.float32)


def test_answer_is_best_first_with_probabilities_version_and_id(server):
    status, body, headers = server.rank(GOOD)
    assert status == 200 and headers["x-model-version"] == body["model_version"] == VERSION
    assert (body["id"], body["model_name"]) == ("r1", MODEL) and "x-degraded" not in headers
    ranked, found, version = from_json(body, ACTIONS)
    names, values = expected(GOOD)
    assert (list(ranked), version) == (names, VERSION)
    np.testing.assert_array_equal(found, values)


def test_request_without_id_gets_one(server):
    body = {"inputs": to_json(GOOD)["inputs"]}
    assert json.loads(server.call(json.dumps(body).encode())[1])["id"]


def test_binary_request_and_binary_answer_say_the_same_as_json(server):
    body, headers = binary_body(GOOD, parameters={"binary_data_output": True})
    status, data, found = server.call(body, headers)
    assert status == 200, data
    length = int(found["inference-header-content-length"])
    head, tail = json.loads(data[:length]), data[length:]
    names, values = expected(GOOD)
    assert [o["parameters"]["binary_data_size"] for o in head["outputs"]] == [len(text(names)), 12, 12]
    assert tail == text(names) + values.T.astype("<f4").tobytes()


def test_caller_may_choose_outputs_and_which_of_them_are_binary(server):
    wanted = [{"name": "save", "parameters": {"binary_data": True}}, {"name": "item_id"}]
    status, data, found = server.call(json.dumps(to_json(GOOD) | {"outputs": wanted}).encode())
    length = int(found["inference-header-content-length"])
    outputs = {o["name"]: o for o in json.loads(data[:length])["outputs"]}
    assert status == 200 and outputs.keys() == {"save", "item_id"} and len(data) == length + 12
    assert outputs["item_id"]["data"] == expected(GOOD)[0]


@pytest.mark.parametrize("raw", [True, False])
def test_grpc_says_the_same_as_rest(server, raw):
    answer = pb.ModelInferResponse.FromString(server.grpc(message(GOOD, raw).SerializeToString()))
    names, values = expected(GOOD)
    assert (answer.id, answer.model_name, answer.model_version) == ("r1", MODEL, VERSION)
    assert [o.name for o in answer.outputs] == ["item_id", *ACTIONS]
    assert list(answer.raw_output_contents) == [text(names), *(c.tobytes() for c in values.T)]


def test_kserves_own_grpc_client_understands_the_answer(server):
    async def ask():
        client = InferenceGRPCClient(f"127.0.0.1:{server.grpc_port}", retries=0)
        inputs = []
        for given in to_json(GOOD)["inputs"]:
            inputs.append(InferInput(given["name"], given["shape"], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array([v.encode() for v in given["data"]], object), binary_data=True)
        try:
            assert await client.is_model_ready(MODEL)
            return await client.infer(InferRequest(MODEL, inputs, request_id="r1"), timeout=20)
        finally:
            await client.close()

    answer = asyncio.run(ask())
    np.testing.assert_array_equal(answer.get_output_by_name("save").as_numpy(), expected(GOOD)[1][:, 0])


def test_stranger_gets_the_popularity_and_is_told_so(server):
    status, body, headers = server.rank(RankRequest("r", STRANGER, GOOD.item_ids))
    assert status == 200 and headers["x-degraded"] == "popularity"
    assert from_json(body, ACTIONS)[0] == tuple(expected(GOOD)[0])
    raw = message(RankRequest("r", STRANGER, GOOD.item_ids)).SerializeToString()
    answer = pb.ModelInferResponse.FromString(server.grpc(raw))
    assert answer.parameters["degraded"].string_param == "popularity"


def test_metadata_readiness_and_metrics_are_kserves(server):
    base = f"http://127.0.0.1:{server.port}"
    assert http_get(f"{base}/v2/models/{MODEL}/ready")[0] == http_get(f"{base}/v2/health/live")[0] == 200
    status, text_ = http_get(f"{base}/v2/models/{MODEL}")
    told = json.loads(text_)
    assert status == 200 and {i["name"] for i in told["inputs"]} == {"user_id", "item_id", "context__surface", "time"}
    assert [o["name"] for o in told["outputs"]] == ["item_id", *ACTIONS]
    assert http_get(f"{base}/v2/models/other/ready")[0] == http_get(f"{base}/v2/models/other")[0] == 404


def inputs(**changed) -> bytes:
    """A good body with some inputs replaced; None takes one away."""
    by_name = {i["name"]: i for i in to_json(GOOD)["inputs"]} | changed
    return json.dumps({"inputs": [i for i in by_name.values() if i is not None]}).encode()


def tensor(name: str, datatype: str, data: list, shape: list | None = None) -> dict:
    return {"name": name, "datatype": datatype, "shape": [len(data)] if shape is None else shape, "data": data}


BINARY, BINARY_HEADERS = binary_body(GOOD)
MANY = tensor("item_id", "BYTES", [str(i) for i in range(100_000)])
TWICE = json.dumps({"inputs": to_json(GOOD)["inputs"] * 2}).encode()
BAD = {
    "empty": (b"", {}, PATH, "not JSON"),
    "broken-json": (b'{"inputs": [', {}, PATH, "not JSON"),
    "not-utf8": (b"\xff\xfe\x00", {}, PATH, "not JSON"),
    "nan": (inputs(time=tensor("time", "INT64", [float("nan")])), {}, PATH, "not JSON"),
    "deep": (b"[" * 100_000, {}, PATH, "not JSON"),
    "list": (b"[]", {}, PATH, "must be an object"),
    "no-inputs": (b"{}", {}, PATH, "lacks 'inputs'"),
    "input-is-text": (b'{"inputs": ["user_id"]}', {}, PATH, "must be an object"),
    "input-without-name": (b'{"inputs": [{}]}', {}, PATH, "lacks 'name'"),
    "number-as-id": (b'{"id": 7, "inputs": []}', {}, PATH, "'id'"),
    "no-user": (inputs(user_id=None), {}, PATH, "'user_id' is missing"),
    "no-candidates": (inputs(item_id=tensor("item_id", "BYTES", [])), {}, PATH, "no candidates"),
    "100000-candidates": (inputs(item_id=MANY), {}, PATH, "at most 1000|longer than"),
    "wrong-type": (inputs(item_id=tensor("item_id", "FP32", [1.5])), {}, PATH, "must be BYTES"),
    "number-in-bytes": (inputs(item_id=tensor("item_id", "BYTES", [1])), {}, PATH, "not UTF-8"),
    "wrong-shape": (inputs(item_id=tensor("item_id", "BYTES", ["a"], [2])), {}, PATH, "shape"),
    "shape-of-text": (inputs(item_id=tensor("item_id", "BYTES", ["a"], ["1"])), {}, PATH, "whole numbers"),
    "duplicate-inputs": (TWICE, {}, PATH, "twice"),
    "unknown-output": (inputs()[:-1] + b', "outputs": [{"name": "x"}]}', {}, PATH, "no output 'x'"),
    "unknown-model": (inputs(), {}, "/v2/models/other/infer", "no model 'other'"),
    "other-path": (inputs(), {}, "/v1/models/x:predict", "POST to"),
    "unload": (b"", {}, f"/v2/repository/models/{MODEL}/unload", "POST to"),
    "priority": (inputs(), {"x-priority": "urgent"}, PATH, "x-priority"),
    "deadline": (inputs(), {"x-deadline-ms": "soon"}, PATH, "x-deadline-ms"),
    "binary-length-no-number": (BINARY, {"inference-header-content-length": "ten"}, PATH, "header"),
    "binary-length-too-long": (BINARY, {"inference-header-content-length": str(len(BINARY) + 1)}, PATH, "header"),
    "binary-length-too-short": (BINARY, {"inference-header-content-length": "5"}, PATH, "not JSON"),
    "binary-cut": (BINARY[:-1], BINARY_HEADERS, PATH, "binary bytes"),
    "binary-rest": (BINARY + b"x", BINARY_HEADERS, PATH, "belong to no input"),
    "20-MB-of-nonsense": (b"x" * (20 << 20), {}, PATH, "longer than"),
    "one-byte-too-long": (b" " * (MAX_BODY + 1), {}, PATH, "longer than"),
}


def no_text(*, drop: str = "", **changed) -> bytes:
    found = message(GOOD)
    for key, value in changed.items():
        setattr(found, key, value)
    for index, given in enumerate(found.inputs):
        if given.name == drop:
            del found.inputs[index]
            break
    return found.SerializeToString()


def bad_raw(raw: list[bytes]) -> bytes:
    found = message(GOOD, raw=True)
    del found.raw_input_contents[:]
    found.raw_input_contents.extend(raw)
    return found.SerializeToString()


C = grpc.StatusCode
BAD_GRPC = {
    "nonsense": (b"\xff" * 100, C.INVALID_ARGUMENT, "no ModelInferRequest"),
    "empty": (b"", C.NOT_FOUND, "no model"),
    "unknown-model": (no_text(model_name="other"), C.NOT_FOUND, "no model 'other'"),
    "no-user": (no_text(drop="user_id"), C.INVALID_ARGUMENT, "'user_id' is missing"),
    "raw-count": (bad_raw([b""]), C.INVALID_ARGUMENT, "raw contents"),
    "raw-cut": (bad_raw([text(["u"])[:-1]] * 3), C.INVALID_ARGUMENT, "middle"),
    "20-MB": (b"x" * (20 << 20), C.RESOURCE_EXHAUSTED, "larger than max"),
}


def test_bad_requests_get_one_line_and_disturb_nobody(server):
    """Good requests go on beside all of them, over one connection that must not break."""
    wrong, stop = [], threading.Event()
    body = json.dumps(to_json(GOOD)).encode()

    def go_on() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.connect()
        socket = connection.sock
        while not stop.is_set():
            connection.request("POST", PATH, body)
            response = connection.getresponse()
            data = response.read()
            if response.status != 200 or connection.sock is not socket:
                wrong.append(data)
        connection.close()

    good = threading.Thread(target=go_on)
    good.start()
    try:
        for name, (given, headers, path, says) in BAD.items():
            status, data, _ = server.call(given, headers, path)
            error = json.loads(data)["error"]
            assert 400 <= status < 500 and re.search(says, error), (name, status, data)
            assert "\n" not in error and len(error) < 400, name
        for name, (raw, code, says) in BAD_GRPC.items():
            with pytest.raises(grpc.RpcError) as caught:
                server.grpc(raw)
            assert caught.value.code() == code and says in caught.value.details(), (name, caught.value)
        with pytest.raises(grpc.RpcError) as caught:
            server.grpc(b"", "/inference.GRPCInferenceService/RepositoryModelUnload")
        assert caught.value.code() == C.UNIMPLEMENTED
    finally:
        stop.set()
        good.join()
    assert wrong == [] and server.log.read_text() == ""


def test_body_beyond_all_measure_is_answered_without_reading_it(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", PATH)
    connection.putheader("content-length", str(DISCARDED + 1))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413 and b"longer than" in response.read()
    connection.close()


def test_chunked_body_that_never_ends_is_cut_off(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    chunks = (b"x" * MAX_BODY for _ in range(1_000))
    try:
        connection.request("POST", PATH, chunks, encode_chunked=True, headers={"transfer-encoding": "chunked"})
        assert connection.getresponse().status == 413
    except OSError:
        pass  # closed on it while it wrote
    connection.close()
    assert server.rank(GOOD)[0] == 200


def test_caller_that_hangs_up_in_its_body_leaves_no_trace(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", PATH)
    connection.putheader("content-length", "1000")
    connection.endheaders(b"{")
    connection.close()
    assert server.rank(GOOD)[0] == 200 and server.log.read_text() == ""


def test_answer_that_is_too_late_is_504_and_the_next_one_is_not(server):
    status, body, _ = server.rank(SLOW, {"x-deadline-ms": "100"})
    assert status == 504 and "100 ms" in body["error"]
    with pytest.raises(grpc.RpcError) as caught:
        server.grpc(message(SLOW).SerializeToString(), metadata=(("x-deadline-ms", "100"),))
    assert caught.value.code() == C.DEADLINE_EXCEEDED
    assert server.rank(GOOD)[0] == 200


def test_model_that_yields_nan_is_500_so_that_the_canary_sees_it(server):
    status, body, headers = server.rank(RankRequest("r", "u", ("a", "nan")))
    assert status == 500 and "non-finite" in body["error"] and headers["x-model-version"] == VERSION
    with pytest.raises(grpc.RpcError) as caught:
        server.grpc(message(RankRequest("r", "u", ("a", "nan"))).SerializeToString())
    assert caught.value.code() == C.INTERNAL


def test_overload_sheds_low_before_high_and_whoever_is_let_in_is_in_time(server):
    heavy, found = RankRequest("r3", "u1", ("heavy",)), []
    for _ in range(20):  # the pace becomes known
        assert server.rank(heavy)[0] == 200

    def ask(priority: str) -> None:
        status, _, headers = server.rank(heavy, {"x-priority": priority, "x-deadline-ms": "1500"})
        found.append((status, priority, int(headers.get("retry-after", "0"))))

    crowd = [threading.Thread(target=ask, args=(p,)) for p in ("low", "normal", "high") * 25]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert {status for status, *_ in found} == {200, 429}
    assert all((retry >= 1) == (status == 429) for status, _, retry in found)
    shed = {p: sum(s == 429 and p == q for s, q, _ in found) for p in ("low", "normal", "high")}
    assert shed["low"] > 0 and shed["low"] >= shed["normal"] >= shed["high"]
    text_ = http_get(f"http://127.0.0.1:{server.port}/metrics")[1]
    assert f'ranker_shed_total{{priority="low",version="{VERSION}"}} {shed["low"]:.1f}' in text_


def test_metrics_carry_the_version(server):
    text_ = http_get(f"http://127.0.0.1:{server.port}/metrics")[1]
    for name in ("requests_total", "request_seconds_bucket", "stage_seconds_bucket", "batch_requests_bucket"):
        assert re.search(rf'^ranker_{name}{{[^}}]*version="{VERSION}"', text_, re.M), name
    assert re.search(r'ranker_requests_total{degraded="no",status="200"', text_)
    assert re.search(r'ranker_requests_total{degraded="popularity",status="200"', text_)
    assert re.search(r'ranker_requests_total{degraded="no",status="413"', text_)
    assert re.search(r'ranker_requests_total{degraded="no",status="504"', text_)
    assert "process_resident_memory_bytes" in text_


def test_server_listens_on_loopback_only_and_never_imports_pytorch(server):
    process = psutil.Process(server.process.pid)
    listeners = [c.laddr for c in process.connections() if c.status == psutil.CONN_LISTEN]
    listening = {(at.ip.removeprefix("::ffff:"), at.port) for at in listeners}
    assert listening == {("127.0.0.1", server.port), ("127.0.0.1", server.grpc_port)}
    assert not any("libtorch" in m.path for m in process.memory_maps())


def test_what_is_replaced_in_kserve_is_still_there():
    import kserve.model_server
    import kserve.protocol.grpc.server
    import kserve.protocol.rest.server

    rest, model_server = kserve.protocol.rest.server, kserve.model_server
    assert {"uvicorn", "Config"} <= set(rest.RESTServer.__init__.__code__.co_names)
    assert {"GRPCServer", "RESTServer"} <= set(model_server.ModelServer.start.__code__.co_names)
    assert isinstance(rest.uvicorn.Config, type) and model_server.app.routes is not None
    start_names = kserve.protocol.grpc.server.GRPCServer.start.__code__.co_names
    assert {"_data_plane", "_model_repository_extension", "wait_for_termination"} <= set(start_names)


def test_stop_answers_what_is_in_flight_over_both_protocols(tmp_path):
    server = start(tmp_path)
    found: dict[str, object] = {}

    def rest() -> None:
        found["rest"] = server.rank(SLOW, {"x-deadline-ms": "8000"})[0]

    def over_grpc() -> None:
        raw = server.grpc(message(SLOW).SerializeToString(), metadata=(("x-deadline-ms", "8000"),))
        found["grpc"] = pb.ModelInferResponse.FromString(raw).id

    asking = [threading.Thread(target=t) for t in (rest, over_grpc)]
    for one in asking:
        one.start()
    at_the_model = f'ranker_stage_seconds_count{{stage="features",version="{VERSION}"}} 2.0'
    while at_the_model not in http_get(f"http://127.0.0.1:{server.port}/metrics")[1]:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    for one in asking:
        one.join()
    assert found == {"rest": 200, "grpc": "r2"}
    assert server.process.wait(10) == 0 and server.log.read_text() == ""
