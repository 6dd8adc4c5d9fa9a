"""gRPC: `ModelInfer` is answered here, from its bytes on; all other calls that only read go on to KServe's servicer.

KServe's servicer tells a non-finite score from a bad request by no status, and logs a stack trace for each; bytes that
are no message fail in gRPC itself, as an internal error. Loading and unloading of models is closed.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from serving.predictor import RankerPredictor
from serving.protocol import Answer, BadRequestError, RefusedError, Tensor
from serving.rest_door import MAX_BODY
from serving.wire import check_outputs, pack, unpack

CODES: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_SERVICE = "/inference.GRPCInferenceService/"
_CONTENTS = {"BYTES": "bytes_contents", "INT64": "int64_contents"}


class GrpcDoor(grpc.aio.ServerInterceptor):
    """Takes the calls that are not KServe's to answer.

    Args:
        predictor: Answers.
    """

    def __init__(self, predictor: RankerPredictor) -> None:
        self._predictor = predictor
        self._own = {
            f"{_SERVICE}ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            f"{_SERVICE}RepositoryModelLoad": grpc.unary_unary_rpc_method_handler(_closed),
            f"{_SERVICE}RepositoryModelUnload": grpc.unary_unary_rpc_method_handler(_closed),
        }

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler of a call."""
        return self._own.get(handler_call_details.method) or await continuation(handler_call_details)

    async def _infer(self, raw: bytes, context: Any) -> bytes:
        headers = {m.key: m.value for m in context.invocation_metadata() or () if isinstance(m.value, str)}
        predictor = self._predictor
        try:
            with predictor.counting_refusals():
                request = _message(raw)
                if request.model_name != predictor.name:
                    raise RefusedError(404, f"there is no model {request.model_name[:200]!r} here")
                wanted, tensors = _wanted(request, predictor.actions), _tensors(request)
            answer = await predictor.rank(request.id or uuid.uuid4().hex, tensors, headers)
            return self._encode(answer, wanted)
        except RefusedError as error:
            if error.retry_after:
                context.set_trailing_metadata((("retry-after", str(error.retry_after)),))
            await context.abort(CODES[error.status], str(error))
            raise  # abort has raised already

    def _encode(self, answer: Answer, wanted: Sequence[str]) -> bytes:
        response = pb.ModelInferResponse(
            model_name=self._predictor.name, model_version=self._predictor.version, id=answer.request_id
        )
        if answer.degraded:
            response.parameters["degraded"].string_param = answer.degraded
        columns: Mapping[str, Any] = {"item_id": answer.item_ids} | dict(
            zip(self._predictor.actions, answer.scores_CA.T, strict=True)
        )
        for name in wanted:
            datatype = "FP32" if isinstance(columns[name], np.ndarray) else "BYTES"
            response.outputs.add(name=name, datatype=datatype, shape=[len(answer.item_ids)])
            response.raw_output_contents.append(pack(columns[name]))
        return response.SerializeToString()


async def _closed(raw: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "models are not loaded or unloaded over the network")
    return b""


def _message(raw: bytes) -> Any:
    try:
        return pb.ModelInferRequest.FromString(raw)
    except DecodeError:
        raise BadRequestError("the message is no ModelInferRequest") from None


def _wanted(request: Any, actions: Sequence[str]) -> Sequence[str]:
    wanted = [output.name for output in request.outputs]
    check_outputs(wanted, actions)
    return wanted or ["item_id", *actions]


def _tensors(request: Any) -> list[Tensor]:
    """The inputs, whose values are all raw or all in `contents`."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequestError(f"{len(raw)} raw contents for {len(request.inputs)} inputs")
    found = []
    for index, given in enumerate(request.inputs):
        name, datatype = given.name[:200], given.datatype[:200]
        if raw:
            values = unpack(name, datatype, raw[index])
        else:
            values = getattr(given.contents, _CONTENTS.get(datatype, "bytes_contents"))
        found.append(Tensor(name, datatype, tuple(given.shape), values))
    return found


class LocalGrpcServer(GRPCServer):
    """KServe's gRPC server on one interface (its own binds all), with the door in front of its servicer.

    Args:
        host: The interface.
        predictor: Answers.
        given: What KServe's takes.
    """

    def __init__(self, host: str, predictor: RankerPredictor, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._host, self._predictor = host, predictor

    async def start(self, max_workers: int) -> None:
        """Serve until stopped.

        Raises:
            RuntimeError: The port is in use.
        """
        self._server = grpc.aio.server(
            interceptors=(GrpcDoor(self._predictor), ExceptionToStatusInterceptor()),
            options=[("grpc.max_receive_message_length", MAX_BODY), ("grpc.so_reuseport", 0)],
        )
        servicer = InferenceServicer(self._data_plane, self._model_repository_extension)
        service.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        self._server.add_insecure_port(f"{self._host}:{self._port}")
        await self._server.start()
        await self._server.wait_for_termination()
