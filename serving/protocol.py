"""A ranking request and its answer in the Open Inference Protocol v2, for both ends of the wire.

Request inputs: `user_id` BYTES [1], `item_id` BYTES [C], optional `time` INT64 [1] (microseconds since 1970 UTC;
default: now) and one BYTES [1] for each context feature, named as it is declared (`context__surface`).
Answer outputs: `item_id` BYTES [C], best first, and for each action its probability, FP32 [C], in the same order.
How they become bytes is `wire.py` for REST and `grpc_door.py` for gRPC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

MAX_CANDIDATES = 1000
MAX_ID_BYTES = 512
VERSION_HEADER, DEGRADED_HEADER = "x-model-version", "x-degraded"
TOO_MANY = 429  # "come back later": says how much there is to do, not how a version does it
CONTEXT = "context__"  # prefix of the declared context features, as in feature_repo
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)


class RefusedError(Exception):
    """A request that gets no ranking; its text is one clear line.

    Args:
        status: The HTTP status that says why.
        reason: For the caller.
    """

    retry_after = 0  # seconds after which it may succeed, where that is known

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class BadRequestError(RefusedError):
    """A request that nobody could answer: 400."""

    def __init__(self, reason: str) -> None:
        super().__init__(400, reason)


@dataclass(frozen=True)
class RankRequest:
    """One request for a ranking.

    Attributes:
        request_id: Comes back in the answer.
        user_id: The user.
        item_ids: The candidates, C of them.
        context: Value by context feature, without the prefix.
        time: When it is ranked; features are read as of then. None: now.
    """

    request_id: str
    user_id: str
    item_ids: tuple[str, ...]
    context: Mapping[str, str] = field(default_factory=dict)
    time: datetime | None = None

    @classmethod
    def logged(cls, row: Mapping[str, Any], context: Sequence[str], time: datetime) -> "RankRequest":
        """A request of a log, to be asked again as of an instant.

        Args:
            row: `request_id`, `user_id`, `item_id` (all candidates), and the context features by their names.
            context: Which context features the row has.
            time: The instant.
        """
        known = {name: row[name] for name in context if row[name] is not None}
        return cls(row["request_id"], row["user_id"], tuple(row["item_id"]), known, time)


@dataclass(frozen=True)
class Tensor:
    """One input as it came: name, datatype, shape and flat values."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


def to_json(request: RankRequest) -> dict[str, Any]:
    """The body of a v2 `infer` call."""
    inputs = [_bytes("user_id", [request.user_id]), _bytes("item_id", list(request.item_ids))]
    inputs += [_bytes(CONTEXT + name, [value]) for name, value in request.context.items()]
    if request.time is not None:
        micros = (request.time - _EPOCH) // timedelta(microseconds=1)
        inputs.append({"name": "time", "datatype": "INT64", "shape": [1], "data": [micros]})
    return {"id": request.request_id, "inputs": inputs}


@dataclass(frozen=True)
class Answer:
    """A ranking of C candidates.

    Attributes:
        request_id: Of the request.
        item_ids: Best first.
        scores_CA: (C, A) float32 probabilities, in the same order.
        degraded: `cached`, `popularity`, or empty.
    """

    request_id: str
    item_ids: Sequence[str]
    scores_CA: np.ndarray
    degraded: str = ""


def parse(request_id: str, tensors: Sequence[Tensor], context_features: frozenset[str]) -> RankRequest:
    """Read a request's inputs.

    Args:
        request_id: Id of the request.
        tensors: Its inputs.
        context_features: Context features that this version knows, with the prefix. Others are left out: versions with
            and without a new one answer the same requests, side by side.

    Raises:
        BadRequestError: An input is missing, unknown, given twice, or not what it should be.
    """
    _check_text("request id", [request_id])
    by_name = {t.name: t for t in tensors}
    if len(by_name) != len(tensors):
        raise BadRequestError("an input is given twice")
    known = {"user_id", "item_id", "time"} | context_features
    if unknown := sorted(name for name in by_name.keys() - known if not name.startswith(CONTEXT)):
        raise BadRequestError(f"unknown input {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if missing := [name for name in ("user_id", "item_id") if name not in by_name]:
        raise BadRequestError(f"input {missing[0]!r} is missing")
    if len(by_name["item_id"].values) == 0:
        raise BadRequestError("there are no candidates")
    items = _strings(by_name["item_id"], None)
    return RankRequest(
        request_id=request_id,
        user_id=_strings(by_name["user_id"], 1)[0],
        item_ids=items,
        context={n.removeprefix(CONTEXT): _strings(by_name[n], 1)[0] for n in context_features & by_name.keys()},
        time=_time(by_name["time"]) if "time" in by_name else None,
    )


def from_json(body: Any, actions: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray, str]:
    """Read an answer: ranked item ids, (C, A) float32 scores, and the version; empty where it lacks them."""
    try:
        outputs = {o["name"]: o["data"] for o in body["outputs"]}
        columns = [outputs[action] for action in actions]
        scores = np.array(columns, np.float32).T
        return tuple(outputs["item_id"]), scores, str(body.get("model_version", ""))
    except (KeyError, TypeError, ValueError):
        return (), np.empty((0, 0), np.float32), ""


def _bytes(name: str, values: list[str]) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": values}


def _strings(tensor: Tensor, count: int | None) -> tuple[str, ...]:
    if tensor.datatype != "BYTES":
        raise BadRequestError(f"input {tensor.name!r} must be BYTES, not {tensor.datatype}")
    _check_shape(tensor, count)
    if len(tensor.values) > MAX_CANDIDATES:
        raise BadRequestError(f"{len(tensor.values)} candidates; at most {MAX_CANDIDATES} are ranked at once")
    try:
        texts = [v.decode() if isinstance(v, bytes) else v for v in tensor.values]
        _check_text(f"input {tensor.name!r}", texts)
    except (UnicodeError, TypeError):
        raise BadRequestError(f"input {tensor.name!r} holds a value that is not UTF-8 text") from None
    return tuple(texts)


def _check_text(what: str, texts: list[str]) -> None:
    """All at once: a loop over 300 ids would take longer than all else that is done to a request here.

    Raises:
        BadRequestError: An id is empty, too long, or holds a NUL.
        UnicodeError: One is not UTF-8.
        TypeError: One is no text.
    """
    together = "".join(texts)
    lengths = list(map(len, texts if together.isascii() else [t.encode() for t in texts]))
    if not lengths or min(lengths) == 0 or max(lengths) > MAX_ID_BYTES or "\0" in together:
        raise BadRequestError(f"{what} holds an empty value, one above {MAX_ID_BYTES} bytes, or a NUL")


def _time(tensor: Tensor) -> datetime:
    if tensor.datatype != "INT64":
        raise BadRequestError(f"input 'time' must be INT64, not {tensor.datatype}")
    _check_shape(tensor, 1)
    value = tensor.values[0]
    latest = (_LATEST - _EPOCH) // timedelta(microseconds=1)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 < value < latest:
        raise BadRequestError("input 'time' must be microseconds since 1970, as an integer")
    return _EPOCH + timedelta(microseconds=int(value))


def _check_shape(tensor: Tensor, count: int | None) -> None:
    if len(tensor.shape) != 1 or tensor.shape[0] != len(tensor.values):
        raise BadRequestError(f"input {tensor.name!r} has shape {list(tensor.shape)} but {len(tensor.values)} values")
    if count is not None and tensor.shape[0] != count:
        raise BadRequestError(f"input {tensor.name!r} must hold {count} value, not {tensor.shape[0]}")
