"""What runs in the background of a home: gateway, champion, and the two UIs; started, told apart, stopped.

What should serve is the registry's champion, with the one before it standing by. `serve_champion` makes it so from
whatever runs at the moment; nothing here remembers more than the process records and the gateway's routing.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings
from serving import gateway, webhook
from serving.gateway import Gateway
from serving.laptop_plane import GATEWAY_SETTING, LaptopPlane
from serving.processes import Process, Processes, http_get, require_free
from serving.registry import Registry

MLFLOW, EVIDENTLY, PROMOTER, SCHEDULER = "mlflow", "evidently", "promoter", "scheduler"
METRICS, METRICS_SETTING = "metrics", "EVERGREEN_METRICS_PORT"
PROMOTER_SETTING, SCHEDULER_SETTING = "EVERGREEN_PROMOTER_PORT", "EVERGREEN_SCHEDULER_PORT"
MLFLOW_SETTING, EVIDENTLY_SETTING = "EVERGREEN_MLFLOW_PORT", "EVERGREEN_EVIDENTLY_PORT"


class Busy(EvergreenError):
    """Another command is changing what serves."""


@contextmanager
def serving_lock(settings: Settings, patience: float = 5.0) -> Iterator[None]:
    """One rollout, `up`, `down`, `rollback` or action of the promoter at a time; a killed one holds it no longer.

    Args:
        settings: The home.
        patience: Seconds to wait for another one; most take no longer.

    Raises:
        Busy: Another one is under way.
    """
    settings.serving.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.serving / ".lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise Busy(
            f"another command is changing what serves in {settings.root}", "Wait for it to end and try again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def serve_champion(plane: LaptopPlane, registry: Registry) -> str:
    """Let the registry's champion answer everybody, for good, the one before it standing by; returns the champion.

    Raises:
        EvergreenError: It cannot be served; what served before goes on.
    """
    agreed = registry.agreed()
    plane.serve(agreed.champion, agreed.previous)
    return agreed.champion


def up(settings: Settings, scheduled: bool = True) -> list[dict[str, Any]]:
    """Start gateway, champion, UIs and the schedule for as long as until `down`; what runs is left alone.

    Args:
        settings: The home.
        scheduled: Whether what is scheduled runs by itself.

    Returns:
        For each its `name`, its `url`, whether it was `already` running, and a `note` where there is one.

    Raises:
        EvergreenError: A port is in use, and nothing was started; or something does not start.
    """
    with serving_lock(settings):
        registry = Registry(settings)
        plane = LaptopPlane(settings, registry)
        before = {p.name for p in plane.processes.running() if not p.parent}
        for name, port, setting in _doors(settings, scheduled):
            if name not in before:
                require_free(port, name, setting)
        # All at once: each spends seconds on imports.
        starts = (mlflow_ui, evidently_ui, metrics) if _registry_is_here(settings) else (evidently_ui, metrics)
        interfaces = [start(settings, plane.processes) for start in starts]
        champion = serve_champion(plane, registry)
        interfaces.append(promoter(settings, plane.processes))
        interfaces += [scheduler(settings, plane.processes)] if scheduled else []
        for process in interfaces:
            plane.processes.wait(process)
        hooked = _hook(settings) if _registry_is_here(settings) else ""
        note = f"serves v{champion}" if champion else "no champion yet"
        urls = {p.name: f"http://{LOOPBACK}:{p.ports['http']}" for p in interfaces}
        urls[METRICS] += "/metrics"
        urls[gateway.NAME] = f"{plane.gateway.url}/v2/models/{settings.model_name}"
        notes = {gateway.NAME: note, PROMOTER: hooked, SCHEDULER: scheduler_state(settings)}
        return [{"name": n, "url": u, "already": n in before, "note": notes.get(n, "")} for n, u in urls.items()]


def down(settings: Settings) -> list[str]:
    """Stop everything that was started for this home; returns the names of what ran."""
    processes = Processes(settings)
    # First those that would hold the lock through a canary.
    stopped = [name for name in (SCHEDULER, PROMOTER) if processes.stop(name)]
    with serving_lock(settings):
        return stopped + processes.stop_all()


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


def promoter_state(settings: Settings) -> str:
    """Whether the promoter acts, and what keeps it from it; in words."""
    process = Processes(settings).get(PROMOTER)
    if process is None:
        return "does not run (start it with `evergreen up`)"
    status, text = http_get(process.ready)
    if status != 200:
        return "does not answer"
    told = json.loads(text)
    return told["problem"] or ("looks after the registry" if told["acting"] else "stands by for another one")


def scheduler_state(settings: Settings) -> str:
    """What the home's scheduler does, or what it waits for; in words."""
    process = Processes(settings).get(SCHEDULER)
    if process is None:
        return "does not run (start it with `evergreen up`)"
    status, text = http_get(f"http://{LOOPBACK}:{process.ports['http']}/schedule")
    if status != 200:
        return "does not answer"
    told = json.loads(text)
    if told["problem"]:
        return str(told["problem"])
    if told["running"]:
        return f"{told['running']['entry']} of {told['running']['as_of']:.16} runs"
    following = min(told["entries"], key=lambda e: e["next"])
    return f"retrains, refreshes and checks by itself; next: {following['name']} at {following['next']:.16} UTC"


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
        environment={
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            **webhook.server_environment(settings),
        },
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


