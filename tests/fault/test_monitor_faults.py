"""Checks of a home in which something is lost, torn, empty, stuck or in the wrong time: one clear line, nothing lost.

All share one home, and time goes on in it from test to test: a check is dear.
"""

import html
import json
import shutil
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from components.check import check_directory
from components.decide import decide_at
from components.drift import scored_part, whose_reference
from engagement.errors import EvergreenError
from engagement.store import EngagementStore
from engagement.table import Feature, RankingTable
from model.bundle import Bundle
from monitoring import page
from monitoring.drift import check as check_drift
from monitoring.exporter import HomeCollector
from monitoring.reference import DIRECTORY, OLD, Reference
from monitoring.verdict import DriftVerdict
from serving.registry import Registry
from tests.check_lab import CALM, LEARNED, TRAINED, champion_home, check, deliver, put
from tests.feed_world import START, feed, window
from tests.feed_world import TRAINED as KNOWN
from tests.feed_world import put as put_in
from tests.monitoring_lab import write_run

NULL, STUCK = CALM + timedelta(days=3), CALM + timedelta(days=6)  # after days without, and with one, surface
EMPTY = STUCK + timedelta(days=20)
LATE = timedelta(days=3)  # rows of the feed become known up to so much later


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    settings = champion_home(tmp_path_factory.mktemp("monitored"))
    for day in (11, 15, 18):  # no slot was missed
        write_run(settings, datetime(2024, 1, day, 3, tzinfo=UTC), "champion")
    return settings


@pytest.fixture(scope="module")
def calm(home, tmp_path_factory):
    """The check of ordinary days."""
    deliver(home, tmp_path_factory.mktemp("calm"), LEARNED, 13)
    return check(home, CALM)


def runs(home):
    return sorted((home.evidently).glob("*/snapshots/*.json"))


def test_ordinary_days_are_told_alike_in_verdict_page_snapshot_and_metrics(home, calm):
    assert calm.broken == {} and calm.columns and calm.outcome is not None
    decision, _ = decide_at(home, calm)
    assert decision.action == "none" and decision.reason.startswith(calm.reason)
    directory = check_directory(home, CALM)
    assert DriftVerdict.load(directory / "drift.json") == calm
    text, snapshot = (directory / "drift.html").read_text(), (directory / "snapshot.json").read_text()
    assert runs(home)[0].read_text() == snapshot
    metrics = {
        (sample.name, *(v for k, v in sample.labels.items() if k != "model")): sample.value
        for family in HomeCollector(home).collect()
        for sample in family.samples
    }
    assert metrics["evergreen_check_timestamp_seconds",] == CALM.timestamp()
    for c in calm.columns:
        assert f"<td>{c.name}</td><td>{c.group}</td><td>{c.kind}</td><td>{c.score:.3f}</td>" in text
        assert metrics["evergreen_drift_score", c.name, c.kind, c.group] == c.score
        assert metrics["evergreen_drift_threshold", c.name] == c.threshold
    for action, hit3 in calm.outcome.hit3.items():
        assert f"<td>{action}</td><td>{hit3:.4f}</td>" in text and metrics["evergreen_hit3", action] == hit3
    assert metrics["evergreen_window_rows",] == calm.rows[1] and f"<td>{calm.rows[1]:,}</td>" in text
    assert metrics["evergreen_late_rows_ratio",] == calm.late and f"<td>{calm.late:.2%}</td>" in text
    assert html.escape(calm.reason) in text


def test_rows_and_labels_that_became_known_later_are_in_no_check(home, calm):
    store = EngagementStore(home.data)
    start, end = (datetime.fromisoformat(t) for t in calm.window)
    seen = store.snapshot(CALM).engagements(start, end)
    whole = store.snapshot(CALM + 2 * LATE).engagements(start, end)
    assert whole.num_rows > seen.num_rows == calm.rows[1]
    late = np.asarray(seen["created_timestamp"]) - np.asarray(seen["event_timestamp"]) > np.timedelta64(1, "h")
    assert calm.late == pytest.approx(late.mean()) and 0 < late.mean() < 0.05


def test_check_in_the_training_window_is_one_clear_line_and_leaves_nothing(home, calm):
    for as_of in (TRAINED, TRAINED - timedelta(days=4), TRAINED - timedelta(days=400)):
        with pytest.raises(EvergreenError, match="the champion was trained on data up to 2024-01-10 00:00"):
            check(home, as_of)
        assert not check_directory(home, as_of).exists()


def test_column_without_any_value_is_broken_though_the_evidently_storage_is_lost(home, calm, tmp_path):
    deliver(home, tmp_path / "feed", 13, 16, put("surface", None))
    before = [run.read_text() for run in runs(home)]
    shutil.rmtree(home.evidently)
    found = check(home, NULL)
    assert found.kind == "broken" and "\n" not in found.reason
    assert found.broken == {"context__surface": "is missing in 100% of its rows, 0% before"}
    assert "looks broken: context__surface is missing in 100% of its rows, 0% before" in found.reason
    decision, _ = decide_at(home, found)
    assert decision.action == "none" and decision.reason.startswith("Broken data is repaired, not trained on: ")
    assert before[0] in [run.read_text() for run in runs(home)] and len(runs(home)) == 2


