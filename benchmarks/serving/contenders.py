"""Starts, watches and stops the contenders: each on one core, none outlives the benchmark."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.measure import ROOT
from benchmarks.serving import world
from serving.launch import die_with_parent
from serving.processes import free_port, http_get

MLSERVER = ("mlserver==1.7.1", "onnxruntime==1.31.1")
READY_WITHIN = 120.0
_THERE = sorted(os.sched_getaffinity(0))
SERVER_CORE, GENERATOR_CORE = _THERE[0], _THERE[-1]  # the same where there is but one


@dataclass
class Contender:
    """A server that runs.

    Attributes:
        process: It and its children answer.
        port: Where.
        startup: Seconds from its start until it was ready.
    """

    process: subprocess.Popen
    port: int
    startup: float

    def cpu(self) -> float:
        """CPU seconds so far, children included."""
        return sum(sum(p.cpu_times()[:2]) for p in self._family())

    def megabytes(self) -> float:
        """Resident memory."""
        return sum(p.memory_info().rss for p in self._family()) / 1e6

    def stop(self) -> None:
        """End the whole group."""
        for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


def start(command: Sequence[str], ready: str, port: int, log: Path, environment: Mapping[str, str]) -> Contender:
    """Start a server on its core and wait until `ready` answers 200.

    Raises:
        RuntimeError: It ended, or did not become ready.
    """

    def prepare() -> None:
        os.sched_setaffinity(0, {SERVER_CORE})
        die_with_parent(signal.SIGKILL)

    begin = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
            preexec_fn=prepare,  # noqa: PLW1509 (one thread here)
        )
    found = Contender(process, port, 0.0)
    while http_get(f"http://127.0.0.1:{port}{ready}")[0] != 200:
        if process.poll() is not None or time.perf_counter() - begin > READY_WITHIN:
            found.stop()
            raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text(errors='replace')[-1500:]}")
        time.sleep(0.02)
    found.startup = time.perf_counter() - begin
    return found


def ours(room: Path) -> Contender:
    """The predictor as it is deployed: reads features, ranks, logs."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "serving.server",
        "--bundle",
        str(room / world.BUNDLE),
        "--unsigned",
        "--version",
        "1",
    ]
    home = {"EVERGREEN_HOME": str(world.settings(room).root)}
    ready = f"/v2/models/{world.MODEL}/ready"
    return start([*command, "--port", str(port)], ready, port, room / "ours.log", home)


def local(kind: str) -> Callable[[Path], Contender]:
    """A server of `servers.py`."""

    def begin(room: Path) -> Contender:
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.serving.servers", kind, str(port), str(room)]
        return start(command, f"/v2/models/{world.MODEL}/ready", port, room / f"{kind}.log", {})

    return begin


def mlserver(room: Path) -> Contender:
    """MLServer in an environment of its own, made when it is missing.

    Raises:
        RuntimeError: It cannot be installed, or does not start.
    """
    python, directory, port = _mlserver_python(), room / "mlserver", free_port()
    directory.mkdir(exist_ok=True)
    graph = str(room / world.BUNDLE / "served" / "ranker.onnx")
    model = {"name": world.MODEL, "implementation": "mlserver_runtime.Onnx", "parameters": {"uri": graph}}
    server = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    (directory / "model-settings.json").write_text(json.dumps(model))
    (directory / "settings.json").write_text(json.dumps(server | {"parallel_workers": 0, "debug": False}))
    own = {"PYTHONPATH": str(Path(__file__).parent)}
    command = [str(python.parent / "mlserver"), "start", str(directory)]
    return start(command, f"/v2/models/{world.MODEL}/ready", port, room / "mlserver.log", own)


def _mlserver_python() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evergreen"
    python = cache / "mlserver-1.7.1" / "bin" / "python"
    if (python.parent / "ready").exists():
        return python
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "mlserver.log").open("w") as out:
        venv = [sys.executable, "-m", "venv", "--clear", str(python.parents[1])]
        for command in (venv, [str(python), "-m", "pip", "install", *MLSERVER]):
            if subprocess.run(command, stdout=out, stderr=out, check=False, timeout=600).returncode != 0:
                raise RuntimeError(f"MLServer cannot be installed (see {cache / 'mlserver.log'})")
    (python.parent / "ready").touch()
    return python