def promoter(settings: Settings, processes: Processes) -> Process:
    """Start what does people's wishes in the registry.

    Raises:
        EvergreenError: Its port is in use.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    return _own(processes, PROMOTER, "serving.promoter", settings.promoter_port, PROMOTER_SETTING, environment)


def scheduler(settings: Settings, processes: Processes) -> Process:
    """Start what runs the schedule.

    Raises:
        EvergreenError: Its port is in use.
    """
    return _own(processes, SCHEDULER, "pipelines.scheduler", settings.scheduler_port, SCHEDULER_SETTING)


def metrics(settings: Settings, processes: Processes) -> Process:
    """Start what tells Prometheus the home's figures.

    Raises:
        EvergreenError: Its port is in use.
    """
    return _own(processes, METRICS, "monitoring.exporter", settings.metrics_port, METRICS_SETTING)


def _own(
    processes: Processes, name: str, module: str, port: int, setting: str, environment: Mapping[str, str] | None = None
) -> Process:
    """Start a module of this project that answers `/healthz` on a port of its own."""
    return processes.start(
        name,
        [sys.executable, "-m", module],
        ready=f"http://{LOOPBACK}:{port}/healthz",
        ports={"http": port},
        setting=setting,
        environment={**(environment or {}), setting: str(port)},
    )


def _hook(settings: Settings) -> str:
    """Register the webhook; what kept it from it, in words. The promoter polls all the same."""
    try:
        webhook.register(settings, f"http://{LOOPBACK}:{settings.mlflow_port}")
    except EvergreenError as error:
        return f"polls only: {error.problem}"
    return ""


def _doors(settings: Settings, scheduled: bool) -> list[tuple[str, int, str]]:
    """Name, port and setting of everything that a person opens."""
    found = [
        (gateway.NAME, settings.gateway_port, GATEWAY_SETTING),
        (EVIDENTLY, settings.evidently_port, EVIDENTLY_SETTING),
        (PROMOTER, settings.promoter_port, PROMOTER_SETTING),
        (METRICS, settings.metrics_port, METRICS_SETTING),
    ]
    found += [(SCHEDULER, settings.scheduler_port, SCHEDULER_SETTING)] if scheduled else []
    return found + ([(MLFLOW, settings.mlflow_port, MLFLOW_SETTING)] if _registry_is_here(settings) else [])


def _registry_is_here(settings: Settings) -> bool:
    """Whether the registry is a file of this home; a remote MLflow has its own UI."""
    return not settings.tracking_uri.startswith("http")


def _describe(process: Process) -> Mapping[str, Any]:
    return {"pid": process.pid, "ports": dict(process.ports), "log": process.log}
