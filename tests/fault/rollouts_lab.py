"""What a home that serves is asked and looked at with."""

import http.client
import json
import threading

from serving.buckets import bucket
from serving.laptop_plane import PREDICTOR
from serving.processes import Processes
from serving.protocol import RankRequest, to_json
from tests.serving_lab import Feed

PATH = "/v2/models/homefeed-ranker/infer"


def post(port: int, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict, dict]:
    """Status, JSON and headers of one call."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", PATH, body, {"content-type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    data, found = response.read(), dict(response.getheaders())
    connection.close()
    return response.status, json.loads(data) if data else {}, found


def predictor(feed: Feed, version: str):
    return Processes(feed.settings).get(PREDICTOR + version)


class Crowd:
    """A client that asks all the time, as different users, and remembers what went wrong."""

    def __init__(self, feed: Feed, requests: list[RankRequest]) -> None:
        self.port = Processes(feed.settings).get("gateway").ports["http"]
        self.requests, self.failures, self.asked = requests, [], 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(0.1):
            request = self.requests[self.asked % (len(self.requests) - 1)]
            self.asked += 1
            try:
                header = {"x-bucket": str(bucket(request.user_id, str(self.asked)))}
                status, body, _ = post(self.port, json.dumps(to_json(request)).encode(), header)
                if status != 200 or body["id"] != request.request_id:
                    self.failures.append((status, body))
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(repr(error))
