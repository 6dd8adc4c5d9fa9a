"""Webhooks on their way to the promoter: lost, doubled, reordered, forged, replayed, late; all is decided once.

Receiver, watch, registry, ledger, rollout and judge are the real ones; the data plane is a file. Where nothing is said
of polling the promoter would poll in ten minutes: only a webhook wakes it.
"""

import contextlib
import json
import threading
import time

import pytest

from serving import promoter as process
from serving.processes import free_port
from serving.promoter import watch
from serving.webhook import SECRET, WINDOW, Hooks
from tests.promoter_kills import quick_registry
from tests.promoter_lab import NUMBER, Home
from tests.unit.test_serving_webhook import headers, post

NEVER = 600.0  # seconds between two polls where a test is about webhooks
PATIENCE = 30.0  # seconds that a test waits for what must come


class Stopped(BaseException):
    """Ends `watch`, which ends for nothing else."""


class Running:
    """A promoter that watches in a thread, and its receiver; `looks` counts what it looked.

    Args:
        home: The home.
        monkeypatch: Sets how often it polls.
    """

    def __init__(self, home: Home, monkeypatch: pytest.MonkeyPatch, poll: float = NEVER) -> None:
        monkeypatch.setattr(process, "POLL", poll)
        self._wake, self._stop = threading.Event(), False
        self.settings = home.settings.model_copy(update={"promoter_port": free_port()})
        self.looks, self.woken, self.deciding, self.go_on = 0, 0, threading.Event(), threading.Event()
        self.go_on.set()
        self._promoter = home.promoter(self._before_look)
        state = {"acting": True, "problem": ""}
        Hooks(self.settings, self._woken, lambda: state).start()
        self._thread = threading.Thread(target=self._watch, args=(state,))
        self._thread.start()
        self.seen(1)

    def reconcile(self) -> None:
        """A look; the promoter's own, counted."""
        if self._stop:
            raise Stopped
        self._promoter.reconcile()
        self.looks += 1

    def seen(self, looks: int) -> None:
        """Wait until it has looked so often."""
        until(lambda: self.looks >= looks)

    def deliver(self, alias: str, name: str, delivery: str, **spoiled) -> int:
        """Deliver what MLflow says of an alias; returns the status."""
        told = {"name": self.settings.model_name, "alias": alias, "version": NUMBER[name]}
        body = json.dumps({"entity": "model_version_alias", "action": "created", "data": told}).encode()
        known = {"secret": (self.settings.keys / SECRET).read_text(), "at": time.time()}
        given = headers(body=body, delivery=delivery, **(known | spoiled))
        return post(self.settings, given, body)[0]

    def stop(self) -> None:
        self._stop = True
        self.go_on.set()
        self._wake.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _woken(self) -> None:
        self.woken += 1
        self._wake.set()

    def _watch(self, state) -> None:
        with contextlib.suppress(Stopped):
            watch(self, self._wake, state)

    def _before_look(self, percent: int) -> None:
        self.deciding.set()
        self.go_on.wait(PATIENCE)


def until(true) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def made(promoter_home):
    with quick_registry(promoter_home):
        yield promoter_home


@pytest.fixture
def home(made) -> Home:
    return made.begin_again()


@pytest.fixture
def running(home, monkeypatch):
    running = Running(home, monkeypatch)
    yield running
    running.stop()


def ends_as(home: Home, decisions: list[tuple[str, str]], champion: str, previous: str) -> None:
    assert home.decisions() == decisions
    home.assert_agreed(champion, previous)


def test_delivery_makes_it_look_at_once_and_a_second_of_it_not_again(home, running):
    home.set("candidate", "2")
    assert running.deliver("candidate", "2", "d1") == 200
    running.seen(2)
    ends_as(home, [("promoted", "2")], "2", "1")
    assert running.deliver("candidate", "2", "d1") == 409
    assert (running.woken, running.looks) == (1, 2)


def test_doubled_under_two_ids_it_looks_again_and_finds_nothing_to_do(home, running):
    home.set("candidate", "2")
    assert [running.deliver("candidate", "2", delivery) for delivery in ("d1", "d2")] == [200, 200]
    running.seen(2)
    assert running.deliver("candidate", "2", "d3") == 200
    until(lambda: running.looks >= 3)
    ends_as(home, [("promoted", "2")], "2", "1")


def test_lost_delivery_is_found_by_polling(home, monkeypatch):
    running = Running(home, monkeypatch, poll=0.05)
    try:
        home.set("candidate", "2")
        until(lambda: home.registry.aliases().get("candidate") is None)
        running.seen(running.looks + 2)
    finally:
        running.stop()
    assert running.woken == 0
    ends_as(home, [("promoted", "2")], "2", "1")


def test_reordered_deliveries_end_as_what_the_registry_says(home, running):
    home.set("candidate", "2")
    home.set("candidate", "harmful")
    assert running.deliver("candidate", "harmful", "d2") == 200
    running.seen(2)
    assert running.deliver("candidate", "2", "d1") == 200
    running.seen(3)
    ends_as(home, [("rolled back", "harmful")], "1", "7")


def test_forged_stale_and_replayed_deliveries_do_not_wake_it(home, running):
    assert running.deliver("candidate", "2", "d1") == 200  # an old one: what it told of was taken back since
    running.seen(2)
    home.set("candidate", "2")
    refused = [
        running.deliver("candidate", "2", "d1"),
        running.deliver("candidate", "2", "d2", secret="guessed"),
        running.deliver("candidate", "2", "d3", at=time.time() - WINDOW - 60),
    ]
    assert refused == [409, 401, 400]
    assert (running.woken, running.looks) == (1, 2) and home.registry.aliases()["candidate"] == NUMBER["2"]
    assert running.deliver("candidate", "2", "d4") == 200
    running.seen(3)
    ends_as(home, [("promoted", "2")], "2", "1")


def test_delivery_that_comes_after_the_decision_changes_nothing(home, running):
    home.set("candidate", "held")
    running._wake.set()  # it polls just then
    running.seen(2)
    assert running.deliver("candidate", "held", "late") == 200
    running.seen(3)
    ends_as(home, [("refused", "held")], "1", "7")


def test_delivery_in_mid_canary_is_not_lost(home, running):
    running.go_on.clear()
    home.set("candidate", "2")
    running.deliver("candidate", "2", "d1")
    assert running.deciding.wait(PATIENCE)
    home.set("candidate", "held")
    assert running.deliver("candidate", "held", "d2") == 200
    running.go_on.set()
    running.seen(3)
    ends_as(home, [("rolled back", "2"), ("refused", "held")], "1", "7")
