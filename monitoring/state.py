"""What the monitors left in a home, as a scrape reads it: quickly, and never less than the last whole value.

Nothing here is written, locked or waited for. Files appear whole (they are renamed into place) but for the log of
decisions, to which lines are appended; what cannot be read is passed over and told as a problem.
"""

import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Generic, TypeVar

from engagement.slots import slots
from evergreen.settings import Settings
from monitoring.history import NAME, stamp
from monitoring.trigger import CHECKS
from monitoring.verdict import DriftVerdict

LOOK_BACK = 48
"""A whole verdict is looked for among so many of the newest checks: two days of hourly ones."""
CLOCK_SKEW = timedelta(minutes=5)
"""A check, or the end of a run, that lies **>** this in the future is not believed."""
SLOT_GRACE = timedelta(hours=6)
"""A slot is missed if **≥** this has passed since it and no run of its instant or a later one has ended."""
SLOT_MEMORY = timedelta(days=60)
"""A home whose newest run lies **>** this back replays history: it follows no slots, so it misses none."""

SOURCES = ("checks", "decisions", "alerts", "runs", "figures")
"""Where a problem can lie; `figures` are numbers that are not finite, or too many for one metric."""

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """A home's state at one instant.

    Attributes:
        at: The instant, by the home's clock.
        verdicts: The newest check, and those of the same model just before it, newest first; at most `CHECKS`.
        decisions: How many decisions there were, by action and cause.
        alerts: Names of the alerts that the monitor fires.
        ended: When the newest run of each outcome ended.
        missed: Regular slots that went by without a run; None where nothing was run for long, or ever.
        problems: What could not be read, by source; one sentence each.
    """

    at: datetime
    verdicts: tuple[DriftVerdict, ...] = ()
    decisions: Mapping[tuple[str, str], int] = field(default_factory=dict)
    alerts: frozenset[str] = frozenset()
    ended: Mapping[str, datetime] = field(default_factory=dict)
    missed: int | None = None
    problems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class HomeState:
    """Reads the state of one home again and again; what did not change on disk is not read twice.

    Args:
        settings: The home.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._checks = _Files(_verdict)
        self._runs = _Files(_run)
        self._alerts = _Files(_alerts)
        self._firing: frozenset[str] = frozenset()
        self._log = _DecisionLog(settings.monitoring / "decisions.jsonl")

    def read(self) -> State:
        """The state now."""
        now = self._settings.clock()
        problems: dict[str, list[str]] = {source: [] for source in SOURCES}
        verdicts = self._verdicts(now, problems["checks"])
        ended, missed = self._read_runs(now, problems["runs"])
        return State(
            at=now,
            verdicts=verdicts,
            decisions=self._log.read(problems["decisions"]),
            alerts=self._read_alerts(problems["alerts"]),
            ended=ended,
            missed=missed,
            problems={source: tuple(found) for source, found in problems.items()},
        )

    def _verdicts(self, now: datetime, problems: list[str]) -> tuple[DriftVerdict, ...]:
        """The newest whole verdicts; a check that is under way has none yet, which is no problem."""
        root = self._settings.monitoring / "checks"
        names = [name for name in _names(root, problems) if NAME.fullmatch(name)]
        believed = [name for name in names if name <= stamp(now + CLOCK_SKEW)]
        if len(believed) < len(names):
            problems.append(
                f"{len(names) - len(believed)} checks lie in the future, up to {max(names)}: a clock is wrong"
            )
        paths = [root / name / "drift.json" for name in heapq.nlargest(LOOK_BACK, believed)]
        self._checks.keep(paths)
        found: list[DriftVerdict] = []
        for path in paths:
            verdict = self._checks.get(path, problems)
            if verdict is None:
                continue
            if found and verdict.model_version != found[0].model_version:
                break
            found.append(verdict)
            if len(found) == CHECKS:
                break
        return tuple(found)

    def _read_runs(self, now: datetime, problems: list[str]) -> tuple[dict[str, datetime], int | None]:
        root = self._settings.runs
        paths = [root / name / "result.json" for name in sorted(_names(root, problems))]
        self._runs.keep(paths)
        found = [run for path in paths if (run := self._runs.get(path, problems))]
        runs = [run for run in found if run.ended - now <= CLOCK_SKEW]
        if len(runs) < len(found):
            problems.append(f"{len(found) - len(runs)} runs ended in the future: a clock is wrong")
        ended = {run.outcome: run.ended for run in sorted(runs, key=lambda run: run.ended)}
        newest = max((run.as_of for run in runs if run.trained), default=None)
        if newest is None or now - newest > SLOT_MEMORY:
            return ended, None
        return ended, len([slot for slot in slots(newest, now - SLOT_GRACE) if slot > newest])

    def _read_alerts(self, problems: list[str]) -> frozenset[str]:
        """What fires; while the file is damaged, what fired when it was whole."""
        path = self._settings.monitoring / "alerts.json"
        before = len(problems)
        read = self._alerts.get(path, problems)
        if len(problems) == before:
            self._firing = read or frozenset()
        return self._firing


def instant(text: str) -> datetime:
    """An ISO instant in UTC; one without a zone is taken as UTC."""
    found = datetime.fromisoformat(text)
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


class _Files(Generic[T]):
    """Parsed files, each parsed again only when it changed; the reason is kept likewise for those that are damaged."""

    def __init__(self, parse: Callable[[bytes], T]) -> None:
        self._parse = parse
        self._held: dict[Path, tuple[tuple[int, int, int], T | None, str]] = {}

    def get(self, path: Path, problems: list[str]) -> T | None:
        """The value of a file, None where it is absent or damaged; the latter is added to `problems`."""
        try:
            stat = path.stat()
            signature = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            held = self._held.get(path)
            if held is None or held[0] != signature:
                held = self._held[path] = (signature, *self._read(path))
        except FileNotFoundError:
            self._held.pop(path, None)
            return None
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
            return None
        if held[2]:
            problems.append(held[2])
        return held[1]

    def keep(self, paths: list[Path]) -> None:
        """Forget all but these files."""
        for path in self._held.keys() - set(paths):
            del self._held[path]

    def _read(self, path: Path) -> tuple[T | None, str]:
        try:
            return self._parse(path.read_bytes()), ""
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return None, f"{path} is damaged ({error})"


@dataclass(frozen=True)
class _Run:
    as_of: datetime
    outcome: str
    ended: datetime
    trained: bool  # what bad data held trained nothing: its slot is still to be done


class _DecisionLog:
    """Counts of the decisions; only what was appended since the last look is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget(0)

    def read(self, problems: list[str]) -> Mapping[tuple[str, str], int]:
        """Counts by action and cause; a last line without an end is still being written."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:  # thinned, or begun anew
                    self._forget(stat.st_ino)
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._forget(0)
            return {}
        except OSError as error:
            problems.append(f"{self._path} cannot be read ({error.strerror})")
            return self._counts
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            self._count(line)
        if self._damaged:
            problems.append(f"{self._damaged} lines of {self._path} are no decisions")
        return self._counts

    def _count(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if "taken" not in entry and "claimed" not in entry:
                self._counts[str(entry["action"]), str(entry.get("cause") or "")] += 1
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._damaged += 1

    def _forget(self, inode: int) -> None:
        self._inode, self._offset, self._damaged = inode, 0, 0
        self._counts: Counter[tuple[str, str]] = Counter()


def _names(directory: Path, problems: list[str]) -> list[str]:
    try:
        with os.scandir(directory) as entries:  # by name alone: a Path for each of a year's checks would take longer
            return [entry.name for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{directory} cannot be read ({error.strerror})")
        return []


def _verdict(data: bytes) -> DriftVerdict:
    verdict = DriftVerdict.from_json(data.decode())
    instant(verdict.as_of), instant(verdict.slot)  # or it is damaged
    return verdict


def _alerts(data: bytes) -> frozenset[str]:
    """Names of what fires."""
    return frozenset(json.loads(data)["firing"].keys())


def _run(data: bytes) -> _Run:
    found = json.loads(data)
    trained = found.get("version") != ""
    return _Run(instant(found["as_of"]), str(found["outcome"]), instant(found["finished_at"]), trained)
