"""One check from end to end: the verdict that everybody reads, its page, and what a window without data says."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from engagement.table import hash_id
from monitoring.compare import Window
from monitoring.drift import VERDICT, Beside, Skew, check
from monitoring.reference import Reference
from monitoring.verdict import DriftVerdict, Outcome
from tests.feed_world import SPEC, START, TRAINED, feed, put, window

TABLE = feed()
DAY = timedelta(days=1)
AS_OF = TRAINED + 2 * DAY


@pytest.fixture(scope="module")
def reference():
    return Reference.of(window(TABLE, START, TRAINED), None)


@pytest.fixture
def judge(reference, tmp_path):
    def run(current=None, **more):
        found = window(TABLE, AS_OF - DAY, AS_OF) if current is None else current
        return check(reference, found, AS_OF, ("7", "2026-03-30T03:00:00+00:00"), tmp_path / "check", **more)

    return run


def moved(name="user_profile__age", by=25.0):
    current = window(TABLE, AS_OF - DAY, AS_OF)
    return put(current, name, current.table.request_num[:, :1] + by)


def test_ordinary_window_is_no_drift_and_leaves_whole_files(judge, reference, tmp_path):
    verdict = judge(code="c0de")
    assert (verdict.drifted, verdict.kind, verdict.broken, verdict.slices) == (False, "none", {}, ())
    assert verdict.reason == "0 of 10 features drifted"
    assert verdict.window == ((AS_OF - DAY).isoformat(), AS_OF.isoformat())
    assert (verdict.model_version, verdict.slot, verdict.code) == ("7", "2026-03-30T03:00:00+00:00", "c0de")
    assert verdict.reference == reference.digest
    assert verdict.requests[0] == reference.totals[0] > verdict.requests[1] > 0
    assert verdict.users[0] == 400 >= verdict.users[1] > 100
    out = tmp_path / "check"
    assert DriftVerdict.load(out / VERDICT) == verdict
    page = (out / "drift.html").read_text()
    assert "0 of 10 features drifted" in page and "<script src=" not in page
    assert json.loads((out / "snapshot.json").read_text())["timestamp"].startswith("2026-04-01")


def test_drift_is_told_in_one_sentence_with_score_threshold_and_likely_kind(judge):
    verdict = judge(moved())
    age = next(c for c in verdict.columns if c.name == "user_profile__age")
    assert verdict.drifted and verdict.kind != "none" and verdict.evidence
    assert f"user_profile__age {age.score:.2f} ≥ {age.threshold:.2f}" in verdict.reason
    assert "predictions" in verdict.reason and f"likely {verdict.kind}" in verdict.reason
    assert "\n" not in verdict.reason


def test_broken_column_is_told_and_its_kind_is_broken(judge):
    verdict = judge(put(window(TABLE, AS_OF - DAY, AS_OF), "user_profile__age", float("nan")))
    assert verdict.kind == "broken"
    assert "looks broken: user_profile__age is missing in 100% of its rows, 0% before" in verdict.reason


def test_empty_window_gives_a_verdict_with_one_clear_line_and_a_page(judge, tmp_path):
    verdict = judge(Window.empty(SPEC, AS_OF - DAY, AS_OF))
    assert (verdict.drifted, verdict.kind, verdict.columns) == (False, "none", ())
    assert verdict.reason == "the window holds no requests"
    assert (verdict.requests[1], verdict.rows[1], verdict.users[1]) == (0, 0, 0)
    assert "the window holds no requests" in (tmp_path / "check" / "drift.html").read_text()


def test_what_else_is_known_is_in_the_verdict_and_the_reason_says_what_is_wrong(judge):
    lost = Outcome(500, 20, {"save": 0.2}, {}, {}, {}, {}, 30.0, 0.4, lost=True, reason="HIT@3 fell to 0.2")
    why = {"user_stats__impressions_1h": "3 of 300 values differ"}
    told = judge(beside=Beside(outcome=lost, late=0.25, skew=Skew(0.01, why, unexplained=True)))
    assert (told.outcome, told.late, told.skew, told.skew_share) == (lost, 0.25, why, 0.01)
    said = "train/serve skew in 1% of the values (user_stats__impressions_1h: 3 of 300 values differ)"
    assert "HIT@3 fell to 0.2" in told.reason and told.reason.endswith(said)
    many = {f"feature_{i}": "all differ" for i in range(60)}
    everywhere = judge(beside=Beside(skew=Skew(0.9, many, unexplained=True))).reason
    assert everywhere.endswith("feature_2: all differ and 57 more features)") and len(everywhere) < 300
    stale = judge(beside=Beside(skew=Skew(0.01, why, unexplained=False)))
    assert "skew" not in stale.reason and stale.skew == why
    assert judge().skew_share is None


def test_same_check_again_gives_the_same_verdict(judge):
    assert judge().to_json() == judge().to_json()


def test_check_that_is_done_again_and_killed_leaves_no_old_verdict(judge, tmp_path, monkeypatch):
    judge()
    monkeypatch.setattr("monitoring.page.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        judge(moved())
    assert not (tmp_path / "check" / VERDICT).exists()


def test_names_of_categories_reach_the_verdict(reference, tmp_path):
    country = "user_profile__country"
    current = put(window(TABLE, AS_OF - DAY, AS_OF), country, hash_id(country, "fr"))
    named = replace(current, names={country: {hash_id(country, "fr"): "fr"}})
    verdict = check(reference, named, AS_OF, ("7", ""), tmp_path)
    assert any('"fr"' in c.note for c in verdict.columns)
