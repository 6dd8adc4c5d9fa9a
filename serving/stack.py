"""What runs in the background of a home: gateway, champion, and the two UIs; started, told apart, stopped.

What should serve is the registry's champion. `serve_champion` makes it so from whatever runs at the moment;
nothing here remembers more than the process records and the gateway's routing.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings
from serving import gateway
from serving.files import directory_digest
from serving.gateway import Backend, Gateway, Routing
from serving.processes import Process, Processes, free_port, require_free
from serving.registry import Registry
from serving.server import KEEP_SIGNAL

PREDICTOR = "predictor-"
MLFLOW, EVIDENTLY = "mlflow", "evidently"
GATEWAY_SETTING, MLFLOW_SETTING, EVIDENTLY_SETTING = (
    "EVERGREEN_GATEWAY_PORT",
    "EVERGREEN_MLFLOW_PORT",
    "EVERGREEN_EVIDENTLY_PORT",
)


@contextmanager
def serving_lock(settings: Settings) -> Iterator[None]:
    """One rollout, `up`, `down` or `rollback` of a home at a time; a killed one holds it no longer.

    Raises:
        EvergreenError: Another one is under way.
    """
    settings.serving.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.serving / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise EvergreenError(
            f"another command is changing what serves in {settings.root}", "Wait for it to end and try again"
        ) from None
    try:
        yield
    finally:
        lock.release()


class Stack:
    """Gateway and predictors of one home.

    Args:
        settings: The home.
        registry: Its registry.
    """

    server: tuple[str, ...] = ("-m", "serving.server")  # what Python runs as a predictor

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self.processes = Processes(settings)
        self.gateway = Gateway(settings, self.processes)

    @property
    def permanent(self) -> bool:
        """Whether `evergreen up` runs here."""
        process = self.gateway.process
        return process is not None and not process.parent

    def predictor(self, version: str, temporary: bool) -> Process:
        """Start the predictor of a version, without waiting until it is ready; one that runs is taken as it is.

        Args:
            version: Registered version; its bundle is fetched and verified.
            temporary: Whether it dies with this process.

        Raises:
            EvergreenError: The version's files are damaged.
        """
        name = PREDICTOR + version
        bundle = self._registry.fetch(version)
        present = self.processes.get(name)
        if present and (temporary or not present.parent):
            return present
        port = free_port()
        options = {
            "--bundle": str(bundle),
            "--version": version,
            "--digest": directory_digest(bundle),
            "--port": str(port),
        }
        return self.processes.start(
            name,
            [sys.executable, *self.server, *(word for pair in options.items() for word in pair)],
            ready=f"http://{LOOPBACK}:{port}/v2/models/{self._settings.model_name}/ready",
            ports={"http": port},
            environment={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            temporary=temporary,
            keep_signal=KEEP_SIGNAL,
        )

    def serve_champion(self) -> Routing:
        """Let the registry's champion answer everybody, and stop all other predictors.

        Raises:
            EvergreenError: It cannot be served; what served before goes on.
        """
        if self.gateway.process is None:  # told before ten seconds go into starting the predictor
            require_free(self._settings.gateway_port, gateway.NAME, GATEWAY_SETTING)
        champion = self._registry.aliases().get("champion")
        routing = Routing()
        if champion:
            process = self.predictor(champion, temporary=False)
            self.processes.wait(process)
            routing = Routing(champion=backend(process))
        self.gateway.start(routing, self._settings.gateway_port, GATEWAY_SETTING)
        self.stop_predictors(keep=champion or "")
        return routing

    def stop_predictors(self, keep: str = "") -> None:
        """Stop all predictors but one version's."""
        for process in self.processes.running():
            if process.name.startswith(PREDICTOR) and process.name != PREDICTOR + keep:
                self.processes.stop(process.name)


def backend(process: Process) -> Backend:
    """Where the gateway finds a predictor."""
    return Backend(process.name.removeprefix(PREDICTOR), process.ports["http"])


def up(settings: Settings) -> list[dict[str, Any]]:
    """Start gateway, champion and UIs for as long as until `down`; what runs is left alone.

    Returns:
        For each its `name`, its `url`, whether it was `already` running, and a `note` where there is one.

    Raises:
        EvergreenError: A port is in use, and nothing was started; or something does not start.
    """
    with serving_lock(settings):
        stack = Stack(settings, Registry(settings))
        before = {p.name for p in stack.processes.running() if not p.parent}
        for name, port, setting in _doors(settings):
            if name not in before:
                require_free(port, name, setting)
        # All at once: each spends seconds on imports.
        starts = (mlflow_ui, evidently_ui) if _registry_is_here(settings) else (evidently_ui,)
        interfaces = [start(settings, stack.processes) for start in starts]
        routing = stack.serve_champion()
        for process in interfaces:
            stack.processes.wait(process)
        note = f"serves v{routing.champion.version}" if routing.champion else "no champion yet"
        urls = {p.name: f"http://{LOOPBACK}:{p.ports['http']}" for p in interfaces}
        urls[gateway.NAME] = f"{stack.gateway.url}/v2/models/{settings.model_name}"
        notes = {gateway.NAME: note}
        return [{"name": n, "url": u, "already": n in before, "note": notes.get(n, "")} for n, u in urls.items()]


