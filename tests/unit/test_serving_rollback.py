"""What a rollback rests on: who still asks for it, what serves, and decisions that cannot cross."""

import os
import sys
import threading

import pytest

from evergreen.overview import _brief
from evergreen.settings import Settings
from serving.agreement import ADOPTED, PROMOTED, Agreement, Order
from serving.files import write_json
from serving.gateway import Backend, Routing
from serving.laptop_plane import LaptopPlane
from serving.plane import Serving
from serving.registry import Registry
from serving.rollback import stopped


def test_rollback_that_was_killed_stops_no_canary_not_even_when_its_number_is_given_anew(tmp_path):
    settings = Settings(home=tmp_path)
    assert not stopped(settings)
    for asked in ({"pid": os.getpid(), "started": 1.0}, {"pid": 2**22 + 1, "started": 1.0}):
        write_json(settings.serving / "stop.json", asked)
        assert not stopped(settings)


def test_ledger_begins_once_however_many_find_it_empty(tmp_path):
    agreement = Agreement(tmp_path)
    agreement.decide(ADOPTED, "1", "the ledger begins", Order(), "1", "")
    agreement.decide(PROMOTED, "2", "better", Order(), "2", "1")
    agreement.decide(ADOPTED, "1", "the ledger begins", Order(), "1", "")  # looked before, writes after
    assert (agreement.now().champion, len(agreement.decisions())) == ("2", 2)


def test_decision_rests_on_what_is_agreed_when_it_is_written(tmp_path, monkeypatch):
    agreement, other = Agreement(tmp_path), Agreement(tmp_path)
    agreement.decide(PROMOTED, "1", "first", Order(), "1", "")
    append, threads = agreement.ledger.append, []

    def slow(entry):
        threads.append(threading.Thread(target=other.decide, args=("refused", "9", "no")))
        threads[0].start()
        threads[0].join(0.2)
        return append(entry)

    monkeypatch.setattr(agreement.ledger, "append", slow)
    agreement.decide(PROMOTED, "2", "better", Order(), "2", "1")
    threads[0].join()
    assert [(d["decision"], d["champion"]) for d in agreement.decisions()][1:] == [("promoted", "2"), ("refused", "2")]


@pytest.fixture
def plane(tmp_path):
    settings = Settings(home=tmp_path)
    plane = LaptopPlane(settings, Registry(settings))
    yield plane
    plane.processes.stop_all()


def test_champion_whose_process_died_does_not_serve(plane):
    for name in ("gateway", "predictor-1"):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        plane.processes.start(name, command, ready="http://127.0.0.1:1", ports={})
    routing = Routing(Backend("1", 1), Backend("2", 2), 10)
    plane.gateway._write(type(plane.gateway._load())(1, routing))
    assert plane.serving() == Serving("1", "2", 10)
    plane.processes.stop("predictor-1")
    assert plane.serving() == Serving("", "2", 10)


def test_run_of_the_last_release_whose_canary_said_less_is_shown():
    step = {"percent": 10, "verdict": "pass", "requests": 60, "errors": 0, "p50_ms": 1.0, "p99_ms": 2.0, "reason": "ok"}
    names = ("as_of", "run_key", "reason", "strategy", "champion", "version", "outcome", "finished_at")
    gate = dict.fromkeys(("verdict", "reason", "requests", "metrics"))
    told = _brief({**dict.fromkeys(names), "gate": gate, "rollout": {"steps": [step]}})
    assert told["canary"] == [step | {"looks": None, "pairs": None}]
