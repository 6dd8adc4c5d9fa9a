"""A client of predictors and gateway: a few requests at a time over connections that are kept, every outcome an answer.

Shapes: C candidates, A actions.
"""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import numpy as np

from serving.protocol import DEGRADED_HEADER, VERSION_HEADER, RankRequest, from_json, to_json

WORKERS = 2  # requests under way at once; more would measure the queue in front of two cores
TIMEOUT = 15.0  # seconds; above the gateway's own, so that its answer is heard
SLOW = 4.9  # seconds; just below the gateway's patience with one predictor (`envoy_config.TRY_TIMEOUT`)
HUNG = 4  # slow answers from one door, after which no more are asked of it
NOT_ASKED = -1


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        request: The request.
        status: HTTP status; 0 when no answer came, `NOT_ASKED` when it was not asked for.
        latency_ms: Milliseconds until the answer.
        version: Version that answered.
        ranked: Item ids in the order of the answer, best first.
        scores_CA: float32, rows in the order of `ranked`; empty when the answer holds none.
        degraded: `cached` or `popularity` where the predictor had to do without the present features.
        error: What went wrong, where something did.
    """

    request: RankRequest
    status: int
    latency_ms: float
    version: str = ""
    ranked: tuple[str, ...] = ()
    scores_CA: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    degraded: str = ""
    error: str = ""

    def failed(self, wanted: str) -> bool:
        """No answer, an error, or an answer by another version than the wanted one (a failover)."""
        return self.status != 200 or self.version != wanted

    def problem(self, wanted: str) -> str:
        """Why it counts as failed, in words; empty where it does not."""
        if not self.failed(wanted):
            return ""
        if self.status == 200:
            return f"v{self.version or '?'} stepped in"
        return self.error or (f"status {self.status}" if self.status else "no answer")


@dataclass(frozen=True)
class Call:
    """One request on its way: to which door, with which headers besides the content type, waiting how many seconds."""

    door: str
    request: RankRequest
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: float = TIMEOUT


class Client:
    """Sends ranking requests; use as a context, which closes its connections.

    It does not queue up at a door behind which somebody hangs: after `HUNG` slow answers the rest is not asked.

    Args:
        model: Name of the model.
        actions: Action names in the order of the score columns.
    """

    def __init__(self, model: str, actions: tuple[str, ...]) -> None:
        self._path = f"/v2/models/{model}/infer"
        self._actions = actions
        self._own = threading.local()  # connections by door; a thread has its own
        self._opened: list[http.client.HTTPConnection] = []
        self._slow = Counter[str]()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._opened:
            connection.close()

    def ask_all(self, calls: Sequence[Call]) -> list[Answer]:
        """Send many, `WORKERS` at a time and in this order; answers in the order of the calls."""
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(self.ask, calls))

    def ask(self, call: Call) -> Answer:
        """Send one request."""
        if self._slow[call.door] >= HUNG:
            return Answer(call.request, NOT_ASKED, 0.0)
        body = json.dumps(to_json(call.request)).encode()
        headers = {"content-type": "application/json", **call.headers}
        start = time.perf_counter()
        try:
            response, text = self._post(call, body, headers)
            status, version = response.status, response.getheader(VERSION_HEADER, "")
            degraded = response.getheader(DEGRADED_HEADER, "")
        except (OSError, http.client.HTTPException) as error:
            status, version, degraded = 0, "", ""
            text = json.dumps({"error": f"no answer ({error})"}).encode()
        latency = (time.perf_counter() - start) * 1000
        self._slow[call.door] += latency >= SLOW * 1000
        answer = Answer(call.request, status, latency, version, degraded=degraded)
        return _read(answer, text, self._actions)

    def _post(self, call: Call, body: bytes, headers: Mapping[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        door = call.door
        kept: dict[str, http.client.HTTPConnection] = self._own.__dict__.setdefault("doors", {})
        for last in (False, True):
            reused = door in kept
            if not reused:
                kept[door] = http.client.HTTPConnection(urlsplit(door).netloc, timeout=call.patience)
                self._opened.append(kept[door])
            try:
                kept[door].request("POST", self._path, body, dict(headers))
                response = kept[door].getresponse()
                return response, response.read()
            except (OSError, http.client.HTTPException) as error:
                kept.pop(door).close()
                # The other side may close an idle connection just as it is used again; that says nothing.
                if last or not reused or isinstance(error, TimeoutError):
                    raise
        raise AssertionError


def _read(answer: Answer, text: bytes, actions: tuple[str, ...]) -> Answer:
    try:
        body = json.loads(text)
    except ValueError:
        body = {"error": text.decode(errors="replace").strip()[:200]}
    if answer.status != 200:
        error = body.get("error", "") if isinstance(body, dict) else ""
        return replace(answer, error=str(error) or f"status {answer.status}")
    ranked, scores_CA, said = from_json(body, actions)
    return replace(answer, version=said or answer.version, ranked=ranked, scores_CA=scores_CA)
