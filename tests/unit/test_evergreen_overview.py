"""`evergreen status` tells what the pages tell, of the newest check, whatever cannot be read."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from evergreen import overview as module
from evergreen import view
from evergreen.overview import overview
from evergreen.settings import Settings
from monitoring import summary
from monitoring.trigger import Situation, decide
from pipelines.memory import Memory
from serving.agreement import Agreement
from tests import monitoring_lab as lab

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def home(tmp_path):
    settings = Settings(home=tmp_path, now=NOW)
    Agreement(settings.serving).decide("promoted", "7", "for the test", champion="7")
    return settings


def check(home, at, **changes):
    made = lab.verdict(at, **changes)
    (lab.write_check(home, made, at).parent / "drift.html").write_text("the page")
    return made


def retrain(home, at, drift):
    """A retrain that ended, with what its own check found."""
    directory = home.runs / f"{at:%Y%m%dT%H%M}-0123456789"
    (directory / "drift").mkdir(parents=True)
    (directory / "drift" / "drift.html").write_text("the page")
    gate = {"verdict": "hold", "reason": "worse", "requests": 9, "metrics": {}, "chosen": "update"}
    fields = dict.fromkeys(("strategy", "champion"), "x") | {"reason": "drift", "version": "8", "outcome": "held"}
    times = {"as_of": at.isoformat(), "finished_at": at.isoformat(), "run_key": directory.name}
    result = {**fields, **times, "gate": gate, "rollout": None, "data": {"report": ""}, "drift": drift}
    (directory / "result.json").write_text(json.dumps(result))


def screen(home):
    with view.out.capture() as shown:
        module.shown(overview(home))
    return " ".join(shown.get().split())


def test_newest_check_counts_whoever_made_it(home):
    assert overview(home)["drift"] is None and "none yet" in screen(home)
    retrain(home, NOW - 9 * HOUR, json.loads(lab.verdict(NOW - 9 * HOUR).to_json()))
    state = overview(home)
    assert state["drift"]["as_of"] == (NOW - 9 * HOUR).isoformat() and state["report"].endswith("/drift/drift.html")
    found = check(home, NOW - HOUR, reason="the newest")
    state = overview(home)
    assert state["drift"] == json.loads(found.to_json())
    assert state["report"].endswith("checks/20260115T110000/drift.html")
    check(home, NOW + 2 * HOUR, reason="by a clock that is wrong")
    assert overview(home)["drift"]["reason"] == "the newest"
    retrain(home, NOW, {"as_of": "as an earlier release wrote it"})
    assert overview(home)["drift"]["reason"] == "the newest"


def test_it_says_what_the_page_says(home):
    outcome = replace(lab.verdict(NOW).outcome, hit3={"hide": 0.1, "save": 0.9}, primary="save")
    changes = {
        "broken": {"price": "is stuck at 3"},
        "outcome": outcome,
        "late": 0.25,
        "skew": {"age": "30 of 300 values"},
    }
    data = (lab.DataTest("volume", False, 12.0, "≥ 120", "12 rows came, 120 are usual"),)
    found = check(home, NOW, **changes, data=data)
    said = screen(home)
    for mark in summary.marks(found):
        assert mark.text in said
    for sentence in [*summary.wrong(found), *found.evidence, found.reason]:
        assert sentence in said
    assert "HIT@3/save 0.900 [0.800, 1.000], expected 0.950 at 50 h" in said
    assert "400 requests, 8,000 rows, 120 users; 25.0% of the rows came late" in said
    assert "2026-01-15T12:00 UTC, of v7" in said


def test_alerts_decisions_and_the_early_retrain_that_waits_are_told(home):
    before, found = check(home, NOW - HOUR), check(home, NOW)
    assert "alerts none" in screen(home)
    decide(before, [], Situation(next_slot=NOW + 99 * HOUR), home.monitoring)
    decide(found, [before], Situation(next_slot=NOW + 99 * HOUR), home.monitoring)
    lab.write_alerts(home, "EvergreenDrift", "EvergreenSlotMissed")
    state, said = overview(home), screen(home)
    assert [t["action"] for t in state["triggers"]] == ["none", "retrain"]
    assert state["waiting"] == state["triggers"][-1]
    assert [a["name"] for a in state["alerts"]] == ["EvergreenSlotMissed", "EvergreenDrift"]  # pages first
    assert "retrain: Drift persists (population): country" in said
    assert "waits the early retrain that the check of 2026-01-15T12:00 asked for" in said
    assert "EvergreenSlotMissed (page since 2026-01-01T00:00)" in said


def test_run_of_the_schedule_that_failed_is_told_with_its_reason(home):
    Memory(home).failed("monitor", NOW, "the disk [is] full", NOW)
    assert "monitor of 2026-01-15T12:00 failed: the disk [is] full" in screen(home)
    entries = {e["entry"]: e for e in overview(home)["entries"]}
    assert set(entries) == {"retrain", "refresh", "monitor"} and entries["monitor"]["last_failed"]


def test_log_that_is_damaged_is_one_line_and_the_rest_is_shown(home):
    check(home, NOW)
    lab.write_decisions(home, [{"no": "decision"}])
    state, said = overview(home), screen(home)
    assert len(state["problems"]) == 1 and "line 1 of" in state["problems"][0]
    assert state["drift"] and state["problems"][0].replace("/", "")[:20] in said.replace("/", "")


def test_looking_at_an_empty_home_changes_nothing_in_it(tmp_path):
    settings = Settings(home=tmp_path / "new")
    said = screen(settings)
    assert "No champion yet" in said and "alerts" not in said
    assert not (settings.monitoring).exists()


def test_json_is_complete_and_can_be_read_by_a_script(home):
    check(home, NOW)
    state = json.loads(json.dumps(overview(home)))
    assert state["drift"]["columns"][0]["threshold"] == 0.2 and state["drift"]["serving"]["p99_ms"] == 80.0
    assert state["next_slot"] == "2026-01-19T03:00:00+00:00"
