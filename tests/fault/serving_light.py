"""Stand-ins for the two slow parts of a rollout, so that it can be killed at dozens of points.

A predictor of the standard library instead of KServe with PyTorch and Feast, and its scores as the truth. All else is
real: processes, Envoy, MLflow, the judge, the state machine.

Run as a program it serves: it takes the command line of `serving.server`, and reads from `behaviour.json` in the
bundle's directory how to misbehave.
"""

import argparse
import http.server
import json
import signal
import sys
import time
import zlib
from pathlib import Path

ACTIONS = ("save", "click")


def scores(item: str, version: str) -> list[float]:
    """What a version thinks of an item; no user matters here."""
    return [zlib.crc32(f"{version}/{action}/{item}".encode()) % 10_000 / 10_000 for action in ACTIONS]


class LightScorer:
    """The truth about one version."""

    def __init__(self, bundle: Path, features) -> None:
        from engagement.table import Feature, TableSpec

        self.spec = TableSpec((Feature("item_id", "candidate", "categorical"),), ACTIONS, "save")
        self._version = bundle.name

    def __call__(self, request):
        import numpy as np

        return np.array([scores(i, self._version) for i in request.item_ids], np.float32)


def light_plane(settings, registry):
    """The real plane with light predictors."""
    from serving.laptop_plane import LaptopPlane

    class LightPlane(LaptopPlane):
        server = (str(Path(__file__).resolve()),)

    return LightPlane(settings, registry)


def no_features(settings) -> None:
    """The light model needs none."""


def light_rollout(settings, registry, traffic=None):
    """A rollout on it, with the light truth."""
    from serving.replay import ReplayTraffic
    from serving.rollout import Rollout

    make = traffic or (lambda *known: ReplayTraffic(*known, no_features, LightScorer))
    return Rollout(settings, registry, light_plane(settings, registry), make)


def main() -> None:
    from serving.launch import die_with_parent

    signal.signal(signal.SIGUSR1, lambda *_: die_with_parent(0))
    parser = argparse.ArgumentParser()
    for name in ("--bundle", "--version", "--digest", "--port"):
        parser.add_argument(name)
    options = parser.parse_args()
    behaviour = json.loads((Path(options.bundle) / "behaviour.json").read_text())
    if behaviour.get("refuses_to_start"):
        sys.exit("the model does not load")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def do_GET(self):
            self._send(200, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            items = next(i["data"] for i in body["inputs"] if i["name"] == "item_id")
            time.sleep(behaviour.get("hangs", 0))
            if behaviour.get("fails"):
                self._send(500, {"error": behaviour["fails"]})
                return
            rows = {i: scores(i, behaviour.get("answers_as", options.version)) for i in items}
            if behaviour.get("constant"):
                rows = dict.fromkeys(items, [0.5, 0.5])
            ranked = sorted(items, key=lambda i: -rows[i][0])
            if behaviour.get("drops_last"):
                ranked = ranked[:-1]
            outputs = [{"name": "item_id", "data": ranked}]
            outputs += [{"name": a, "data": [rows[i][n] for i in ranked]} for n, a in enumerate(ACTIONS)]
            self._send(200, {"id": body["id"], "model_version": options.version, "outputs": outputs})

        def _send(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("x-model-version", options.version)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(options.port)), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever(0.05)


if __name__ == "__main__":
    main()
