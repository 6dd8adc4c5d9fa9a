"""Hand a run to Kubeflow Pipelines: the same graph, compiled."""

import os
import tempfile
from datetime import datetime
from pathlib import Path

from engagement.errors import EvergreenError

HOST = "EVERGREEN_KFP_HOST"


def submit_retrain(as_of: datetime, strategy: str) -> str:
    """Start the retrain at `as_of` on Kubeflow; returns the run's id.

    Raises:
        EvergreenError: No host is set, or it does not answer.
    """
    import kfp
    import urllib3

    from pipelines.compile import compile_all

    host = os.environ.get(HOST, "")
    if not host:
        raise EvergreenError("no Kubeflow Pipelines host is set", f"Set {HOST}=http://HOST:PORT")
    with tempfile.TemporaryDirectory() as directory:
        package = next(p for p in compile_all(Path(directory)) if p.stem == "retrain")
        try:
            run = kfp.Client(host=host).create_run_from_pipeline_package(
                str(package),
                arguments={"as_of": as_of.isoformat(), "strategy": strategy, "reason": "person"},
                run_name=f"retrain-{as_of:%Y%m%dT%H%M}",
                experiment_name="evergreen",
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise EvergreenError(
                f"Kubeflow Pipelines at {host} does not answer ({type(error).__name__})", f"Check {HOST}"
            ) from error
    return str(run.run_id)
