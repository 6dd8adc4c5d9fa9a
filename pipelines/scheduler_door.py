"""The scheduler's door on loopback: `GET /healthz`, `GET /schedule`."""

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings


def listen(settings: Settings, state: Callable[[], Mapping[str, Any]]) -> ThreadingHTTPServer:
    """Answer in a thread of its own from now on.

    Args:
        settings: The home; `scheduler_port` is the port.
        state: What `/schedule` tells; `/healthz` tells its `problem` and what is `running`.

    Raises:
        EvergreenError: The port is in use.
    """

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = state()
            if self.path == "/healthz":
                told = {name: told[name] for name in ("problem", "running")}
            elif self.path != "/schedule":
                self.send_error(404)
                return
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer((LOOPBACK, settings.scheduler_port), Door)
    except OSError:
        raise EvergreenError(
            f"port {settings.scheduler_port}, wanted by the scheduler, is in use",
            "Stop what listens there or set EVERGREEN_SCHEDULER_PORT to another port",
        ) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
