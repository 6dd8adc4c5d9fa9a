"""A webhook's receiver on loopback, for tests: it keeps what it gets, and answers as told."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver(ThreadingHTTPServer):
    """Attributes: `got`, the bodies; `answer`, the status; `pause`, seconds before it answers; `location`."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.got, self.asked, self.answer, self.pause, self.location = [], 0, 200, 0.0, ""

    @property
    def port(self):
        return self.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/hook/a-secret"

    def names(self, status="firing"):
        """Names of the alerts of each body, of one status."""
        return [[a["labels"]["alertname"] for a in body["alerts"] if a["status"] == status] for body in self.got]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.asked += 1
        time.sleep(server.pause)
        if server.answer < 300:
            server.got.append(json.loads(body))
        self.send_response(server.answer)
        if server.location:
            self.send_header("Location", server.location)
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def receiving(port=0):
    """A receiver that runs."""
    server = Receiver(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
