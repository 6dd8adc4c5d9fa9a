"""MLServer's contender: a runtime of its own environment, which has neither KServe nor this project."""

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    """The exported graph over its tensors."""

    async def load(self) -> bool:
        """Open the graph as our own server does."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        self.types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
        self.dtypes = {i.name: self.types[i.type] for i in self.session.get_inputs()}
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One run."""
        feed = {i.name: NumpyCodec.decode_input(i).astype(self.dtypes[i.name], copy=False) for i in payload.inputs}
        (found,) = self.session.run(None, feed)
        output = NumpyCodec.encode_output("scores", found.astype(np.float32))
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
