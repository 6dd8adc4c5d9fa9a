"""Submission to Kubeflow: what the real client sends, heard by a small HTTP server of the test's own."""

import json
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from engagement.errors import EvergreenError
from pipelines.kubeflow import HOST, submit_retrain

AS_OF = datetime(2026, 11, 19, 3, tzinfo=UTC)


@pytest.fixture
def api():
    """Answers what the client asks on its way to a run; `api.heard` holds the runs that were created."""
    heard = []

    class Api(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"experiments": []} if "experiments" in self.path else {"multi_user": False})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path.endswith("/experiments"):
                return self.answer({**body, "experiment_id": "e1"})
            heard.append(body)
            return self.answer({**body, "run_id": "r1"})

        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.heard = heard
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_retrain_is_submitted_with_its_arguments_and_the_compiled_graph(api, monkeypatch):
    monkeypatch.setenv(HOST, f"http://127.0.0.1:{api.server_port}")
    assert submit_retrain(AS_OF, "ewc+distill") == "r1"
    (run,) = api.heard
    assert run["runtime_config"]["parameters"] == {
        "as_of": "2026-11-19T03:00:00+00:00",
        "strategy": "ewc+distill",
        "reason": "person",
    }
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "retrain"
    assert "platform_spec" in run["pipeline_spec"]


def test_missing_host_says_what_to_set(monkeypatch):
    monkeypatch.delenv(HOST, raising=False)
    with pytest.raises(EvergreenError, match=HOST):
        submit_retrain(AS_OF, "scratch")


def test_silent_host_is_one_line(monkeypatch):
    monkeypatch.setenv(HOST, "http://127.0.0.1:9")
    with pytest.raises(EvergreenError, match="does not answer"):
        submit_retrain(AS_OF, "scratch")
