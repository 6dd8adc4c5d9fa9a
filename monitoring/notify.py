"""Which alerts fire, since when, and what the receiver knows of it: kept in `alerts.json`.

An alert is the same alert by its labels. The receiver is told when one begins, every `REPEAT` while it lasts, and when
it ends. What could not be delivered waits in the file and goes with the next check: everything is told at least once.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

from engagement.errors import EvergreenError
from engagement.files import write_text
from evergreen.settings import Settings
from monitoring.alerts import Alert, alerts_of
from monitoring.trigger import CLOCK_AHEAD, Decision, Situation
from monitoring.verdict import DriftVerdict
from monitoring.webhook import deliver, payload

REPEAT = timedelta(hours=4)
"""The receiver is told again of what fires **≥** this after it was told last."""

WAITING = 200
"""Of what ended while the receiver could not be reached, so many alerts (the newest, **≤**) wait for it."""

_log = logging.getLogger("evergreen.monitoring")


def raise_alerts(
    settings: Settings,
    verdict: DriftVerdict,
    recent: Sequence[DriftVerdict],
    decision: Decision,
    situation: Situation,
) -> None:
    """Bring the alerts to what a check found, and tell the receiver; a receiver that fails costs one line.

    A check whose clock cannot be trusted changes no alert.

    Raises:
        EvergreenError: The file of alerts cannot be written.
    """
    if decision.skewed:
        return
    found = alerts_of(verdict, recent, decision, situation, settings.model_name)
    Alerts.of(settings).update(found, datetime.fromisoformat(verdict.as_of), situation.now)


class Alerts:
    """The alerts of one home.

    Args:
        path: The file.
        model: Name of the model, which they are grouped by.
        url: Where they are delivered; empty: nowhere.
    """

    def __init__(self, path: Path, model: str, url: str = "") -> None:
        self._path, self._model, self._url = path, model, url

    @classmethod
    def of(cls, settings: Settings) -> "Alerts":
        """Those of a home."""
        return cls(settings.monitoring / "alerts.json", settings.model_name, settings.alert_url)

    def update(self, alerts: Sequence[Alert], at: datetime, now: datetime | None = None) -> None:
        """Bring the file to what a check found, then deliver.

        An alert ends when two checks running, at two instants, are without it: one that comes and goes with every
        other check is told of once. A check older than the newest that was told of changes nothing.

        Args:
            alerts: All that a check has to tell.
            at: Instant of the check.
            now: The clock: a newest check that lies ahead of it came from a wrong one, and is not believed.

        Raises:
            EvergreenError: The file cannot be written.
        """
        with self._held() as state:
            newest = state["newest"] and datetime.fromisoformat(state["newest"])
            believed = newest and (now is None or newest <= now + CLOCK_AHEAD)
            if not (believed and at < newest):
                _fire(state, alerts)
                _end(state, {a.name for a in alerts}, at, bool(self._url))
                state["newest"] = at.isoformat()
                self._write(state)
            self._deliver(state, at)

    def add(self, alerts: Sequence[Alert], at: datetime) -> None:
        """Let alerts fire beside those that do, then deliver; for what no check can find. Checks end them.

        Raises:
            EvergreenError: The file cannot be written.
        """
        with self._held() as state:
            _fire(state, alerts)
            self._write(state)
            self._deliver(state, at)

    def firing(self) -> list[Alert]:
        """What fires now, pages first."""
        with self._held() as state:
            return [_alert(held) for held in _ordered(state["firing"].values())]

    @contextmanager
    def _held(self) -> Iterator[dict[str, Any]]:
        """The state; nobody else has it meanwhile."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_name(f".{self._path.name}.lock")):
                yield self._read()
        except OSError as error:
            problem = f"the alerts in {self._path} cannot be written ({error})"
            raise EvergreenError(problem, "Free the disk or set another home") from error

    def _read(self) -> dict[str, Any]:
        """The state; a damaged file is set aside, as the next check finds again what fires."""
        try:
            return _state(self._path.read_bytes())
        except FileNotFoundError:
            return _state(b"{}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            with suppress(FileNotFoundError):
                self._path.replace(aside)
            _log.warning("%s was damaged (%s): set aside as %s, begun anew", self._path, error, aside.name)
            return _state(b"{}")

    def _write(self, state: dict[str, Any]) -> None:
        write_text(self._path, json.dumps(state, indent=1, sort_keys=True))

    def _deliver(self, state: dict[str, Any], at: datetime) -> None:
        """Tell the receiver what it should know by now; what it did not take stays to be told."""
        firing = state["firing"]
        due = state["waiting"] or any(_due(held, at) for held in firing.values())
        if not self._url or not due:
            return
        told = [*_ordered(firing.values()), *state["waiting"]]
        problem = deliver(self._url, payload(told, self._model))
        if problem:
            _log.warning("%d alerts wait for the next check: the receiver %s", len(told), problem)
            return
        state["waiting"] = []
        for held in firing.values():
            held["told_at"] = at.isoformat()
        self._write(state)


def _fire(state: dict[str, Any], alerts: Sequence[Alert]) -> None:
    """Alerts that begin, and newer words for those that last."""
    for alert in alerts:
        before = state["firing"].get(alert.name, {"starts_at": alert.starts_at, "told_at": ""})
        kept = {"starts_at": before["starts_at"], "told_at": before["told_at"], "missing_since": "", "ends_at": ""}
        state["firing"][alert.name] = {**asdict(alert), **kept}


def _end(state: dict[str, Any], found: set[str], at: datetime, wait: bool) -> None:
    """Alerts that two checks running are without; they wait to be told of if there is a receiver."""
    for name in sorted(state["firing"].keys() - found):
        held = state["firing"][name]
        if not held["missing_since"]:
            held["missing_since"] = at.isoformat()
        elif at > datetime.fromisoformat(held["missing_since"]):
            del state["firing"][name]
            if wait:
                state["waiting"].append({**held, "ends_at": held["missing_since"]})
    lost = len(state["waiting"]) - WAITING
    if lost > 0:
        _log.warning("%d alerts that ended are not told of: more than %d wait for the receiver", lost, WAITING)
        del state["waiting"][:lost]


def _due(held: dict[str, Any], at: datetime) -> bool:
    """Whether the receiver must be told of what fires; a clock that was set back counts as time that passed."""
    return not held["told_at"] or abs(at - datetime.fromisoformat(held["told_at"])) >= REPEAT


def _ordered(held: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(held, key=lambda a: (a["severity"], a["name"]))


def _state(data: bytes) -> dict[str, Any]:
    """What the file holds: `firing` by name, what ended and was not told of, the newest check's instant."""
    found = {"firing": {}, "waiting": [], "newest": "", **json.loads(data)}
    for held in [*found["firing"].values(), *found["waiting"]]:
        alert = _alert(held)
        stamps = [alert.starts_at, *(held[name] for name in ("told_at", "missing_since", "ends_at") if held[name])]
        for stamp in stamps:
            datetime.fromisoformat(stamp)
    return found


def _alert(held: dict[str, Any]) -> Alert:
    return Alert(**{f.name: held[f.name] for f in fields(Alert)})
