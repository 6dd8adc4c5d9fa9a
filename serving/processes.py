"""Background processes of one home: started, found again, and stopped; nothing else is ever touched.

Each process has a JSON record under `settings.processes` with its pid and its creation time, so that a
recycled pid is never taken for it. Two kinds: permanent ones outlive the command that starts them
(`evergreen up`), temporary ones die with the process that started them, even on `kill -9` (see
`launch.py`).
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, TELEMETRY_OFF, Settings
from serving.files import write_json

LAUNCHER = Path(__file__).with_name("launch.py")
# A process starts in the home; its directories have names of ours (`serving/gateway`) and are not to be imported.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
MARK = "EVERGREEN_PROCESS"  # in the environment of all descendants: tells ours apart when the leader is gone
READY_WITHIN = 120.0  # seconds; a busy 2-core machine needs 50 for the MLflow server
# The kernel's boot time, from which creation times derive, moves by up to a second when the clock is set.
CREATION_TOLERANCE = 1.5
FREE_PORTS = range(20_000, 32_000)  # below the range that the kernel gives to outgoing connections


@dataclass(frozen=True)
class Process:
    """One background process.

    Attributes:
        name: Unique in the home, e.g. `gateway` or `predictor-3`.
        pid: Its pid; it leads its own process group.
        created: Creation time, seconds since 1970.
        command: What runs.
        ports: Loopback ports by role.
        ready: URL that answers 200 when it is ready.
        log: File with its output.
        mark: Value of `MARK` in its environment and in that of its descendants.
        parent: Pid of the process it dies with; 0 for a permanent process.
        keep_signal: Signal on which it stops dying with its parent; 0 when it cannot.
    """

    name: str
    pid: int
    created: float
    command: tuple[str, ...]
    ready: str
    log: str
    mark: str
    ports: Mapping[str, int] = field(default_factory=dict)
    parent: int = 0
    keep_signal: int = 0

    @property
    def alive(self) -> bool:
        """Whether this very process (not a later one with its pid) runs."""
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.created) < CREATION_TOLERANCE
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.Error:
            return False

    def log_tail(self) -> str:
        """The last line of its log that says something, shortened; for one-line errors."""
        try:
            lines = Path(self.log).read_text(errors="replace").splitlines()
        except OSError:
            return "no log"
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][-300:] if said else "its log is empty"


class Processes:
    """The background processes of one home.

    Args:
        settings: The home whose processes these are.
    """

    def __init__(self, settings: Settings) -> None:
        self._root = settings.root
        self._directory = settings.processes
        self._children: dict[int, subprocess.Popen] = {}  # those started here must be waited for by us

    def get(self, name: str) -> Process | None:
        """The running process of that name, if any."""
        process = self._read(self._directory / f"{name}.json")
        return process if process and self._alive(process) else None

    def running(self) -> list[Process]:
        """All running processes of the home, by name."""
        return [p for p in self._records() if self._alive(p)]

    def start(
        self,
        name: str,
        command: list[str],
        *,
        ready: str,
        ports: Mapping[str, int],
        setting: str = "",
        environment: Mapping[str, str] | None = None,
        temporary: bool = False,
        keep_signal: int = 0,
    ) -> Process:
        """Start a process, without waiting until it is ready (`wait`). If the same one runs, it is kept.

        Args:
            name: Unique name in the home.
            command: Program and arguments.
            ready: URL that answers 200 once the process does its work.
            ports: Loopback ports that it will listen on, by role.
            setting: The setting that a person changes when a port is taken.
            environment: Added to this process's environment.
            temporary: Whether it dies with this process. The kernel ties it to the thread that starts it, so
                only the main thread may.
            keep_signal: Signal on which a temporary process becomes permanent (see `keep`); 0: it cannot.

        Raises:
            EvergreenError: A port is in use.
        """
        if temporary and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a temporary process must be started from the main thread")
        self._directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self._directory / ".lock"):
            self._sweep()
            present = self.get(name)
            wanted_parent = os.getpid() if temporary else 0
            if present and (present.command, present.parent) == (tuple(command), wanted_parent):
                return present
            self.stop(name)
            for port in ports.values():
                require_free(port, name, setting)
            record = Process(
                name=name,
                pid=0,
                created=0.0,
                command=tuple(command),
                ready=ready,
                log=str(self._directory / f"{name}.log"),
                mark=uuid.uuid4().hex,
                ports=dict(ports),
                parent=wanted_parent,
                keep_signal=int(keep_signal),
            )
            return self._spawn(record, dict(environment or {}))

    def wait(self, process: Process, within: float = READY_WITHIN) -> None:
        """Return when the process answers its readiness URL.

        Raises:
            EvergreenError: It ended, or did not answer within that many seconds; it is stopped then.
        """
        deadline = time.monotonic() + within
        while self._alive(process):
            # Asked again after the answer: another program may answer on the port that ours failed to get.
            if http_get(process.ready)[0] == 200 and self._alive(process):
                return
            if time.monotonic() > deadline:
                self.stop(process.name)
                problem = f"{process.name} was not ready within {within:.0f} s: {process.log_tail()}"
                raise EvergreenError(problem, f"See {process.log}")
            time.sleep(0.05)
        self.stop(process.name)
        problem = f"{process.name} stopped before it was ready: {process.log_tail()}"
        raise EvergreenError(problem, f"See {process.log}")

    def keep(self, process: Process) -> Process:
        """Make a temporary process permanent: it will outlive this one."""
        if not process.parent:
            return process
        os.kill(process.pid, process.keep_signal)
        kept = replace(process, parent=0)
        self._write(kept)
        return kept

    def mine(self, process: Process) -> bool:
        """Whether it dies with this very process."""
        return process.parent == os.getpid()

    def stop(self, name: str, grace: float = 10.0) -> bool:
        """Stop a process with its descendants: gently, and after `grace` seconds with force.

        Returns:
            Whether anything of it still ran.
        """
        process = self._read(self._directory / f"{name}.json")
        if process is None:
            return False
        members = self._members(process)
        for signal_number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            deadline = time.monotonic() + patience
            left = self._members(process)
            for member in left:
                _signal(member, signal_number)
            while left and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._members(process)
        (self._directory / f"{name}.json").unlink(missing_ok=True)
        return bool(members)

    def stop_all(self) -> list[str]:
        """Stop everything that was started for this home; returns the names of what still ran."""
        return [p.name for p in self._records() if self.stop(p.name)]

    def _spawn(self, record: Process, environment: dict[str, str]) -> Process:
        # The child's output goes to a fresh log; it starts its own group so that it is stopped as a whole.
        read_end, write_end = os.pipe()
        launcher = [sys.executable, "-I", "-S", str(LAUNCHER), str(read_end), str(record.parent)]
        home = {"EVERGREEN_HOME": str(self._root), MARK: record.mark}
        try:
            with Path(record.log).open("wb") as log:
                child = subprocess.Popen(
                    launcher + list(record.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._root,
                    env=dict(os.environ) | TELEMETRY_OFF | home | SAFE_PATH | environment,
                    start_new_session=True,
                    pass_fds=(read_end,),
                )
            self._children[child.pid] = child
            process = replace(record, pid=child.pid, created=psutil.Process(child.pid).create_time())
            self._write(process)
            os.write(write_end, b"g")
        finally:
            os.close(read_end)
            os.close(write_end)
        return process

    def _alive(self, process: Process) -> bool:
        child = self._children.get(process.pid)
        if child is not None:
            child.poll()  # takes a dead child off the kernel's table
        return process.alive

    def _members(self, process: Process) -> list[psutil.Process]:
        """What still runs of a process: itself, and the members of its group that carry its mark."""
        self._alive(process)
        found = []
        for candidate in psutil.process_iter():
            try:
                if os.getpgid(candidate.pid) != process.pid or candidate.status() == psutil.STATUS_ZOMBIE:
                    continue
                leader = candidate.pid == process.pid and process.alive
                if leader or candidate.environ().get(MARK) == process.mark:
                    found.append(candidate)
            except (psutil.Error, OSError):
                continue
        return found

    def _sweep(self) -> None:
        """Clear away what killed commands left: records of the dead, temporary processes without a parent."""
        for process in self._records():
            orphan = process.parent and not psutil.pid_exists(process.parent)
            if orphan or not self._alive(process):
                self.stop(process.name)

    def _records(self) -> Iterator[Process]:
        for path in sorted(self._directory.glob("*.json")):
            process = self._read(path)
            if process:
                yield process

    def _write(self, process: Process) -> None:
        write_json(self._directory / f"{process.name}.json", asdict(process))

    @staticmethod
    def _read(path: Path) -> Process | None:
        try:
            data = json.loads(path.read_text())
            return Process(**(data | {"command": tuple(data["command"])}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise EvergreenError(f"unreadable process record {path} ({error})", "Delete the file") from error


def free_port(among: range = FREE_PORTS) -> int:
    """A loopback port that nothing listens on now."""
    for port in random.SystemRandom().sample(among, 200):
        if _is_free(port):
            return port
    raise EvergreenError(f"no free port in {among.start}..{among.stop}", "Stop what uses them")


def http_get(url: str, timeout: float = 2.0) -> tuple[int, str]:
    """Status and text of a plain GET; status 0 when nobody answers."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or LOOPBACK, parts.port, timeout=timeout)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}" if parts.query else parts.path or "/")
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Only listeners count, not connections that are closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def require_free(port: int, name: str, setting: str) -> None:
    """Refuse a port on which something listens.

    Raises:
        EvergreenError: It is in use; names the setting to change.
    """
    if not _is_free(port):
        remedy = f"Stop what listens there or set {setting} to another port" if setting else "Try again"
        raise EvergreenError(f"port {port}, wanted by {name}, is in use", remedy)


def _signal(process: psutil.Process, signal_number: int) -> None:
    try:
        process.send_signal(signal_number)  # psutil checks the creation time again
    except psutil.Error:
        return
