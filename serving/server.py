"""`python -m serving.server --bundle DIR --version V --port P`: one model version as a KServe model server.

Listens on loopback unless told otherwise (a container is told), one worker, REST only. KServe's own defaults
are turned round where they do not suit: all interfaces, four log lines a request, 422 and 500 for bad
requests.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings, get_settings
from serving.files import directory_digest
from serving.launch import die_with_parent

KEEP_SIGNAL = signal.SIGUSR1  # "outlive your starter": the rollout that started a challenger made it champion
THREADS = 1  # a process; more of them raise p99 tenfold when predictors share two cores
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
        EvergreenError: The bundle is damaged, or there are no online features.
    """
    if options.digest and directory_digest(options.bundle) != options.digest:
        raise EvergreenError(f"the bundle in {options.bundle} is not the registered one (digest differs)")
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    import torch

    from model.gemm import keep_memory
    from serving.predictor import RankerPredictor
    from serving.scoring import Scorer, open_features

    torch.set_num_threads(THREADS)
    keep_memory()
    scorer = Scorer(options.bundle, open_features(settings))
    model = RankerPredictor(settings.model_name, options.version, scorer)
    model.load()
    # What is loaded stays: without this a full collection stops the server for 200 ms now and then.
    gc.collect()
    gc.freeze()
    _model_server(options.host, options.port).start([model])


def _model_server(host: str, port: int) -> Any:
    import kserve.protocol.rest.server as rest
    from fastapi.exceptions import RequestValidationError
    from kserve import ModelServer
    from kserve.errors import InferenceError, InvalidInput, ModelNotFound
    from kserve.model_server import app

    class _Config(rest.uvicorn.Config):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"host": host, "access_log": False}))

    class _Short(logging.Filter):
        """No line for a bad request, one line and no traceback for a bad model."""

        def filter(self, record: logging.LogRecord) -> bool:
            error = record.exc_info[1] if record.exc_info else None
            if isinstance(error, InferenceError):
                record.msg, record.args, record.exc_info = str(error), (), None
            return not isinstance(error, InvalidInput | ModelNotFound)

    rest.uvicorn.Config = _Config  # KServe 0.21 has no setting for the interface
    warnings.filterwarnings("ignore", module="fastapi")
    server = ModelServer(http_port=port, workers=1, enable_grpc=False, enable_latency_logging=False, grace_period=GRACE)
    logging.getLogger("kserve").addFilter(_Short())
    for name in ("kserve", "kserve.trace", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app.add_exception_handler(RequestValidationError, _refuse_malformed)
    server.dataplane.decode = _clear_errors(server.dataplane.decode)
    return server


def _refuse_malformed(request: Any, error: Any) -> Any:
    """400 with one line, where FastAPI gives 422 with a tree."""
    from fastapi.responses import JSONResponse

    first = error.errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part not in ("body", "InferenceRequest"))
    return JSONResponse({"error": f"malformed request: {where} {first.get('msg', '')}".strip()}, status_code=400)


def _clear_errors(decode: Any) -> Any:
    """KServe lets a malformed binary body fail with whatever exception it meets, which becomes a 500."""
    from kserve.errors import InvalidInput

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return decode(*args, **kwargs)
        except InvalidInput:
            raise
        except Exception as error:
            raise InvalidInput(f"malformed request: {type(error).__name__}: {str(error)[:200]}") from error

    return guarded


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serving.server", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="directory of the bundle")
    parser.add_argument("--version", default=os.environ.get("EVERGREEN_MODEL_VERSION", ""), help="its version")
    parser.add_argument("--digest", default="", help="refuse the bundle unless it has this digest")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default=LOOPBACK)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
