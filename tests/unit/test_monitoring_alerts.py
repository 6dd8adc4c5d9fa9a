"""Alerts: what a check tells, since when, how often, and that it arrives."""

import itertools
import json
import logging
import re
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from monitoring import alerts as rules
from monitoring import notify, webhook
from monitoring.alerts import SEVERITY, alerts_of, stale
from monitoring.decisions import Decision
from monitoring.notify import Alerts, raise_alerts
from monitoring.trigger import Situation
from monitoring.verdict import ServingHealth
from monitoring.webhook import deliver, payload
from tests.alert_receiver import receiving
from tests.verdicts import AS_OF, data_test, outcome, verdict

CALM = Situation(next_slot=AS_OF + timedelta(days=2))
NO = Decision("none", "all is well", "7", AS_OF.isoformat(), "", "c")
MODEL = "homefeed-ranker"


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSE", 0.01)
    with receiving() as server:
        yield server


def told(check, recent=(), decision=NO, situation=CALM):
    return {a.name: a for a in alerts_of(check, recent, decision, situation, MODEL)}


def one(name="EvergreenDrift", hours=0.0):
    """One alert of a check."""
    at = (AS_OF + timedelta(hours=hours)).isoformat()
    return rules._alert(name, MODEL, f"{name} at {hours}", ["the evidence"], at)


def at(hours):
    return AS_OF + timedelta(hours=hours)


# What a check tells.


def test_calm_check_tells_nothing():
    assert told(verdict()) == {}


def test_drift_that_persists_names_features_slices_kind_evidence_and_decision():
    drifted = ("age", "score_save")
    [alert] = told(verdict(0, drifted), [verdict(-1, drifted)]).values()
    assert (alert.name, alert.severity, alert.runbook) == (
        "EvergreenDrift",
        "ticket",
        "docs/runbooks/EvergreenDrift.md",
    )
    assert alert.labels == {"alertname": "EvergreenDrift", "severity": "ticket", "model": MODEL}
    assert alert.summary == "2 columns keep drifting from what version 7 learned, most age"
    assert alert.description.splitlines() == [
        "age (user) scores 0.62, from 0.31 it drifted: median 31 → 44",
        "score_save (prediction) scores 0.62, from 0.31 it drifted: median 31 → 44",
        "Likely kind: population",
        "Evidence: the users are older",
        "Slice: country=nl (age 0.9, 12% of it)",
        "Decision: all is well",
        "Report: checks/20260303T120000/drift.html",
    ]


def test_drift_of_one_check_alone_is_not_told_of():
    assert told(verdict(0, ("age",)), [verdict(-1)]) == {}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"broken": {"age": "is missing in 100 % of the rows"}}, "Broken: age is missing in 100 % of the rows"),
        ({"kind": "broken", "evidence": ("one source alone moved",)}, "Evidence: one source alone moved"),
        ({"data": (data_test(False),)}, "Failed test: 12 rows came, at least 120 are usual"),
    ],
)
def test_broken_data_pages_at_once_and_is_not_told_of_as_drift(changes, line):
    [alert] = told(verdict(0, ("age",), **changes), [verdict(-1, ("age",))]).values()
    assert (alert.name, alert.severity) == ("EvergreenBrokenData", "page")
    assert line in alert.description.splitlines()
    assert alert.summary.removeprefix("The data is broken: ") in line


def test_quality_that_stays_lost_pages():
    lost = outcome(lost=True)
    assert told(verdict(0, outcome=lost), [verdict(-1)]) == {}
    [alert] = told(verdict(0, outcome=lost), [verdict(-2, outcome=lost)]).values()
    assert alert.summary == "Version 7 has lost quality: HIT@3/save is 0.31, 0.40 is expected"
    assert "HIT@3/save: 0.3100" in alert.description


def test_two_held_retrains_page():
    assert told(verdict(), situation=replace(CALM, held=1)) == {}
    assert list(told(verdict(), situation=replace(CALM, held=2))) == ["EvergreenHeldTwice"]


def test_missed_slot_pages_only_when_nothing_catches_it_up():
    missed = replace(CALM, missed_slot=at(-9))
    retrain = replace(NO, action="retrain", cause="slot")
    assert list(told(verdict(), situation=missed)) == ["EvergreenSlotMissed"]
    assert told(verdict(), decision=retrain, situation=missed) == {}
    assert told(verdict(), situation=replace(missed, running="a run")) == {}


def test_skew_between_training_and_serving_is_a_ticket():
    [alert] = told(verdict(skew={"price": "3 of 90 values differ"}, skew_share=0.031)).values()
    assert alert.summary == "Serving reads 1 features otherwise than training in 3.10% of the values"
    assert "price: 3 of 90 values differ" in alert.description
    assert list(told(verdict(skew={"price": "3 of 90 values differ"}))) == ["EvergreenTrainServeSkew"]


