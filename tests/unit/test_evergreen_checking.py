"""What `evergreen monitor` prints: enough to know what to do, whatever names the data holds."""

import json
from dataclasses import asdict, replace
from datetime import datetime

import pytest

from evergreen import checking, view
from evergreen.settings import Settings
from monitoring.alerts import alerts_of
from monitoring.notify import Alerts
from monitoring.trigger import Decision, Situation
from monitoring.verdict import DriftVerdict
from tests.verdicts import AS_OF, outcome, verdict

NOTHING = Decision("none", "0 of 3 columns drifted", "7", AS_OF.isoformat(), "key", "check")
ASKED = replace(NOTHING, action="retrain", reason="Drift persists", cause="drift", retrain_as_of=AS_OF.isoformat())


@pytest.fixture
def check(tmp_path):
    """Puts a check, its decision and its alerts in a home; gives what `evergreen monitor` knows of it."""

    def put(found, decision=NOTHING):
        settings = Settings(home=tmp_path)
        directory = settings.monitoring / "checks" / f"{AS_OF:%Y%m%dT%H%M%S}"
        directory.mkdir(parents=True)
        (directory / "drift.json").write_text(found.to_json())
        (directory / "decision.json").write_text(json.dumps(asdict(decision)))
        firing = alerts_of(found, [replace(found, as_of="2026-03-03T06:00+00:00")], decision, Situation(AS_OF), "m")
        Alerts.of(settings).update(firing, AS_OF)
        return checking.record(settings, AS_OF)

    return put


@pytest.fixture
def told(monkeypatch):
    """Shows a check; gives its lines on a wide screen."""

    def show(found):
        monkeypatch.setattr(view.out, "_width", 160)
        with view.out.capture() as screen:
            checking.shown(found)
        return screen.get()

    return show


def test_drift_is_shown_with_kind_evidence_slice_worst_column_decision_and_alert(check, told):
    said = told(check(verdict(drifted=("age",)), ASKED))
    for part in ("Likely population", "the users are older", "country=nl, 12%", "age", "0.620", "median 31 → 44"):
        assert part in said
    assert "genre" not in said  # a column that did not drift is in the report
    assert "decision: retrain (Drift persists)" in said
    assert "EvergreenDrift (ticket)" in said and "docs/runbooks/EvergreenDrift.md" in said
    assert "drift.html" in said


def test_calm_check_takes_few_lines(check, told):
    said = told(check(verdict()))
    assert "decision: none" in said and "Likely" not in said and "alert" not in said
    assert len(said.splitlines()) < 12


def test_many_columns_do_not_fill_the_screen(check, told):
    said = told(check(verdict(drifted=[f"feature_{i}" for i in range(40)])))
    assert "... and 34 more" in said and len(said.splitlines()) < 30


def test_names_that_look_like_markup_are_shown_as_they_are(check, told):
    found = verdict(drifted=("[red]age",), evidence=("values such as [/b] came",), reason="drifted: [red]age")
    said = told(check(found))
    assert said.count("[red]age") >= 2 and "[/b]" in said


def test_the_primary_action_is_told_after_a_verdict_was_saved_and_read(check, told):
    many = replace(outcome(False), hit3={"save": 0.31, "click": 0.8})
    assert "HIT@3/save 0.310" in told(check(verdict(outcome=many)))
    assert list(DriftVerdict.from_json(verdict(outcome=many).to_json()).outcome.hit3) == ["save", "click"]


def test_a_script_gets_verdict_decision_alerts_and_report_as_json(check):
    found = check(verdict(drifted=("age",)), ASKED)
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"drift", "decision", "alerts", "retrain", "report"}
    assert (found["decision"]["action"], found["retrain"]) == ("retrain", None)  # asked for, not ended yet
    assert [a["name"] for a in found["alerts"]] == ["EvergreenDrift"]
    assert datetime.fromisoformat(found["alerts"][0]["starts_at"]) == AS_OF
