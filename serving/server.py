"""`python -m serving.server --bundle DIR --version V --port P --grpc-port Q`: one model version as a KServe server.

Listens on loopback unless told otherwise (a container is told), one worker; Open Inference Protocol v2 over REST and
gRPC. KServe's ways are turned round where they do not suit: all interfaces, four log lines a request, the road from
bytes to tensors. PyTorch is never imported: the bundle's exported model needs numpy and ONNX Runtime.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings, get_settings
from serving.files import directory_digest
from serving.launch import KEEP_SIGNAL, die_with_parent
from serving.signing import verify, verifying_key

if TYPE_CHECKING:
    from serving.predictor import RankerPredictor

GRACE = 10  # seconds for requests in flight


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped; 1 when the model cannot be served, with one line on stderr."""
    options = _options(argv)
    signal.signal(KEEP_SIGNAL, lambda *_: die_with_parent(0))
    try:
        serve(get_settings(), options)
    except EvergreenError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def serve(settings: Settings, options: argparse.Namespace) -> None:
    """Load, warm up and serve.

    Raises:
        EvergreenError: The bundle is damaged or not signed, or there are no online features.
    """
    if options.digest and directory_digest(options.bundle) != options.digest:
        raise EvergreenError(f"the bundle in {options.bundle} is not the registered one (digest differs)")
    if not options.unsigned:
        verify(options.bundle, verifying_key(settings))
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy's; more raise p99 tenfold when predictors share two cores
    from model.served import SERVED, ServedRanker
    from serving.degrade import FeatureSource
    from serving.predictor import RankerPredictor
    from serving.serving_log import ServingLog

    ranker = ServedRanker.load(options.bundle / SERVED)
    features = FeatureSource(settings)
    log = ServingLog(settings.serving_log, options.version, ranker.spec)
    try:
        model = RankerPredictor(settings.model_name, options.version, ranker, features.read, log.write)
        run(model, options.host, options.port, options.grpc_port)
    finally:
        features.close()
        log.close()


def run(model: "RankerPredictor", host: str, port: int, grpc_port: int = 0) -> None:
    """Serve a model until a signal stops it; requests in flight get their answers.

    Args:
        model: It is loaded here.
        host: Interface to listen on.
        port: For REST.
        grpc_port: For gRPC; 0: without.
    """
    import kserve.model_server as kserve
    import kserve.protocol.rest.server as rest
    import uvloop

    from serving.rest_door import RestDoor

    model.load()

    class _Config(rest.uvicorn.Config):
        def __init__(self, app: Any, **given: Any) -> None:
            ours = {"host": host, "access_log": False, "proxy_headers": False, "server_header": False}
            super().__init__(RestDoor(model, kserve.app), **(given | ours))

    rest.uvicorn.Config = _Config  # KServe 0.21 has no setting for the interface
    if grpc_port:
        from serving.grpc_door import LocalGrpcServer

        kserve.GRPCServer = partial(LocalGrpcServer, host, model)
    warnings.filterwarnings("ignore", module="fastapi")
    server = kserve.ModelServer(
        http_port=port,
        grpc_port=grpc_port,
        workers=1,
        enable_grpc=bool(grpc_port),
        enable_latency_logging=False,
        grace_period=GRACE,
    )
    for name in ("kserve", "kserve.trace", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("kserve").addFilter(_not_of_callers)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.set_event_loop(asyncio.new_event_loop())  # KServe wants one before it makes its own
    # What is loaded stays: without this a full collection stops the server for 200 ms now and then.
    gc.collect()
    gc.freeze()
    server.start([model])


def _not_of_callers(record: logging.LogRecord) -> bool:
    """A model that does not exist is its caller's fault, and no line (KServe's: a stack trace) for the log."""
    from kserve.errors import ModelNotFound

    return not (record.exc_info and isinstance(record.exc_info[1], ModelNotFound))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serving.server", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="directory of the bundle")
    parser.add_argument("--version", default=os.environ.get("EVERGREEN_MODEL_VERSION", ""), help="its version")
    parser.add_argument("--digest", default="", help="refuse the bundle unless it has this digest")
    parser.add_argument("--unsigned", action="store_true", help="serve a bundle that was never registered")
    parser.add_argument("--port", type=int, required=True, help="for REST")
    parser.add_argument("--grpc-port", type=int, default=0, help="for gRPC; without it only REST is spoken")
    parser.add_argument("--host", default=LOOPBACK)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
