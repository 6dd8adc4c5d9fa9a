"""REST: `POST /v2/models/{name}/infer` is answered here, all other calls that only read go on to KServe's application.

What KServe's route does to a request (the body to Python objects to pydantic models to tensors, and back) takes longer
than ranking it, blocks the event loop meanwhile, and makes 500 of many malformed bodies. Loading and unloading of
models over the network is closed.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from serving.predictor import RankerPredictor
from serving.protocol import DEGRADED_HEADER, VERSION_HEADER, Answer, RefusedError
from serving.wire import JSON_LENGTH_HEADER, check_outputs, decode, encode

MAX_BODY = 1 << 20
"""Bytes of a request's body; one with more (>) is refused. The most candidates with the longest ids take half of it."""

DISCARDED = 32 << 20
"""Bytes of a refused body that are read and thrown away, so that a client that writes all before it reads gets its
answer; the connection of one with more (>) is closed on it."""

TOO_LONG = 413
MAX_DIGITS = 20  # of a length; whatever was told, the bytes that come are counted
_INFER = re.compile("/v2/models/([^/]+)/infer")

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class RestDoor:
    """An ASGI application around KServe's.

    Args:
        predictor: Answers.
        kserve: KServe's application.
    """

    def __init__(self, predictor: RankerPredictor, kserve: App) -> None:
        self._predictor, self._kserve = predictor, kserve
        self._path = f"/v2/models/{predictor.name}/infer"

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Answer one call; never raises for what a caller does."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._kserve(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            body, more = await self._infer(scope, headers, receive)
            status = 200
        except RefusedError as error:
            status, body, more = error.status, orjson.dumps({"error": str(error)}), _of_error(error)
        except ConnectionError:
            return  # the caller is gone, so nobody is to be answered
        more |= {VERSION_HEADER: self._predictor.version, "content-length": str(len(body))}
        encoded = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        await send({"type": "http.response.body", "body": body})

    async def _infer(self, scope: Message, headers: dict[str, str], receive: Any) -> tuple[bytes, dict[str, str]]:
        predictor = self._predictor
        with predictor.counting_refusals():
            body = await _read(headers, receive)
            if scope["path"] != self._path or scope["method"] != "POST":
                raise self._elsewhere(scope)
            call = decode(body, headers.get(JSON_LENGTH_HEADER))
            check_outputs(call.outputs or (), predictor.actions)
        answer = await predictor.rank(call.request_id, call.tensors, headers)
        encoded, more = encode(answer, call, predictor.name, predictor.version, predictor.actions)
        return encoded, more | _of_answer(answer)

    def _elsewhere(self, scope: Message) -> RefusedError:
        path = scope["path"][:200]
        if (found := _INFER.fullmatch(path)) and found[1] != self._predictor.name:
            return RefusedError(404, f"there is no model {found[1]!r} here; there is {self._predictor.name!r}")
        return RefusedError(405 if found else 404, f"{scope['method']} {path} is nothing here; POST to {self._path}")


def _of_answer(answer: Answer) -> dict[str, str]:
    return {DEGRADED_HEADER: answer.degraded} if answer.degraded else {}


def _of_error(error: RefusedError) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if error.status == TOO_LONG:
        headers["connection"] = "close"  # the rest of the body may still be coming
    if error.retry_after:
        headers["retry-after"] = str(error.retry_after)
    return headers


async def _read(headers: dict[str, str], receive: Any) -> bytes:
    """The body.

    Raises:
        RefusedError: 413: it is too long; what came was not kept.
        ConnectionError: The caller hung up in the middle of it.
    """
    told = headers.get("content-length", "")
    length = int(told) if told.isascii() and told.isdigit() and len(told) < MAX_DIGITS else 0
    parts: list[bytes] = []
    size, more = 0, length <= DISCARDED
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        part = message.get("body", b"")
        size, more = size + len(part), message.get("more_body", False)
        if size > DISCARDED:
            break
        if size <= MAX_BODY:
            parts.append(part)
        else:
            parts.clear()
    if max(size, length) > MAX_BODY:
        raise RefusedError(TOO_LONG, f"the body is longer than {MAX_BODY} bytes")
    return b"".join(parts)