def test_late_data_from_its_bound_on():
    assert told(verdict(late=rules.LATE - 1e-9)) == {}
    assert list(told(verdict(late=rules.LATE))) == ["EvergreenLateData"]


WELL = ServingHealth(requests=100, errors=0.0, shed=0.0, fallbacks={}, p50_ms=20.0, p99_ms=90.0, problems=("see",))


@pytest.mark.parametrize(
    ("name", "below", "bound"),
    [
        ("EvergreenServingErrors", {"errors": 0.00999}, {"errors": rules.ERRORS}),
        ("EvergreenServingShed", {"shed": 0.0499}, {"shed": rules.SHED}),
        ("EvergreenServingSlow", {"p99_ms": 499.9}, {"p99_ms": rules.P99_MS}),
        (
            "EvergreenServingFallbacks",
            {"fallbacks": {"cached": 0.03, "popularity": 0.0199}},
            {"fallbacks": {"cached": 0.03, "popularity": 0.02}},
        ),
    ],
)
def test_serving_is_told_of_from_each_bound_on(name, below, bound):
    assert told(verdict(serving=WELL)) == told(verdict(serving=replace(WELL, p99_ms=None))) == {}
    assert told(verdict(serving=replace(WELL, **below))) == {}
    assert list(told(verdict(serving=replace(WELL, **bound)))) == [name]
    assert told(verdict(serving=replace(WELL, requests=rules.SERVED - 1, **bound))) == {}


def test_missing_checks_page_after_three_hours():
    long_ago = at(-999)
    assert stale(None, at(-3), at(0), MODEL, "") == stale(at(-3), long_ago, at(0), MODEL, "") == []
    assert stale(at(-9), at(-3), at(0), MODEL, "") == []  # the machine was off
    [alert] = stale(at(-3.5), long_ago, at(0), MODEL, "the disk is full")
    assert (alert.name, alert.severity) == ("EvergreenCheckStale", "page")
    assert alert.summary == "The newest check of homefeed-ranker is 3.5 h old"
    assert alert.description.startswith("The last try: the disk is full\n")
    [alert] = stale(None, at(-3.5), at(0), MODEL, "")
    assert alert.summary == "The newest check of homefeed-ranker is still to come"


# Since when, and how often.


def test_alert_is_told_when_it_begins_every_four_hours_and_when_it_ends(tmp_path, receiver):
    alerts = Alerts(tmp_path / "alerts.json", MODEL, receiver.url)
    alerts.update([one()], at(0))
    alerts.update([one(hours=1)], at(1))
    alerts.update([one(hours=4)], at(4) - timedelta(seconds=1))
    assert receiver.names() == [["EvergreenDrift"]]
    alerts.update([one(hours=4)], at(4))
    assert receiver.names() == [["EvergreenDrift"]] * 2
    assert receiver.got[1]["alerts"][0]["startsAt"] == AS_OF.isoformat()
    assert receiver.got[1]["alerts"][0]["annotations"]["summary"] == "EvergreenDrift at 4"  # the newest words
    alerts.update([], at(5))
    assert len(receiver.got) == 2
    alerts.update([], at(6))
    [ended] = receiver.got[2]["alerts"]
    assert (receiver.got[2]["status"], ended["status"], ended["endsAt"]) == ("resolved", "resolved", at(5).isoformat())
    assert len({body["alerts"][0]["fingerprint"] for body in receiver.got}) == 1
    alerts.update([], at(7))
    assert len(receiver.got) == 3


def test_alert_that_comes_and_goes_is_told_of_once(tmp_path, receiver):
    alerts = Alerts(tmp_path / "alerts.json", MODEL, receiver.url)
    for hours in range(0, 4, 2):
        alerts.update([one()], at(hours))
        alerts.update([], at(hours + 1))
        alerts.update([], at(hours + 1))  # the same check again is not a second one
    assert receiver.names() == [["EvergreenDrift"]]


def test_new_alert_brings_all_that_fire_pages_first(tmp_path, receiver):
    alerts = Alerts(tmp_path / "alerts.json", MODEL, receiver.url)
    alerts.update([one()], at(0))
    alerts.update([one(), one("EvergreenBrokenData")], at(1))
    assert receiver.names() == [["EvergreenDrift"], ["EvergreenBrokenData", "EvergreenDrift"]]
    assert [a.name for a in alerts.firing()] == ["EvergreenBrokenData", "EvergreenDrift"]


