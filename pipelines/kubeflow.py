"""Hand a run to Kubeflow Pipelines: the same graph, compiled."""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engagement.errors import EvergreenError

if TYPE_CHECKING:
    import kfp

HOST = "EVERGREEN_KFP_HOST"
EXPERIMENT = "evergreen"


@contextlib.contextmanager
def kubeflow() -> "Iterator[kfp.Client]":
    """A client of the Kubeflow Pipelines that `EVERGREEN_KFP_HOST` names; what goes wrong with it is one line.

    Raises:
        EvergreenError: No host is set, it does not answer, or it refuses what it is asked.
    """
    import kfp
    import urllib3
    from kfp_server_api import ApiException

    host = os.environ.get(HOST, "")
    if not host:
        raise EvergreenError("no Kubeflow Pipelines host is set", f"Set {HOST}=http://HOST:PORT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of servers that are years old
            client = kfp.Client(host=host)
        yield client
    except ApiException as error:
        raise EvergreenError(
            f"Kubeflow Pipelines at {host} refused: {error.status} {_said(error.body)}".strip(),
            "Nothing is lost: repair it and run the same command again",
        ) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise EvergreenError(
            f"Kubeflow Pipelines at {host} does not answer ({type(error).__name__})", f"Check {HOST}"
        ) from error


def _said(body: object) -> str:
    """The message of a refusal, in one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with contextlib.suppress(ValueError, AttributeError):
        text = str(json.loads(text).get("message") or text)
    return " ".join(text.split())[:300]


def submit_retrain(as_of: datetime, strategy: str) -> str:
    """Start the retrain at `as_of` on Kubeflow; returns the run's id.

    Raises:
        EvergreenError: No host is set, or it does not answer.
    """
    from pipelines.compile import compile_all

    with kubeflow() as client, tempfile.TemporaryDirectory() as directory:
        package = next(p for p in compile_all(Path(directory)) if p.stem == "retrain")
        run = client.create_run_from_pipeline_package(
            str(package),
            arguments={"as_of": as_of.isoformat(), "strategy": strategy, "reason": "person"},
            run_name=f"retrain-{as_of:%Y%m%dT%H%M}",
            experiment_name=EXPERIMENT,
        )
    return str(run.run_id)
