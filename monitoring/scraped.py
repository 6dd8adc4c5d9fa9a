"""What Prometheus finds in a home besides the exporter: predictors and the promoter, for `http_sd_config`."""

import json
from contextlib import suppress
from typing import Any

import psutil

from evergreen.settings import LOOPBACK, Settings

JOBS = {"predictor-": "ranker", "promoter": "promoter"}
"""Prometheus' job by how a process's name begins; whatever else runs has no metrics of ours."""

CREATION_TOLERANCE = 1.5  # seconds by which a creation time moves when the clock is set


def targets(settings: Settings) -> list[dict[str, Any]]:
    """Target groups, as Prometheus' HTTP service discovery reads them; read from the home's process records.

    A record of a process that is gone names nothing, one that cannot be read is passed over.
    """
    found = []
    for path in sorted(settings.processes.glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, psutil.Error):
            record = json.loads(path.read_text())
            name, port = str(record["name"]), int(record["ports"]["http"])
            job = next((job for begin, job in JOBS.items() if name.startswith(begin)), "")
            if job and _runs(int(record["pid"]), float(record["created"])):
                found.append({"targets": [f"{LOOPBACK}:{port}"], "labels": {"job": job, "process": name}})
    return found


def _runs(pid: int, created: float) -> bool:
    """Whether that very process runs, not a later one with its pid."""
    return abs(psutil.Process(pid).create_time() - created) < CREATION_TOLERANCE
