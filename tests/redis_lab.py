"""A Redis server of the test's own: on a free loopback port, in a directory that goes with it."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.processes import free_port


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[str]:
    """The address of a fresh Redis; skips the test where Debian's redis-server is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt install redis-server)")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="redis-") as directory, (Path(directory) / "log").open("w") as log:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(port, server)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(10)


def _wait(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "redis-server ended at once"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.02)
    raise TimeoutError("redis-server did not answer")
