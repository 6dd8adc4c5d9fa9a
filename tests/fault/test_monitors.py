"""Monitors as real processes: two at once, killed anywhere, with a receiver that is down."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from evergreen.settings import Settings
from monitoring import notify, webhook
from monitoring.decisions import LOG
from monitoring.notify import Alerts, raise_alerts
from monitoring.trigger import Situation, claim, decide, history, pending, take
from tests.alert_receiver import receiving
from tests.verdicts import AS_OF, verdict

AGE = ("age",)
CALM = Situation(next_slot=AS_OF + timedelta(days=400))
MISSED = replace(CALM, missed_slot=AS_OF - timedelta(hours=9))
ROUNDS = 60
fork = multiprocessing.get_context("fork")  # processes of their own, without two seconds of imports for each


def check(home, hours, situation, who, **changes):
    """One monitor: the decision, the alerts, and whether it may start the retrain."""
    found, before = verdict(hours, AGE, **changes), [verdict(hours - 1, AGE)]
    decision = decide(found, before, situation, home.monitoring)
    raise_alerts(home, found, before, decision, situation)
    return claim(decision, situation, home.monitoring, who)


def monitor(root, url, barrier, started, number):
    """In each round of the four kinds, both monitors come at once."""
    for turn in range(ROUNDS):
        home = Settings(home=root / str(turn), alert_url=url)
        changes = [
            {},  # the same check twice
            {"rows": (40_000, 20_000 + number)},  # two looks at the same instant
            {},
            {},
        ][turn % 4]
        hours = number / 3600 if turn % 4 == 2 else 0  # clocks a second apart
        situation = MISSED if turn % 4 == 3 else CALM
        barrier.wait(60)
        if check(home, hours, situation, f"run {number}", **changes):
            started.put(turn)
    started.put(None)


def test_two_monitors_at_once_start_one_retrain_and_tell_once(tmp_path):
    with receiving() as receiver:
        barrier, started = fork.Barrier(2), fork.Queue()
        processes = [fork.Process(target=monitor, args=(tmp_path, receiver.url, barrier, started, n)) for n in range(2)]
        for process in processes:
            process.start()
        turns, ended = [], 0
        while ended < 2:
            turn = started.get(timeout=60)
            turns, ended = (turns, ended + 1) if turn is None else ([*turns, turn], ended)
        for process in processes:
            process.join(60)
        assert [p.exitcode for p in processes] == [0, 0]
        assert sorted(turns) == list(range(ROUNDS))
        assert receiver.names() == [["EvergreenDrift"]] * ROUNDS
    for turn in range(ROUNDS):
        made = history(tmp_path / str(turn) / "monitoring")
        assert [d.action for d in made].count("retrain") == 1
        assert len(made) == (1 if turn % 4 in (0, 3) else 2)


def killed_in(step, root, url):
    """A monitor that is killed (-9) when it comes to a step."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    where, name = step
    setattr(where, name, die)
    check(Settings(home=root, alert_url=url), 0, CALM, "run 1")


@pytest.mark.parametrize(
    "step",
    [(notify, "alerts_of"), (notify, "deliver"), (notify, "write_text")],
    ids=["between decision and alert", "before it is delivered", "before it is noted"],
)
def test_monitor_killed_after_its_decision_alerts_when_the_check_runs_again(tmp_path, step):
    with receiving() as receiver:
        process = fork.Process(target=killed_in, args=(step, tmp_path, receiver.url))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        home = Settings(home=tmp_path, alert_url=receiver.url)
        assert receiver.got == []
        assert pending(home.monitoring) is not None  # decided
        assert check(home, 0, CALM, "run 1")
        assert receiver.names() == [["EvergreenDrift"]]
        assert len(history(home.monitoring)) == 1


def test_monitor_killed_after_delivery_tells_twice_rather_than_never(tmp_path):
    def deliver_and_die(url, body):
        assert webhook.deliver(url, body) == ""
        os.kill(os.getpid(), signal.SIGKILL)

    def run(url):
        notify.deliver = deliver_and_die
        check(Settings(home=tmp_path, alert_url=url), 0, CALM, "run 1")

    with receiving() as receiver:
        process = fork.Process(target=run, args=(receiver.url,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        check(Settings(home=tmp_path, alert_url=receiver.url), 1, CALM, "run 2")
        assert receiver.names() == [["EvergreenDrift"]] * 2
        assert len({body["alerts"][0]["fingerprint"] + body["alerts"][0]["startsAt"] for body in receiver.got}) == 1


def check_for_ever(home, first):
    for hour in range(first, 10_000_000):
        check(home, hour, CALM, "run")
        if hour % 3 == 0:
            take(home.monitoring)


def lines(home):
    log = home.monitoring / LOG
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_kill_at_any_moment_leaves_a_log_and_alerts_that_read(tmp_path, caplog):
    home, hours = Settings(home=tmp_path), 0
    for trial in range(8):
        process, before = fork.Process(target=check_for_ever, args=(home, hours)), lines(home)
        process.start()
        while lines(home) < before + 3:  # it is at work
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(0.013 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        made = history(home.monitoring)
        hours = len(made)
        assert [d.as_of for d in made] == [verdict(hour).as_of for hour in range(hours)]
        early = [d.instant for d in made if d.early]
        assert all(b - a >= timedelta(hours=36) for a, b in zip(early, early[1:], strict=False))
        assert [a.name for a in Alerts.of(home).firing()] == ["EvergreenDrift"]
    assert hours > 8
    assert caplog.messages == []


def test_receiver_that_is_down_then_up_costs_a_line_and_loses_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(webhook, "PAUSE", 0.01)
    with receiving() as receiver:
        url, port = receiver.url, receiver.port
    home = Settings(home=tmp_path, alert_url=url)
    assert check(home, 0, CALM, "run 1")  # the check and its retrain go on
    check(home, 1, replace(CALM, held=2), "run 2")
    assert [
        line.startswith(f"{n} alerts wait for the next check: the receiver 127.0.0.1 could not be reached")
        for n, line in enumerate(caplog.messages, start=1)
    ] == [True, True]
    with receiving(port) as receiver:
        check(home, 2, replace(CALM, held=2), "run 3")
        check(home, 3, replace(CALM, held=2), "run 4")
        assert receiver.names() == [["EvergreenHeldTwice", "EvergreenDrift"]]
        assert {a["startsAt"] for a in receiver.got[0]["alerts"]} == {verdict(0).as_of, verdict(1).as_of}


def test_damaged_alerts_do_not_stop_a_check_and_are_told_again(tmp_path, caplog):
    with receiving() as receiver:
        home = Settings(home=tmp_path, alert_url=receiver.url)
        check(home, 0, CALM, "run 1")
        (home.monitoring / "alerts.json").write_bytes(b'{"firing": {"Everg')
        check(home, 1, CALM, "run 2")
        assert receiver.names() == [["EvergreenDrift"]] * 2
    assert len(caplog.messages) == 1
