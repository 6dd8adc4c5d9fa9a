"""`python -m pipelines.scheduler`: a laptop's own scheduler. It runs what `pipelines/schedule.py` says, when it is due.

`evergreen up` starts it, `down` stops it. Runs go one after the other, each as a process of its own (`scheduled.py`):
the memory of a training does not stay, and a run that hangs or dies takes nothing with it. The scheduler holds the run
lock meanwhile; where a person's run holds it, the schedule waits.

What it remembers (`pipelines/schedule.json`) only saves work: every run is safe to repeat, so a lost file costs one
run of each entry. `GET /healthz` and `GET /schedule` on loopback tell what it does.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from filelock import FileLock, Timeout

from components.watch import PARENT_PID
from engagement.errors import EvergreenError
from engagement.index import from_us, load_index
from evergreen.settings import Settings, get_settings
from monitoring import history
from monitoring.alerts import STALE, stale
from monitoring.notify import Alerts
from pipelines.lock import run_lock
from pipelines.memory import Memory
from pipelines.schedule import HOUR, Entry, credible, due, schedule, skipped
from pipelines.scheduler_door import listen
from serving.agreement import Agreement

POLL = 5.0  # seconds between two looks at the clock
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds before a run that failed is tried again, doubled each time
LONGEST_RUN = 12 * 3600.0  # seconds after which a run is taken to hang
GRACE = 5.0  # seconds that a run is given to end
LOOK_FOR_CHECKS = 300.0  # seconds between two looks whether checks are missing
HISTORY = timedelta(days=14)
"""A log whose newest engagement is older than this (>) is history and not a feed: nothing is run on it.

As long as the longest evidence window of a retrain; a feed that fell silent raises alerts for as long."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a run ended: whether `well`, and one `line` about it."""

    well: bool
    line: str


class Stopped(Exception):
    """The scheduler is to end, and so was its run: what it was for is still due."""


Run = Callable[[Entry, datetime], Ended]


class Scheduler:
    """Decides what runs now, and remembers what ran.

    Args:
        settings: The home.
        run: Runs an entry for an instant; returns when it has ended.
        tell: Called with one line when something happens.
    """

    def __init__(self, settings: Settings, run: Run, tell: Tell) -> None:
        self._settings, self._run, self._tell = settings, run, tell
        self._memory = Memory(settings)
        self._failures: dict[str, tuple[datetime, int, float]] = {}  # instant, tries in a row, when to try again
        self._ahead: set[str] = set()  # entries whose last run lies in the future, so that it is told once
        self._since = self._seen = settings.clock()
        self._looked = -LOOK_FOR_CHECKS  # when it was seen last whether checks are missing
        self.running: dict[str, str] = {}
        self.problem = ""

    def look(self) -> bool:
        """Run what is due and was due first, if anything; returns whether something was done."""
        now = self._settings.clock()
        if abs(now - self._seen) > STALE:
            self._since = now  # a machine that slept, or a clock that was set: no check was missed meanwhile
        self._seen = now
        self._watch_clock(now)
        waiting = sorted((e.starts(i), e.name, e, i) for e in schedule() if (i := self._due(e, now)))
        if not waiting:
            return False
        _, _, entry, instant = waiting[0]
        problem = self._lacks()
        if not problem and (reason := self._history(instant)):
            self._conclude(entry, instant, reason)
            return True
        if not problem:
            try:
                with run_lock(self._settings, patience=0.0):
                    self._say_problem("")
                    self._do(entry, instant)
                return True
            except Timeout:
                problem = "another run is in progress: the schedule waits for it"
        self._say_problem(problem)
        return False

    def miss_checks(self) -> None:
        """Let people know if checks are missing though this scheduler runs: no check could tell them."""
        if time.monotonic() - self._looked < LOOK_FOR_CHECKS:
            return
        self._looked, now = time.monotonic(), self._settings.clock()
        told = self._memory.told("monitor")
        newest = history.newest(self._settings.monitoring / "checks", now)
        why = self.problem or (told["line"] if told["failed"] else "")
        at = datetime.fromisoformat(newest.as_of) if newest else None
        missing = stale(at, self._since, now, self._settings.model_name, why)
        if missing and not self._rests(now):
            Alerts.of(self._settings).add(missing, now)

    def state(self) -> dict[str, Any]:
        """What `/schedule` tells: each entry with its last and next run, what runs, what is in the way."""
        now = self._settings.clock()
        entries = [
            {
                "name": entry.name,
                "says": entry.says,
                "next": entry.starts(entry.following(now)).isoformat(),
                "due": instant.isoformat() if (instant := due(entry, now, self._memory.last(entry.name))) else None,
                **self._memory.told(entry.name),
            }
            for entry in schedule()
        ]
        return {"problem": self.problem, "running": dict(self.running), "entries": entries}

    def _due(self, entry: Entry, now: datetime) -> datetime | None:
        instant = due(entry, now, self._memory.last(entry.name))
        failed, _, again = self._failures.get(entry.name, (None, 0, 0.0))
        return None if instant == failed and time.monotonic() < again else instant

    def _lacks(self) -> str:
        """What a person has to do first."""
        if not (self._settings.data / "index.json").exists():
            return "there is no engagement yet: the schedule waits for `evergreen data import`"
        if not Agreement(self._settings.serving).now().champion:
            return "there is no champion yet: the schedule waits for a first `evergreen retrain`"
        return ""

    def _history(self, instant: datetime) -> str:
        """Why nothing is run on the log at this instant, if it ended long before."""
        ends = [p.last for p in load_index(self._settings.data) if p.room == "engagements"]
        end = from_us(max(ends)) if ends else datetime.fromtimestamp(0, UTC)
        return f"nothing new since {end:%Y-%m-%d %H:%M}: the log ends there" if instant - end > HISTORY else ""

    def _rests(self, now: datetime) -> bool:
        """Whether there is nothing to check; a log that cannot be read is no such case."""
        try:
            return bool(self._lacks() or self._history(now))
        except (EvergreenError, OSError, ValueError):
            return False

    def _do(self, entry: Entry, instant: datetime) -> None:
        missed = skipped(entry, self._settings.clock(), self._memory.last(entry.name))
        if missed:
            self._tell(f"{entry.name}: {missed} missed; the run of {instant:%Y-%m-%d %H:%M} stands for all of them")
        self.running = {"entry": entry.name, "as_of": instant.isoformat(), "since": datetime.now(UTC).isoformat()}
        try:
            ended = self._run(entry, instant)
        finally:
            self.running = {}
        if ended.well:
            self._conclude(entry, instant, ended.line, missed)
            return
        tries = self._failures.get(entry.name, (instant, 0, 0.0))[1] + 1
        pause = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
        self._failures[entry.name] = (instant, tries, time.monotonic() + pause)
        self._memory.failed(entry.name, instant, ended.line, self._settings.clock())
        self._tell(f"{entry.name} at {instant:%Y-%m-%d %H:%M} failed, again in {pause:.0f} s: {ended.line}")

    def _conclude(self, entry: Entry, instant: datetime, line: str, missed: int = 0) -> None:
        self._failures.pop(entry.name, None)
        self._memory.ran(entry.name, instant, line, self._settings.clock(), missed)
        self._tell(f"{entry.name} at {instant:%Y-%m-%d %H:%M}: {line}")

    def _watch_clock(self, now: datetime) -> None:
        """One line when the clock stands before what already ran; nothing of it runs twice."""
        for entry in schedule():
            last = self._memory.last(entry.name)
            if last is None or last <= now:
                self._ahead.discard(entry.name)
            elif entry.name not in self._ahead:
                self._ahead.add(entry.name)
                known = credible(now, last)
                then = f"next at {entry.starts(known + HOUR):%H:%M} or later" if known else "it is run again"
                self._tell(
                    f"the clock is at {now:%Y-%m-%d %H:%M}, but {entry.name} ran for {last:%Y-%m-%d %H:%M}: {then}"
                )

    def _say_problem(self, problem: str) -> None:
        if problem and problem != self.problem:
            self._tell(problem)
        self.problem = problem


