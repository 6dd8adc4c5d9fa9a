"""Evidently's real UI over a workspace."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from evergreen.settings import TELEMETRY_OFF
from serving.processes import free_port


@contextmanager
def serve(workspace: Path, patience: float = 60.0) -> Iterator[httpx.Client]:
    """The UI on a free port of loopback, until the block ends; gives a client once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "evidently.cli", "ui", "--host", "127.0.0.1", "--port", str(port)]
    log = workspace.with_name("ui.log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--workspace", str(workspace)], env={**os.environ, **TELEMETRY_OFF}, stdout=out, stderr=out
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=patience) as client:
            deadline = time.monotonic() + patience
            while True:
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    client.get("/api/version").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert time.monotonic() < deadline, "the UI did not start"
                    time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(30)
