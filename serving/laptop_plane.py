"""The laptop's data plane: one background process a version, behind one Envoy.

Under `evergreen up` all of it is permanent but a challenger, which dies with its rollout: no unwatched challenger ever
answers anybody, the gateway gives its users to the champion. Without it, everything is for the time of a rollout.

What serves is kept in the gateway's routing on disk; the way back to a standby that runs (`settle`) needs no registry.
"""

import shutil
import sys
from dataclasses import replace

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings
from serving import gateway
from serving.files import directory_digest
from serving.gateway import Backend, Gateway, Routing
from serving.launch import KEEP_SIGNAL
from serving.plane import Doors, Serving, Unfit
from serving.processes import Process, Processes, free_port, require_free
from serving.registry import Registry

PREDICTOR = "predictor-"
GATEWAY_SETTING = "EVERGREEN_GATEWAY_PORT"


class LaptopPlane:
    """Gateway and predictors of one home (a `Plane`).

    Args:
        settings: The home.
        registry: Its registry, where bundles come from.
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

    def serving(self) -> Serving:
        """What answers now; a champion whose process died does not, though the standby does so in its place."""
        if self.gateway.process is None:
            return Serving()
        routing = self.gateway.routing
        champion, challenger = (b.version if b else "" for b in (routing.champion, routing.challenger))
        if champion and self.processes.get(PREDICTOR + champion) is None:
            champion = ""
        return Serving(champion, challenger, routing.percent)

    def open(self, champion: str, challenger: str, salt: str) -> Doors:
        """Run both versions side by side; see `Plane.open`."""
        permanent = self.permanent
        if permanent:
            self.settle(champion, self._standby)
        old = self.predictor(champion, temporary=not permanent) if champion else None
        try:
            new = self._predictor_under_test(challenger)
            if old:
                self.processes.wait(old)
            self._wait_fit(new)
        except BaseException:
            self.processes.stop(PREDICTOR + challenger)
            raise
        routing = Routing(backend(old) if old else None, backend(new), 0, salt)
        if permanent:
            self.gateway.apply(replace(routing, standby=self.gateway.routing.standby))
        else:
            self.gateway.start(routing, free_port(), temporary=True)
        return Doors(self.gateway.url, _url(old) if old else "", _url(new))

    def split(self, percent: int) -> None:
        """Give the challenger that share of the users."""
        self.gateway.shift(percent)

    def settle(self, champion: str, standby: str = "") -> None:
        """Let `champion` answer everybody, keep `standby` warm, stop all other predictors, prune unpacked models.

        Without `evergreen up` nothing serves afterwards.

        Raises:
            EvergreenError: The champion cannot be served; what served before goes on.
        """
        if self.permanent:
            self.serve(champion, standby)
        else:
            self.close()
        self._prune({champion, standby})

    def close(self) -> None:
        """Stop what a rollout without `evergreen up` started."""
        if not self.permanent:
            self.gateway.stop()
            self._stop_predictors(set())

    def serve(self, champion: str, standby: str = "") -> None:
        """Start what is missing of gateway, champion and standby, for good, and let the champion answer everybody.

        The standby is not waited for: the gateway finds out when it is ready.

        Raises:
            EvergreenError: The gateway's port is in use, or the champion cannot be served; what served before goes on.
        """
        running = self.gateway.process if self.permanent else None
        port = running.ports["http"] if running else self._settings.gateway_port
        if running is None:  # told before seconds go into starting the predictor
            require_free(port, gateway.NAME, GATEWAY_SETTING)
        routing = Routing()
        if champion:
            process = self.predictor(champion, temporary=False)
            self.processes.wait(process)
            routing = Routing(champion=backend(process), standby=self._warm(standby, champion))
        self.gateway.start(routing, port, GATEWAY_SETTING)
        self._stop_predictors({champion, standby})

    def predictor(self, version: str, temporary: bool) -> Process:
        """Start the predictor of a version, without waiting until it is ready; one that runs is taken as it is.

        Args:
            version: Registered version; its bundle is fetched and verified.
            temporary: Whether it dies with this process; a temporary one of this process becomes permanent if not.

        Raises:
            EvergreenError: The version's files are damaged.
        """
        name = PREDICTOR + version
        present = self.processes.get(name)
        if present and (temporary or not present.parent):
            return present
        if present and present.parent and self.processes.mine(present):
            return self.processes.keep(present)
        bundle = self._registry.fetch(version)
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
            ready=f"{_at(port)}/v2/models/{self._settings.model_name}/ready",
            ports={"http": port},
            environment=dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            temporary=temporary,
            keep_signal=KEEP_SIGNAL,
        )

    def _predictor_under_test(self, version: str) -> Process:
        try:
            return self.predictor(version, temporary=True)
        except EvergreenError as error:
            self._registry.aliases()  # where the registry does not answer either, that is no fault of the version's
            raise Unfit(error.problem, error.remedy) from error

    def _wait_fit(self, process: Process) -> None:
        try:
            self.processes.wait(process)
        except EvergreenError as error:
            raise Unfit(error.problem, error.remedy) from error

    @property
    def _standby(self) -> str:
        standby = self.gateway.routing.standby
        return standby.version if standby else ""

    def _warm(self, standby: str, champion: str) -> Backend | None:
        """The standby's predictor, started where it does not run; None where there is none or it is damaged."""
        if not standby or standby == champion:
            return None
        try:
            return backend(self.predictor(standby, temporary=False))
        except EvergreenError:
            return None  # the champion serves all the same

    def _stop_predictors(self, keep: set[str]) -> None:
        names = {PREDICTOR + version for version in keep if version}
        for process in self.processes.running():
            if process.name.startswith(PREDICTOR) and process.name not in names:
                self.processes.stop(process.name)

    def _prune(self, keep: set[str]) -> None:
        """Remove unpacked versions that nobody will serve soon; the registry has them all."""
        for directory in (self._settings.serving / "models").glob("[0-9]*"):
            if directory.name not in keep:
                shutil.rmtree(directory, ignore_errors=True)


def backend(process: Process) -> Backend:
    """Where the gateway finds a predictor."""
    return Backend(process.name.removeprefix(PREDICTOR), process.ports["http"])


def _url(process: Process) -> str:
    return _at(process.ports["http"])


def _at(port: int) -> str:
    return f"http://{LOOPBACK}:{port}"