def test_alert_beside_the_checks_lets_the_others_fire_until_a_check_ends_it(tmp_path, receiver):
    alerts = Alerts(tmp_path / "alerts.json", MODEL, receiver.url)
    alerts.update([one()], at(0))
    alerts.add([one("EvergreenCheckStale")], at(4))
    assert receiver.names()[-1] == ["EvergreenCheckStale", "EvergreenDrift"]
    alerts.update([one()], at(5))
    alerts.update([one()], at(6))
    assert receiver.names("resolved")[-1] == ["EvergreenCheckStale"]


def test_older_check_that_is_run_again_changes_nothing(tmp_path):
    alerts = Alerts(tmp_path / "alerts.json", MODEL)
    alerts.update([one()], at(2))
    alerts.update([one("EvergreenBrokenData")], at(2) - timedelta(seconds=1))
    assert [a.name for a in alerts.firing()] == ["EvergreenDrift"]
    alerts.update([one("EvergreenLateData")], at(2))  # the same instant, looked at again
    assert [a.name for a in alerts.firing()] == ["EvergreenDrift", "EvergreenLateData"]
    alerts.update([one("EvergreenBrokenData")], at(0), now=at(0))  # the clock had run ahead, and was set right
    assert "EvergreenBrokenData" in [a.name for a in alerts.firing()]


def test_check_with_a_wrong_clock_changes_no_alert(tmp_path):
    home = Settings(home=tmp_path)
    check = verdict(0, broken={"age": "is gone"})
    raise_alerts(home, check, [], replace(NO, skewed=True), CALM)
    assert Alerts.of(home).firing() == []
    raise_alerts(home, check, [], NO, CALM)
    assert [a.name for a in Alerts.of(home).firing()] == ["EvergreenBrokenData"]


def test_damaged_file_is_set_aside_with_one_line_and_begun_anew(tmp_path, caplog):
    path = tmp_path / "alerts.json"
    Alerts(path, MODEL).update([one()], at(0))
    whole = path.read_text()
    for damaged in (whole[:50], "[]", '{"firing": {"x": {}}}', whole.replace("2026", "20x6"), "\x00" * 40):
        path.write_text(damaged)
        caplog.clear()
        Alerts(path, MODEL).update([one()], at(1))
        [line] = caplog.messages
        assert "alerts.json was damaged" in line and "set aside as alerts.json.damaged" in line
        assert (tmp_path / "alerts.json.damaged").read_text() == damaged
        assert [a.name for a in Alerts(path, MODEL).firing()] == ["EvergreenDrift"]


def test_file_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvergreenError, match="alerts in .* cannot be written"):
        Alerts(tmp_path / "file" / "alerts.json", MODEL).update([], at(0))


# Delivery.


@pytest.mark.parametrize("status", [500, 503, 429])
def test_receiver_that_fails_is_asked_three_times_and_gets_it_with_the_next_check(tmp_path, receiver, caplog, status):
    alerts = Alerts(tmp_path / "alerts.json", MODEL, receiver.url)
    receiver.answer = status
    alerts.update([one()], at(0))
    assert receiver.asked == webhook.ATTEMPTS
    [line] = caplog.messages
    assert line == f"1 alerts wait for the next check: the receiver 127.0.0.1 answered {status}"
    receiver.answer = 200
    alerts.update([one()], at(1))
    alerts.update([one()], at(2))
    assert receiver.names() == [["EvergreenDrift"]]


@pytest.mark.parametrize("status", [302, 307, 400, 404])
def test_refusal_and_redirect_are_not_tried_again_before_the_next_check(tmp_path, receiver, status):
    with receiving() as elsewhere:
        receiver.answer, receiver.location = status, elsewhere.url
        Alerts(tmp_path / "alerts.json", MODEL, receiver.url).update([one()], at(0))
        assert (receiver.asked, elsewhere.asked) == (1, 0)


def test_alert_that_ended_while_the_receiver_was_down_is_told_all_the_same(tmp_path, receiver):
    alerts = Alerts(tmp_path / "alerts.json", MODEL, receiver.url)
    receiver.answer = 500
    for hours, found in enumerate([[one()], [], [], [one(hours=3)]]):
        alerts.update(found, at(hours))
    receiver.answer = 200
    alerts.update([one(hours=4)], at(4))
    [body] = receiver.got
    assert [(a["status"], a["startsAt"]) for a in body["alerts"]] == [
        ("firing", at(3).isoformat()),
        ("resolved", at(0).isoformat()),
    ]


