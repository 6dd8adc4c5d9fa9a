"""`python -m monitoring.exporter`: the figures of a home for Prometheus; on a laptop on loopback alone.

`GET /metrics` is every figure of `figures.py`, `GET /sd` names what else a home has to scrape (Prometheus'
`http_sd_config`: on a laptop the ports of predictors change with each version), `GET /healthz` tells what could not be
read. It only reads: whatever happens to it, nothing else of Evergreen notices.
"""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engagement.errors import EvergreenError
from evergreen.settings import Settings, get_settings
from monitoring.figures import metrics
from monitoring.scraped import targets
from monitoring.state import HomeState

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
PATIENCE = 5.0  # seconds in which a client has to send its request


class HomeCollector(Collector):
    """The state of one home as metrics, read anew at each scrape.

    Args:
        settings: The home.

    Attributes:
        problems: What the last scrape could not read, by source.
    """

    def __init__(self, settings: Settings) -> None:
        self._model = settings.model_name
        self._state = HomeState(settings)
        self._lock = threading.Lock()
        self.problems: Mapping[str, tuple[str, ...]] = {}

    def collect(self) -> Iterator[Metric]:
        """The metrics, as Prometheus' client asks for them."""
        with self._lock:
            found, self.problems = metrics(self._state.read(), self._model)
        yield from found


class Exporter:
    """The HTTP server of one home's figures.

    Args:
        settings: The home, and where to listen.

    Raises:
        EvergreenError: The port is in use.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.collector = HomeCollector(settings)
        registry = CollectorRegistry()
        registry.register(self.collector)
        list(self.collector.collect())  # reads the home once: from then on a scrape reads what is new
        self._metrics = make_wsgi_app(registry)
        try:
            self._server = _Server((settings.metrics_host, settings.metrics_port), _Handler)
        except (OSError, OverflowError) as error:
            raise EvergreenError(
                f"the metrics cannot be served at {settings.metrics_host}:{settings.metrics_port} ({error})",
                "Stop what listens there or set EVERGREEN_METRICS_PORT to another port",
            ) from error
        self._server.set_app(self._answer)

    def serve(self) -> None:
        """Answer until `stop`, and finish the answers that are under way."""
        with self._server:
            self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """Let `serve` return; for another thread than the one that serves."""
        self._server.shutdown()

    def _answer(self, environment: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        path = environment["PATH_INFO"]
        if environment["REQUEST_METHOD"] != "GET":
            return _json(start, "405 Method Not Allowed", {"error": "only GET"})
        if path == "/metrics":
            return self._metrics(environment, start)
        if path == "/sd":
            return _json(start, "200 OK", targets(self._settings))
        if path == "/healthz":
            return _json(
                start, "200 OK", {"problems": [p for found in self.collector.problems.values() for p in found]}
            )
        return _json(start, "404 Not Found", {"error": "there are /metrics, /sd and /healthz"})


class _Server(ThreadingMixIn, WSGIServer):
    allow_reuse_address = True


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged: there is one every few seconds."""


def _json(start: StartResponse, status: str, told: Any) -> list[bytes]:
    body = json.dumps(told).encode()
    start(status, [("content-type", "application/json"), ("content-length", str(len(body)))])
    return [body]


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        exporter = Exporter(get_settings())
    except EvergreenError as error:
        sys.exit(str(error))

    def stop(*_: Any) -> None:
        threading.Thread(target=exporter.stop).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    exporter.serve()


if __name__ == "__main__":
    main()
