"""The contenders that run in this environment: `python -m benchmarks.serving.servers KIND PORT WORLD`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.world import BUNDLE, FEED, MODEL

DTYPES = {"FP32": "f4", "INT64": "i8", "BOOL": "?"}


def session(world: Path) -> Any:
    """The exported graph, opened as our own server does."""
    from model.served import session as open_session

    return open_session((world / BUNDLE / "served" / "ranker.onnx").read_bytes())


def stock(port: int, world: Path) -> None:
    """KServe as its documentation says: a model that takes the graph's tensors."""
    sys.argv = [sys.argv[0], f"--http_port={port}", "--enable_grpc=false"]
    import kserve.protocol.rest.server as rest
    from kserve import InferOutput, InferResponse, Model, ModelServer

    class Onnx(Model):
        def load(self):
            self.session = session(world)
            self.ready = True
            return True

        def predict(self, payload, headers=None):
            (found,) = self.session.run(None, {i.name: i.as_numpy() for i in payload.inputs})
            output = InferOutput("scores", list(found.shape), "FP32")
            output.set_data_from_numpy(found, binary_data=bool(payload.use_binary_outputs))
            return InferResponse(
                payload.id,
                self.name,
                [output],
                use_binary_outputs=payload.use_binary_outputs,
                requested_outputs=payload.request_outputs,
            )

    class Loopback(rest.uvicorn.Config):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"host": "127.0.0.1"}))

    rest.uvicorn.Config = Loopback
    model = Onnx(MODEL)
    model.load()
    ModelServer().start([model])


def bare(port: int, world: Path) -> None:
    """FastAPI with orjson, and FastAPI with the tensors' bytes, around the same session."""
    import orjson
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import Response

    app, run = FastAPI(), session(world)
    with np.load(world / FEED) as feed:
        layout = [(name, a.dtype, a.shape, a.nbytes) for name, a in feed.items()]

    @app.post(f"/v2/models/{MODEL}/infer")
    async def infer(request: Request) -> Response:
        body = orjson.loads(await request.body())
        feed = {i["name"]: np.array(i["data"], DTYPES[i["datatype"]]).reshape(i["shape"]) for i in body["inputs"]}
        (found,) = run.run(None, feed)
        output = {"name": "scores", "shape": found.shape, "datatype": "FP32", "data": found.ravel()}
        answer = {"id": body["id"], "model_name": MODEL, "outputs": [output]}
        return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")

    @app.post("/infer")
    async def infer_bytes(request: Request) -> Response:
        body, feed, at = await request.body(), {}, 0
        for name, dtype, shape, size in layout:
            feed[name] = np.frombuffer(body, dtype, size // dtype.itemsize, at).reshape(shape)
            at += size
        return Response(run.run(None, feed)[0].tobytes(), media_type="application/octet-stream")

    @app.get(f"/v2/models/{MODEL}/ready")
    async def ready() -> dict:
        return {}

    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="error")


def given(port: int, world: Path) -> None:
    """Ours, but the features are there already."""
    sys.argv = sys.argv[:1]
    from benchmarks.features import online
    from benchmarks.serving.world import settings
    from feature_repo.online import OnlineReader
    from model.served import ServedRanker
    from serving.degrade import Features
    from serving.predictor import RankerPredictor
    from serving.server import run

    user, items = online.requests(1)[0]
    table = OnlineReader(settings(world).features).read(user, items, {"surface": "home"}, online.AT)
    found = Features(table)

    async def features(request: Any, at: Any, within: float) -> Features:
        return found

    ranker = ServedRanker.load(world / BUNDLE / "served")
    run(RankerPredictor(MODEL, "1", ranker, features, lambda served: None), "127.0.0.1", port)


if __name__ == "__main__":
    kind, port, world = sys.argv[1:4]
    {"stock": stock, "bare": bare, "given": given}[kind](int(port), Path(world))