def test_stuck_column_is_broken_though_a_run_and_a_verdict_are_half_written(home, calm, tmp_path, caplog):
    deliver(home, tmp_path / "feed", 16, 19, put("surface", "home"))
    torn, verdict = runs(home)[0], check_directory(home, NULL) / "drift.json"
    whole = torn.read_text()
    torn.write_text(whole[: len(whole) // 2])
    verdict.write_bytes(verdict.read_bytes()[:1000])
    found = check(home, STUCK)
    assert found.broken == {"context__surface": 'is stuck at one value, "home"'}
    assert torn.read_text() == whole
    caplog.clear()
    decision, _ = decide_at(home, found)
    assert decision.action == "none"
    lines = [m for m in caplog.messages if str(verdict) in m]
    assert len(lines) == 1 and "is passed over" in lines[0]


def test_two_monitors_at_one_empty_hour_leave_one_check_and_one_run(home, calm):
    found, problems = [], []

    def monitor():
        try:
            found.append(check(home, EMPTY))
        except Exception as error:  # noqa: BLE001
            problems.append(error)

    monitors = [threading.Thread(target=monitor) for _ in range(2)]
    for thread in monitors:
        thread.start()
    for thread in monitors:
        thread.join()
    assert problems == [] and found[0] == found[1]
    assert found[0].reason == "the window holds no requests" and not found[0].drifted
    assert DriftVerdict.load(check_directory(home, EMPTY) / "drift.json") == found[0]
    assert [run.read_text().count(EMPTY.isoformat()[:10]) > 0 for run in runs(home)].count(True) == 1
    assert not list(check_directory(home, EMPTY).glob(".*"))


def test_check_ahead_of_the_clock_decides_nothing_and_one_behind_the_last_neither(home, calm):
    early = home.model_copy(update={"now": NULL})
    ahead, _ = decide_at(early, replace(calm, as_of=EMPTY.isoformat()))
    assert ahead.action == "none" and "ahead of the clock (2024-01-17 00:00 UTC): this check decides" in ahead.reason
    back, _ = decide_at(early, replace(calm, as_of=(CALM - timedelta(hours=2)).isoformat()))
    assert back.action == "none" and "is before the check that was decided on last" in back.reason
    later = home.model_copy(update={"now": STUCK + timedelta(hours=9)})
    still = replace(calm, as_of=(STUCK + timedelta(hours=8)).isoformat(), drifted=False)
    on, _ = decide_at(later, still)
    assert on.action == "none" and on.reason == calm.reason


def test_champion_of_an_earlier_release_is_told_and_does_not_stop_the_retrain_that_helps(home, calm, tmp_path, capsys):
    old = tmp_path / "bundle"
    old.mkdir()
    (old / OLD).write_bytes(b"")
    own = home.serving / "models" / "1"
    assert whose_reference("1", own, tmp_path) == ("1", own)
    assert whose_reference("1", old, own) == ("first", own)
    assert whose_reference("", None, own) == ("first", own)


def test_model_whose_feature_has_vanished_is_checked_on_the_others(home, calm, tmp_path):
    directory = Registry(home).fetch("1")
    bundle, reference = Bundle.load(directory), Reference.load(directory / DIRECTORY)
    gone = Feature("user_profile__gone", "request", "numeric")
    wider = replace(reference.spec, features=(*reference.spec.features, gone))
    table: RankingTable = window(feed(), KNOWN, KNOWN + timedelta(days=1)).table
    part, scores = scored_part(replace(bundle, spec=wider), table, KNOWN, KNOWN + timedelta(days=1))
    assert part.requests == 0 and scores.shape == (0, len(table.spec.actions))


def test_hundred_thousand_categories_are_checked_and_drawn(tmp_path):
    rng, topic = np.random.default_rng(0), "item_profile__topic"

    def many(of, first):
        some = first + rng.integers(0, 100_000, (of.table.rows, 1)).astype(np.uint64)
        return put_in(of, topic, (some * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(1)).astype(np.int64))

    learned, day = window(feed(), START, KNOWN), window(feed(), KNOWN, KNOWN + timedelta(days=1))
    reference = Reference.of(many(learned, 1), None)
    reference.save(tmp_path / "reference")
    assert sum(f.stat().st_size for f in (tmp_path / "reference").iterdir()) < 3_000_000
    known = Reference.load(tmp_path / "reference")
    at = KNOWN + timedelta(days=1)
    calm = check_drift(known, many(day, 1), at, ("1", at.isoformat()), tmp_path / "calm")
    other = check_drift(known, many(day, 10**7), at, ("1", at.isoformat()), tmp_path / "other")
    assert f"new {topic}" not in calm.drifted_columns and f"new {topic}" in other.drifted_columns
    assert page.has_plots((tmp_path / "other" / "snapshot.json").read_text())
    assert (tmp_path / "other" / "snapshot.json").stat().st_size < 3_000_000
    assert json.loads((tmp_path / "other" / "drift.json").read_text())["reason"] == other.reason
    assert datetime.fromisoformat(other.as_of).tzinfo == UTC
