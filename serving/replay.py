"""Real requests from the log, sent again through the gateway; what came back is what the judge sees."""

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from evergreen.settings import LOOPBACK
from serving.buckets import BUCKET_HEADER, bucket
from serving.judge import Answer
from serving.protocol import VERSION_HEADER, RankRequest, from_json, to_json

WORKERS = 2  # requests under way at once; more would measure the queue in front of two cores
TIMEOUT = 15.0  # seconds; above the gateway's own, so that its answer is heard


class Client:
    """Sends ranking requests to one loopback port, each over its own connection.

    Args:
        port: The gateway's port, or a predictor's.
        model: Name of the model.
        actions: Action names in the order of the score columns.
    """

    def __init__(self, port: int, model: str, actions: tuple[str, ...]) -> None:
        self._port = port
        self._path = f"/v2/models/{model}/infer"
        self._actions = actions

    def ask(self, request: RankRequest, wanted: str, salt: str) -> Answer:
        """Send one request; every outcome is an answer, also none.

        Args:
            request: The request.
            wanted: Version that should answer.
            salt: Salt of the user's bucket.
        """
        headers = {"content-type": "application/json", BUCKET_HEADER: str(bucket(request.user_id, salt))}
        start = time.perf_counter()
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=TIMEOUT)
        try:
            connection.request("POST", self._path, json.dumps(to_json(request)), headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
            version = response.getheader(VERSION_HEADER, "")
        except (OSError, http.client.HTTPException) as error:
            status, text, version = 0, json.dumps({"error": f"no answer ({error})"}).encode(), ""
        finally:
            connection.close()
        latency = (time.perf_counter() - start) * 1000
        return _read(
            Answer(request.request_id, request.item_ids, wanted, status, latency), version, text, self._actions
        )

    def replay(self, requests: Sequence[RankRequest], wanted: Sequence[str], salt: str) -> list[Answer]:
        """Send many requests, a few at a time; answers in the order of the requests."""
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(self.ask, requests, wanted, [salt] * len(requests)))


def _read(answer: Answer, version: str, text: bytes, actions: tuple[str, ...]) -> Answer:
    try:
        body = json.loads(text)
    except ValueError:
        body = {"error": text.decode(errors="replace").strip()[:200]}
    if answer.status != 200:
        error = body.get("error", "") if isinstance(body, dict) else ""
        return replace(answer, version=version, error=str(error) or f"status {answer.status}")
    ranked, scores, said = from_json(body, actions)
    return replace(answer, version=said or version, ranked=ranked, scores=scores)