def down(settings: Settings) -> list[str]:
    """Stop everything that was started for this home; returns the names of what ran."""
    with serving_lock(settings):
        return Processes(settings).stop_all()


def rollback(settings: Settings) -> dict[str, Any]:
    """Make the previous champion champion again, and let it answer at once where `evergreen up` runs.

    Returns:
        `champion` now, and who it `was`.

    Raises:
        EvergreenError: There is no previous champion, or it cannot be served.
    """
    with serving_lock(settings):
        registry = Registry(settings)
        was = registry.aliases().get("champion", "")
        champion = registry.rollback()
        stack = Stack(settings, registry)
        if stack.permanent:
            stack.serve_champion()
        return {"champion": champion, "was": was}


def serving_state(settings: Settings) -> dict[str, Any]:
    """What answers at this moment: `gateway` URL, `champion`, `challenger`, `percent`, `processes`, `summary`."""
    processes = Processes(settings)
    door = Gateway(settings, processes)
    running = {p.name: _describe(p) for p in processes.running()}
    if not door.url:
        summary = "the gateway does not run (start it with `evergreen up`)"
        return {"gateway": "", "champion": "", "challenger": "", "percent": 0, "processes": running, "summary": summary}
    routing = door.routing
    champion = routing.champion.version if routing.champion else ""
    challenger = routing.challenger.version if routing.challenger else ""
    shares = [f"v{challenger} {routing.percent} %"] if challenger else []
    shares += [f"v{champion} {100 - routing.percent if challenger else 100} %"] if champion else []
    return {
        "gateway": door.url,
        "champion": champion,
        "challenger": challenger,
        "percent": routing.percent,
        "processes": running,
        "summary": ", ".join(shares) or "no model serves yet",
    }


def mlflow_ui(settings: Settings, processes: Processes) -> Process:
    """Start MLflow's server with its UI on the home's registry.

    Raises:
        EvergreenError: The port is in use.
    """
    port = settings.mlflow_port
    (settings.root / "mlflow").mkdir(parents=True, exist_ok=True)
    Registry(settings).aliases()  # makes the tables: the server would do so more slowly, and with a page of log
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", settings.tracking_uri]
    command += ["--artifacts-destination", str(settings.mlflow_artifacts), "--host", LOOPBACK, "--port", str(port)]
    command += ["--workers", "1", "--allowed-hosts", f"localhost:{port},{LOOPBACK}:{port}"]
    return processes.start(
        MLFLOW,
        command,
        ready=f"http://{LOOPBACK}:{port}/health",
        ports={"http": port},
        setting=MLFLOW_SETTING,
        # Its job runner would take a gigabyte, for jobs that nobody here starts.
        environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
    )


def evidently_ui(settings: Settings, processes: Processes) -> Process:
    """Start Evidently's UI on the home's workspace.

    Raises:
        EvergreenError: The port is in use.
    """
    port = settings.evidently_port
    settings.evidently.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from evidently.cli import app; app()", "ui", "--host", LOOPBACK]
    return processes.start(
        EVIDENTLY,
        [*command, "--port", str(port), "--workspace", str(settings.evidently)],
        ready=f"http://{LOOPBACK}:{port}/api/version",
        ports={"http": port},
        setting=EVIDENTLY_SETTING,
    )


def _doors(settings: Settings) -> list[tuple[str, int, str]]:
    """Name, port and setting of everything that a person opens."""
    found = [
        (gateway.NAME, settings.gateway_port, GATEWAY_SETTING),
        (EVIDENTLY, settings.evidently_port, EVIDENTLY_SETTING),
    ]
    return found + ([(MLFLOW, settings.mlflow_port, MLFLOW_SETTING)] if _registry_is_here(settings) else [])


def _registry_is_here(settings: Settings) -> bool:
    """Whether the registry is a file of this home; a remote MLflow has its own UI."""
    return not settings.tracking_uri.startswith("http")


def _describe(process: Process) -> Mapping[str, Any]:
    return {"pid": process.pid, "ports": dict(process.ports), "log": process.log}