def run_here(settings: Settings, stop: threading.Event) -> Run:
    """A `Run` in a process of its own, ended with all its children when `stop` is set or when it takes too long."""

    def run(entry: Entry, instant: datetime) -> Ended:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipelines.scheduled", entry.name, instant.isoformat()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EVERGREEN_HOME": str(settings.root), PARENT_PID: str(os.getpid())},
        )
        deadline = time.monotonic() + LONGEST_RUN
        while True:
            try:
                out, err = child.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                late = time.monotonic() > deadline
                if late or stop.is_set():
                    _end(child.pid)
                    child.communicate()
                    if not late:
                        raise Stopped from None
                    return Ended(False, f"it took more than {LONGEST_RUN / 3600:.0f} h and was ended")
        said = [line for line in (err if child.returncode else out).splitlines() if line.strip()]
        return Ended(child.returncode == 0, said[-1][-500:] if said else f"exit code {child.returncode}")

    return run


def _end(pid: int) -> None:
    """End a process and its descendants: gently, and after a while with force."""
    import psutil

    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for member in family:
            try:
                end(member)
            except psutil.NoSuchProcess:
                continue
        family = psutil.wait_procs(family, timeout=GRACE)[1]


def main() -> int:
    """Follow the schedule until SIGTERM; 1 when the port is in use, with one line on stderr."""
    settings, stop = get_settings(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    scheduler = Scheduler(settings, run_here(settings, stop), _say)
    try:
        listen(settings, scheduler.state)
    except EvergreenError as error:
        print(error, file=sys.stderr)
        return 1
    settings.root.mkdir(parents=True, exist_ok=True)
    lease = FileLock(settings.root / "scheduler.lock")  # a second scheduler waits, and takes over when the first dies
    while not stop.is_set():
        try:
            with lease.acquire(timeout=0):
                follow(scheduler, stop)
        except Timeout:
            stop.wait(POLL)
    return 0


def follow(scheduler: Scheduler, stop: threading.Event) -> None:
    """Look at the clock until `stop`; whatever a look meets, there is a next one."""
    while not stop.is_set():
        try:
            busy = scheduler.look()
        except Stopped:
            return
        except Exception as error:  # a full disk, a store that somebody repairs: the schedule outlives it
            _fault(scheduler, error)
            busy = False
        if not busy:
            try:
                scheduler.miss_checks()
            except Exception as error:
                _fault(scheduler, error)
            stop.wait(POLL)


def _fault(scheduler: Scheduler, error: Exception) -> None:
    if str(error) != scheduler.problem:
        _say(f"{type(error).__name__}: {error}")
    scheduler.problem = str(error)


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