def test_receiver_that_is_gone_for_ever_does_not_fill_the_disk(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(webhook, "ATTEMPTS", 1)
    monkeypatch.setattr(notify, "WAITING", 3)
    alerts = Alerts(tmp_path / "alerts.json", MODEL, "http://127.0.0.1:1/")
    for hours in range(0, 3 * 5, 3):
        alerts.update([one(hours=hours)], at(hours))
        alerts.update([], at(hours + 1))
        alerts.update([], at(hours + 2))
    waiting = json.loads((tmp_path / "alerts.json").read_text())["waiting"]
    assert [a["starts_at"] for a in waiting] == [at(hours).isoformat() for hours in (6, 9, 12)]
    assert any("more than 3 wait" in line for line in caplog.messages)


def test_slow_and_dead_receivers_cost_a_few_attempts_and_one_line(receiver, monkeypatch):
    monkeypatch.setattr(webhook, "PATIENCE", 0.2)
    receiver.pause = 1.0
    assert deliver(receiver.url, {}) == "127.0.0.1 did not answer in 0.2 s"
    assert receiver.asked <= webhook.ATTEMPTS
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        problem = deliver(f"http://127.0.0.1:{taken.getsockname()[1]}/", {})
    assert re.fullmatch(r"127.0.0.1 could not be reached \(Client\w+Error\)", problem)


def test_receiver_that_drips_its_answer_is_cut_off(monkeypatch):
    """Each byte comes in time, the whole never does: the connection ends before it."""
    monkeypatch.setattr(webhook, "PATIENCE", 0.3)
    monkeypatch.setattr(webhook, "ATTEMPTS", 1)
    sent = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection:
                try:
                    for byte in itertools.chain(b"HTTP/1.1 200 OK\r\nX-Slow: ", itertools.repeat(ord("a"))):
                        connection.sendall(bytes([byte]))
                        sent.append(byte)
                        time.sleep(0.05)
                except OSError:
                    pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        problem = deliver(f"http://127.0.0.1:{server.getsockname()[1]}/", {})
        assert problem == "127.0.0.1 did not answer in 0.3 s"
        thread.join(60)
        assert sent and not thread.is_alive()


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://hooks.example.com/s3cret", "hooks.example.com is not on loopback, no service of the cluster and not"),
        ("http://bridge.svc.example.com/s3cret", "bridge.svc.example.com is not on loopback"),
        ("http://xsvc/s3cret", "xsvc is not on loopback"),
        ("http://bridge.monitoring.svc@example.com/s3cret", "example.com is not on loopback"),
        # Services of a cluster are spoken to; nobody here knows the name.
        ("http://bridge.monitoring.svc:1/s3cret", "bridge.monitoring.svc could not be reached"),
        ("http://bridge.monitoring.svc.cluster.local:1/s3cret", "bridge.monitoring.svc.cluster.local could not be"),
        ("http://127.0.0.1.example.com/s3cret", "127.0.0.1.example.com is not on loopback"),
        ("http://127.0.0.1@example.com/s3cret", "example.com is not on loopback"),
        ("ftp://example.com/s3cret", "the address (EVERGREEN_ALERT_URL) is not an http or https URL"),
        ("s3cret", "the address (EVERGREEN_ALERT_URL) is not an http or https URL"),
        ("http://[s3cret", "the address (EVERGREEN_ALERT_URL) is not an http or https URL"),
        ("https://127.0.0.1:99999/s3cret", "127.0.0.1 could not be reached"),
        ("https://127.0.0.1:1/s3cret", "127.0.0.1 could not be reached"),
    ],
)
def test_address_that_cannot_be_used_is_said_without_its_secret(monkeypatch, caplog, url, line):
    monkeypatch.setattr(webhook, "PAUSE", 0.001)
    with caplog.at_level(logging.DEBUG):
        problem = deliver(url, {})
    assert problem.startswith(line)
    assert "s3cret" not in problem + caplog.text


def test_secret_of_the_address_is_in_no_log_no_file_and_no_settings_text(tmp_path, receiver, caplog):
    home = Settings(home=tmp_path, alert_url=receiver.url)
    with caplog.at_level(logging.DEBUG):
        for hours, answer in enumerate((500, 200)):
            receiver.answer = answer
            raise_alerts(home, verdict(hours, broken={"age": "is gone"}), [], NO, CALM)
    assert receiver.got
    assert "a-secret" in home.alert_url
    assert "a-secret" not in caplog.text + repr(home) + (home.monitoring / "alerts.json").read_text()


def test_payload_of_no_and_of_several_alerts():
    assert payload([], MODEL)["status"] == "resolved"
    two = [{**vars(one(name)), "ends_at": ""} for name in ("EvergreenDrift", "EvergreenLateData")]
    body = payload(two, MODEL)
    assert body["commonLabels"] == {"severity": "ticket", "model": MODEL}
    assert body["commonAnnotations"] == {"description": "the evidence"}


def test_every_alert_has_a_severity():
    assert set(SEVERITY.values()) == {"page", "ticket"}
    assert len(SEVERITY) == 12
