"""The ranker as a KServe model: a small request in, features read here, a ranking with probabilities out."""

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InferenceError, InvalidInput

from serving.protocol import CONTEXT, VERSION_HEADER, BadRequestError, RankRequest, Tensor, parse
from serving.scoring import Scorer


class RankerPredictor(Model):
    """Ranks the candidates of one request.

    Args:
        name: Name of the model in URLs.
        version: Registered version; in each answer and in its header `x-model-version`.
        scorer: Model and features.
    """

    def __init__(self, name: str, version: str, scorer: Scorer) -> None:
        super().__init__(name, return_response_headers=True)
        self._version = version
        self._scorer = scorer
        self._actions = scorer.spec.actions
        self._primary = self._actions.index(scorer.spec.primary_action)
        self._context = frozenset(f.name for f in scorer.spec.features if f.name.startswith(CONTEXT))
        # One thread: scoring uses all that one process may use, and readiness probes are answered meanwhile.
        self._worker = ThreadPoolExecutor(1)

    def load(self) -> bool:
        """Score one unknown user and item; only then is the model ready. The first score takes seconds."""
        self._worker.submit(self._scorer, RankRequest("warm-up", "nobody", ("nothing",))).result()
        self.ready = True
        return self.ready

    def get_input_types(self) -> list[dict]:
        """The inputs, for the protocol's metadata call."""
        names = {"user_id": [1], "item_id": [-1], **{name: [1] for name in sorted(self._context)}}
        text = [{"name": name, "datatype": "BYTES", "shape": shape} for name, shape in names.items()]
        return [*text, {"name": "time", "datatype": "INT64", "shape": [1]}]

    def get_output_types(self) -> list[dict]:
        """The outputs, for the protocol's metadata call."""
        scores = [{"name": action, "datatype": "FP32", "shape": [-1]} for action in self._actions]
        return [{"name": "item_id", "datatype": "BYTES", "shape": [-1]}, *scores]

    async def predict(
        self,
        payload: Any,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Rank one request.

        Raises:
            InvalidInput: The request cannot be answered (400).
            InferenceError: The model yields NaN or infinity (500), so that the canary sees it.
        """
        if response_headers is not None:
            response_headers[VERSION_HEADER] = self._version
        if not isinstance(payload, InferRequest):
            raise InvalidInput("the v1 protocol is not spoken here; use /v2")
        try:
            request = parse(str(payload.id or uuid.uuid4().hex), _tensors(payload), self._context)
        except BadRequestError as error:
            raise InvalidInput(str(error)) from None
        scores = await asyncio.get_running_loop().run_in_executor(self._worker, self._scorer, request)
        if not np.isfinite(scores).all():
            raise InferenceError("model yields non-finite scores")
        return self._answer(payload, request, scores)

    async def postprocess(self, result: Any, headers: Any = None, response_headers: Any = None) -> Any:
        """Nothing to do; KServe calls it with three arguments when headers are returned."""
        return result

    def _answer(self, payload: InferRequest, request: RankRequest, scores: np.ndarray) -> InferResponse:
        order = np.argsort(-scores[:, self._primary], kind="stable")
        items = np.array(request.item_ids, dtype=object)[order]
        outputs = [InferOutput("item_id", [len(order)], "BYTES", data=items)]
        for column, action in enumerate(self._actions):
            outputs.append(InferOutput(action, [len(order)], "FP32", data=scores[order, column]))
        return InferResponse(
            request.request_id,
            self.name,
            outputs,
            model_version=self._version,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


def _tensors(payload: InferRequest) -> list[Tensor]:
    """The inputs with their values, from JSON or from binary."""
    found = []
    for tensor in payload.inputs:
        values = tensor.as_numpy().ravel() if tensor._raw_data is not None else tensor.data or ()
        found.append(Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), tuple(values)))
    return found
