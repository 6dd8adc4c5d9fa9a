"""A real predictor process over a small model, and how to speak to it: REST, its binary extension, and gRPC."""

import http.client
import json
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from serving.processes import free_port, http_get
from serving.protocol import RankRequest, to_json
from tests.fault.serving_small import MODEL

PATH = f"/v2/models/{MODEL}/infer"
INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass
class Server:
    process: subprocess.Popen
    port: int
    grpc_port: int
    log: Path

    def call(self, body: bytes, headers=None, path=PATH, method="POST") -> tuple[int, bytes, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}
        finally:
            connection.close()

    def rank(self, request: RankRequest, headers=None) -> tuple[int, dict, dict]:
        status, data, found = self.call(json.dumps(to_json(request)).encode(), headers)
        return status, json.loads(data), found

    def grpc(self, raw: bytes, method=INFER, metadata=None) -> bytes:
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            return channel.unary_unary(method)(raw, timeout=20, metadata=metadata)


def start(directory: Path) -> Server:
    port, grpc_port = free_port(), free_port()
    log = directory / "server.log"
    program = str(Path(__file__).parent / "fault" / "serving_small.py")
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, program, str(port), str(grpc_port)], stdout=out, stderr=out)
    deadline = time.monotonic() + 60
    while http_get(f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready")[0] != 200:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return Server(process, port, grpc_port, log)


def text(values: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)


def binary_body(request: RankRequest, **more) -> tuple[bytes, dict[str, str]]:
    """The same request with all values binary."""
    inputs, tail = [], b""
    for given in to_json(request)["inputs"]:
        raw = text(given.pop("data"))
        inputs.append(given | {"parameters": {"binary_data_size": len(raw)}})
        tail += raw
    head = json.dumps({"id": request.request_id, "inputs": inputs} | more).encode()
    return head + tail, {"inference-header-content-length": str(len(head))}


def message(request: RankRequest, raw: bool = False) -> pb.ModelInferRequest:
    found = pb.ModelInferRequest(model_name=MODEL, id=request.request_id)
    for given in to_json(request)["inputs"]:
        tensor = found.inputs.add(name=given["name"], datatype=given["datatype"], shape=given["shape"])
        if raw:
            found.raw_input_contents.append(text(given["data"]))
        else:
            tensor.contents.bytes_contents.extend(v.encode() for v in given["data"])
    return found
