"""The gateway: one Envoy on loopback in front of the predictors, told by files what goes where.

Envoy watches two files, its clusters and its routes, and swaps them without closing a connection
(filesystem xDS). So the split is never lost: what is on disk is what a restarted Envoy does. Order matters
and is kept by `apply`: first a cluster exists, then a route names it; it goes one change after the last
route that named it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings
from serving import envoy_config as envoy
from serving.files import write_json
from serving.processes import Process, Processes, free_port, http_get

NAME = "gateway"
APPLY_WITHIN = 15.0  # seconds; a change takes milliseconds, a busy predictor's first health check longer


@dataclass(frozen=True)
class Backend:
    """One running predictor: the model version that it serves, and its loopback port."""

    version: str
    port: int


@dataclass(frozen=True)
class Routing:
    """Who answers: the champion, and the challenger for the users in buckets below `percent`.

    Attributes:
        champion: Answers everybody else, and steps in for a dead challenger. None before the first champion.
        challenger: The version in the canary, if any.
        percent: Share of users that the challenger gets, 0..100.
        salt: Salt of the users' buckets.
        standby: The champion before; steps in for a dead champion, and else answers nobody.
    """

    champion: Backend | None = None
    challenger: Backend | None = None
    percent: int = 0
    salt: str = ""
    standby: Backend | None = None


@dataclass(frozen=True)
class _State:
    generation: int = 0
    routing: Routing = field(default_factory=Routing)
    before: Routing = field(default_factory=Routing)  # its clusters stay, for requests in flight


class Gateway:
    """The gateway of one home.

    Args:
        settings: The home.
        processes: Its background processes.
    """

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self._settings = settings
        self._processes = processes
        self._directory = settings.serving / "gateway"

    @property
    def process(self) -> Process | None:
        """The running Envoy, if any."""
        return self._processes.get(NAME)

    @property
    def url(self) -> str:
        """Where clients send requests; empty when the gateway does not run."""
        process = self.process
        return f"http://{LOOPBACK}:{process.ports['http']}" if process else ""

    @property
    def routing(self) -> Routing:
        """What was last asked for; survives restarts."""
        return self._load().routing

    def start(self, routing: Routing, port: int, setting: str = "", temporary: bool = False) -> Process:
        """Start Envoy with this routing and wait until it listens; a running one is told the routing.

        Args:
            routing: Who answers.
            port: Loopback port for clients.
            setting: The setting to name when the port is taken.
            temporary: Whether it dies with this process.

        Raises:
            EvergreenError: The port is in use, or Envoy does not start.
        """
        process = self.process
        if process is None or process.ports["http"] != port or bool(process.parent) != temporary:
            self._processes.stop(NAME)
            ports = {"http": port, "admin": free_port()}
            self._write(_State(self._load().generation + 1, routing))
            bootstrap = self._directory / "bootstrap.json"
            write_json(bootstrap, envoy.bootstrap(self._directory, ports["http"], ports["admin"]))
            process = self._processes.start(
                NAME,
                envoy.command(bootstrap),
                ready=f"http://{LOOPBACK}:{ports['admin']}/ready",
                ports=ports,
                setting=setting,
                temporary=temporary,
            )
            self._processes.wait(process)
        self.apply(routing)
        return process

    def apply(self, routing: Routing) -> None:
        """Route by `routing` from now on; returns once Envoy does so. No request is dropped.

        Raises:
            EvergreenError: Envoy does not run or refuses the change; the routing is on disk all the same.
        """
        last = self._load()
        if routing == last.routing and self._reports("rds.routes.version_text", last.generation):
            return
        state = _State(last.generation + 1, routing, last.routing)
        write_json(self._directory / "routing.json", asdict(state))
        self._publish_clusters(state)
        self._await("cds.version_text", state.generation)
        self._await_clusters(state)
        self._publish_routes(state)
        self._await("rds.routes.version_text", state.generation)

    def shift(self, percent: int) -> None:
        """Move the challenger's share; everything else stays."""
        self.apply(replace(self.routing, percent=percent))

    def stop(self) -> bool:
        """Stop Envoy; returns whether it ran. The routing stays on disk."""
        return self._processes.stop(NAME)

    def _load(self) -> _State:
        try:
            data = json.loads((self._directory / "routing.json").read_text())
            return _State(data["generation"], _routing(data["routing"]), _routing(data["before"]))
        except FileNotFoundError:
            return _State()
        except (OSError, ValueError, KeyError, TypeError) as error:
            path = self._directory / "routing.json"
            raise EvergreenError(f"unreadable gateway state {path} ({error})", "Delete the file") from error

    def _write(self, state: _State) -> None:
        write_json(self._directory / "routing.json", asdict(state))
        self._publish_clusters(state)
        self._publish_routes(state)

    def _publish_clusters(self, state: _State) -> None:
        clusters: dict[str, Any] = {}
        for routing in (state.before, state.routing):
            clusters |= _clusters(routing, self._settings.model_name)
        self._publish(envoy.CLUSTERS, state.generation, list(clusters.values()))

    def _publish_routes(self, state: _State) -> None:
        routing = state.routing
        champion, challenger = _name(*_line(routing)), _name(routing.challenger, *_line(routing))
        split = envoy.Split(champion, challenger, routing.percent, bool(routing.standby))
        self._publish(envoy.ROUTES, state.generation, [envoy.routes(split)])

    def _publish(self, name: str, generation: int, resources: list[dict[str, Any]]) -> None:
        write_json(self._directory / name, {"version_info": str(generation), "resources": resources})

    def _await(self, stat: str, generation: int) -> None:
        """Wait until Envoy reports the generation; it reports each accepted file with its version."""
        self._poll(lambda: self._reports(stat, generation), stat)

    def _reports(self, stat: str, generation: int) -> bool:
        return f'{stat}: "{generation}"' in self._admin("/stats?filter=version_text")

    def _await_clusters(self, state: _State) -> None:
        """Wait until new clusters had their first health check; until then a route to them answers 503."""
        names = _clusters(state.routing, self._settings.model_name)

        def known() -> bool:
            text = self._admin("/clusters")
            return all(f"\n{name}::" in f"\n{text}" for name in names)

        self._poll(known, "clusters")

    def _poll(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + APPLY_WITHIN
        while not done():
            process = self.process
            if process is None:
                raise EvergreenError("the gateway does not run", "Start it with `evergreen up`")
            if time.monotonic() > deadline:
                problem = f"the gateway did not take the change of its {what}: {process.log_tail()}"
                raise EvergreenError(problem, f"See {process.log}")
            time.sleep(0.01)

    def _admin(self, path: str) -> str:
        process = self.process
        return http_get(f"http://{LOOPBACK}:{process.ports['admin']}{path}")[1] if process else ""


def _routing(data: dict[str, Any]) -> Routing:
    backends = {k: Backend(**data[k]) if data.get(k) else None for k in ("champion", "challenger", "standby")}
    return Routing(**(data | backends))


def _line(routing: Routing) -> tuple[Backend | None, ...]:
    """Who answers for the champion's users: itself, else the standby."""
    return (routing.champion, routing.standby) if routing.champion else (None,)


def _name(*line: Backend | None) -> str:
    """A cluster's name tells all that it holds, so that a cluster never changes under its name."""
    return "-else-".join(f"v{b.version}-{b.port}" for b in line if b) if line[0] else ""


def _clusters(routing: Routing, model: str) -> dict[str, Any]:
    lines = [line for line in (_line(routing), (routing.challenger, *_line(routing))) if line[0]]
    return {_name(*line): envoy.cluster(_name(*line), model, [b.port for b in line if b]) for line in lines}
