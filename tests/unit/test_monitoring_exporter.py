"""The figures for Prometheus: all there, quick, and never worse than the last whole state of the home."""

import json
import math
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from evergreen.settings import Settings
from monitoring import figures
from monitoring.exporter import HomeCollector
from monitoring.trigger import Situation, claim, decide, take
from tests import monitoring_lab as lab

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)  # a Thursday: its slot was at 03:00
MODEL = "homefeed-ranker"


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path, now=NOW)


@pytest.fixture
def collector(settings):
    return HomeCollector(settings)


def scrape(collector):
    """Values by name and labels, the label `model` taken off (all have it)."""
    registry = CollectorRegistry()
    registry.register(collector)
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model") == MODEL, sample.name
            found[(sample.name.removeprefix("evergreen_"), *labels.values())] = sample.value
    return found


def problems(collector, source):
    return scrape(collector)[("exporter_problems", source)], collector.problems[source]


def full_home(settings):
    for hours in range(4):
        at = NOW - timedelta(hours=hours)
        lab.write_check(settings, lab.verdict(at, broken={"item_age": "is stuck at 3"} if hours == 0 else {}), at)
    asked = [lab.decision("none"), lab.decision("retrain", "drift")]
    lab.write_decisions(settings, [*asked, {"claimed": "a", "by": "run 1"}, {"taken": "7@2026-01-01", "why": "done"}])
    lab.write_alerts(settings, "EvergreenDrift")
    lab.write_run(settings, NOW - timedelta(days=2), "champion")


def test_every_declared_figure_is_told_and_no_other(settings, collector):
    full_home(settings)
    told = {name for name, *_ in scrape(collector)}
    assert told == {*figures.GAUGES, "decisions_total"}
    assert collector.problems == dict.fromkeys(collector.problems, ())


def test_names_follow_the_conventions_of_prometheus():
    for name in figures.GAUGES:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert not name.endswith(("_total", "_ms", "_percent", "_hours")), name  # base units; counters alone are totals


def test_values_are_those_of_the_newest_check_in_base_units(settings, collector):
    full_home(settings)
    found = scrape(collector)
    assert found["check_timestamp_seconds",] == NOW.timestamp()
    assert found["drift_score", "country", "user", "categorical"] == 0.31
    assert found["drift_threshold", "country"] == 0.2
    assert (found["drifted", "country"], found["drifted", "item_age"]) == (1, 0)
    assert found["drifted_features_ratio",] == pytest.approx(1 / 3)
    assert [found["drift_kind", k] for k in ("none", "broken", "population", "behaviour")] == [0, 0, 1, 0]
    assert (found["broken_columns",], found["broken", "item_age"]) == (1, 1)
    assert found["unseen_ratio", "item_id"] == 0.12
    assert found["missing_ratio", "country"] == 0.02
    assert (found["window_requests",], found["window_rows",], found["window_users",]) == (400, 8000, 120)
    assert (found["hit3", "save"], found["hit3_low", "save"], found["hit3_high", "save"]) == (0.9, 0.8, 1.0)
    assert found["served_latency_seconds", "0.99"] == 0.08
    assert found["model_info", (NOW - timedelta(days=2)).isoformat(), "7"] == 1
    assert found["model_age_seconds",] == 2 * 86_400
    assert found["decisions_total", "retrain", "drift"] == 1
    assert found["decisions_total", "none", ""] == 1  # `taken` is no decision
    assert found["alert_firing", "EvergreenDrift", "ticket"] == 1
    assert found["retrain_timestamp_seconds", "champion"] == (NOW - timedelta(days=2, hours=-1)).timestamp()


def test_a_home_without_checks_tells_no_figures_of_them_and_no_problem(collector):
    found = scrape(collector)
    assert {name for name, *_ in found} == {"exporter_problems", "alert_firing"}
    assert set(found.values()) == {0}


def test_a_check_without_outcome_or_serving_log_leaves_those_figures_out(settings, collector):
    lab.write_check(settings, lab.verdict(NOW, outcome=None, serving=None, skew_share=None), NOW)
    told = {name for name, *_ in scrape(collector)}
    assert "drift_score" in told
    assert not [name for name in told if name.startswith(("hit3", "served", "quality", "skew", "calibration"))]


def test_a_check_under_way_is_no_problem_and_the_one_before_is_told(settings, collector):
    lab.write_check(settings, lab.verdict(NOW - timedelta(hours=1)), NOW - timedelta(hours=1))
    (settings.monitoring / "checks" / f"{NOW:%Y%m%dT%H%M%S}").mkdir()
    assert scrape(collector)["check_timestamp_seconds",] == (NOW - timedelta(hours=1)).timestamp()
    assert problems(collector, "checks") == (0, ())


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"as_of": "2026-01-15"}', "\x00\x00", "[" * 100_000],
    ids=["empty", "half", "list", "null", "few fields", "zeros", "deep"],
)
def test_a_damaged_verdict_is_passed_over_and_told(settings, collector, damage):
    before = NOW - timedelta(hours=1)
    lab.write_check(settings, lab.verdict(before), before)
    path = lab.write_check(settings, damage, NOW)
    assert scrape(collector)["check_timestamp_seconds",] == before.timestamp()
    count, (said,) = problems(collector, "checks")
    assert count == 1 and str(path) in said
    path.write_text(lab.verdict(NOW).to_json())  # repaired
    assert scrape(collector)["check_timestamp_seconds",] == NOW.timestamp()
    assert problems(collector, "checks") == (0, ())


def test_a_half_written_verdict_is_passed_over_at_every_byte(settings, collector):
    before = NOW - timedelta(hours=1)
    lab.write_check(settings, lab.verdict(before), before)
    text = lab.verdict(NOW).to_json()
    for length in range(1, len(text), len(text) // 25):
        lab.write_check(settings, text[:length], NOW)
        assert scrape(collector)["check_timestamp_seconds",] == before.timestamp()


def test_a_verdict_whose_parts_have_wrong_types_does_not_stop_the_scrape(settings, collector):
    text = json.loads(lab.verdict(NOW).to_json())
    lab.write_check(settings, json.dumps({**text, "rows": "many", "data": [], "broken": None}), NOW)
    found = scrape(collector)
    assert found["drifted", "country"] == 1
    assert found["exporter_problems", "figures"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_left_out_and_told(settings, collector, bad):
    column = replace(lab.COLUMNS[0], score=bad)
    lab.write_check(settings, lab.verdict(NOW, columns=(column, *lab.COLUMNS[1:])), NOW)
    found = scrape(collector)
    assert ("drift_score", "country", "user", "categorical") not in found
    assert ("drift_score", "item_age", "item", "numeric") in found
    count, (said,) = problems(collector, "figures")
    assert count == 1 and "evergreen_drift_score country" in said


@pytest.mark.parametrize("checks", [1, 100])
def test_checks_from_the_future_are_not_believed(settings, collector, checks):
    lab.write_check(settings, lab.verdict(NOW), NOW)
    for hours in range(checks):
        at = NOW + timedelta(hours=hours, minutes=6)
        lab.write_check(settings, lab.verdict(at), at)
    assert scrape(collector)["check_timestamp_seconds",] == NOW.timestamp()
    count, (said,) = problems(collector, "checks")
    assert count == 1 and said.startswith(f"{checks} checks lie in the future")


def test_a_clock_that_is_a_little_off_is_no_problem(settings, collector):
    at = NOW + timedelta(minutes=5)
    lab.write_check(settings, lab.verdict(at), at)
    assert scrape(collector)["check_timestamp_seconds",] == at.timestamp()
    assert problems(collector, "checks") == (0, ())


@pytest.mark.parametrize(
    ("drifted", "versions", "lasting"),
    [
        ((1, 0, 0, 1), "7777", 0),  # the fourth is too old
        ((1, 0, 1, 0), "7777", 1),
        ((0, 1, 1, 1), "7777", 0),  # it has ended
        ((1, 1, 0, 0), "7677", 0),  # what another model's check saw does not count
    ],
)
def test_drift_lasts_as_the_trigger_judges_it(settings, collector, drifted, versions, lasting):
    for hours, (moved, version) in enumerate(zip(drifted, versions, strict=True)):
        at, column = NOW - timedelta(hours=hours), replace(lab.COLUMNS[0], drifted=bool(moved))
        found = lab.verdict(at, columns=(column,), model_version=version, drifted=bool(moved))
        lab.write_check(settings, found, at)
    assert scrape(collector)["drift_lasting", "country"] == lasting


def test_lost_quality_and_broken_data_are_told_as_the_trigger_judges_them(settings, collector):
    lost = replace(lab.verdict(NOW).outcome, lost=True)
    failed = replace(lab.verdict(NOW).data[0], passed=False)
    for hours in range(2):
        at = NOW - timedelta(hours=hours)
        lab.write_check(settings, lab.verdict(at, outcome=lost), at)
    found = scrape(collector)
    assert (found["quality_lost",], found["quality_lost_lasting",], found["broken_data",]) == (1, 1, 0)
    lab.write_check(settings, lab.verdict(NOW, outcome=lost, data=(failed,)), NOW)
    found = scrape(collector)
    assert (found["quality_lost",], found["quality_lost_lasting",], found["broken_data",]) == (1, 0, 1)
    assert found["data_test_passed", "volume"] == 0


def test_a_disk_that_cannot_be_read_is_told_and_the_rest_is_scraped(settings, collector):
    lab.write_decisions(settings, [lab.decision("none")])
    (settings.monitoring / "checks").write_text("a file where a directory should be")
    settings.runs.write_text("")
    found = scrape(collector)
    assert (found["exporter_problems", "checks"], found["exporter_problems", "runs"]) == (1, 1)
    assert found["decisions_total", "none", ""] == 1


def test_too_many_columns_are_bounded_and_those_that_drifted_stay(settings, collector):
    many = tuple(replace(lab.COLUMNS[1], name=f"c{i:04}") for i in range(1000))
    last = replace(lab.COLUMNS[0], name="z")
    lab.write_check(settings, lab.verdict(NOW, columns=(*many, last)), NOW)
    found = scrape(collector)
    assert len([1 for name, *_ in found if name == "drift_score"]) == figures.MOST_SERIES
    assert found["drifted", "z"] == 1
    assert found["exporter_problems", "figures"] > 0


def test_decisions_are_counted_as_they_are_appended_and_a_torn_line_waits(settings, collector):
    path = lab.write_decisions(settings, [lab.decision("none")] * 3)
    assert scrape(collector)["decisions_total", "none", ""] == 3
    with path.open("a") as file:
        file.write(json.dumps(lab.decision("retrain", "drift"))[:20])
    assert scrape(collector)["decisions_total", "none", ""] == 3
    assert problems(collector, "decisions") == (0, ())
    path.write_text(path.read_text()[: path.read_text().rfind("\n") + 1])  # as the next writer does
    with path.open("a") as file:
        file.write(json.dumps(lab.decision("escalate")) + "\n")
    assert scrape(collector)["decisions_total", "escalate", ""] == 1


def test_log_as_the_trigger_writes_it_has_no_damaged_line(settings, collector):
    """Requests, claims and what settles them stand in it beside the decisions."""
    calm = Situation(next_slot=NOW + timedelta(days=9))
    before, found = lab.verdict(NOW - timedelta(hours=1)), lab.verdict(NOW)
    asked = decide(found, [before], calm, settings.monitoring)
    assert claim(asked, calm, settings.monitoring, "run 1") and take(settings.monitoring)
    assert problems(collector, "decisions") == (0, ())
    assert scrape(collector)["decisions_total", "retrain", "drift"] == 1


def test_slot_that_bad_data_held_counts_as_missed(settings, collector):
    lab.write_run(settings, NOW - timedelta(days=4), "champion")
    lab.write_run(settings, NOW.replace(hour=3), "held", version="")
    assert scrape(collector)[("slots_missed",)] == 2
    lab.write_run(settings, NOW.replace(hour=4), "held", version="8")
    assert scrape(collector)[("slots_missed",)] == 0


def test_a_damaged_decision_is_told_and_the_others_are_counted(settings, collector):
    path = lab.write_decisions(settings, [lab.decision("none")])
    with path.open("a") as file:
        file.write("garbage\n[]\n" + json.dumps(lab.decision("none")) + "\n")
    assert scrape(collector)["decisions_total", "none", ""] == 2
    assert problems(collector, "decisions") == (1, (f"2 lines of {path} are no decisions",))


def test_a_log_of_decisions_that_was_replaced_is_counted_anew(settings, collector):
    path = lab.write_decisions(settings, [lab.decision("none")] * 3)
    scrape(collector)
    other = path.with_name("new")
    other.write_text((json.dumps(lab.decision("none")) + "\n") * 5)
    other.replace(path)
    assert scrape(collector)["decisions_total", "none", ""] == 5


def test_alerts_that_fired_when_their_file_was_whole_fire_on_while_it_is_damaged(settings, collector):
    path = lab.write_alerts(settings, "EvergreenDrift")
    assert scrape(collector)["alert_firing", "EvergreenDrift", "ticket"] == 1
    path.write_text(path.read_text()[:-5])
    assert scrape(collector)["alert_firing", "EvergreenDrift", "ticket"] == 1
    assert problems(collector, "alerts")[0] == 1
    lab.write_alerts(settings, "EvergreenSlotMissed")
    found = scrape(collector)
    assert (
        found["alert_firing", "EvergreenDrift", "ticket"],
        found["alert_firing", "EvergreenSlotMissed", "page"],
    ) == (0, 1)


@pytest.mark.parametrize(
    ("newest", "now", "missed"),
    [
        (datetime(2026, 1, 15, 3, tzinfo=UTC), NOW, 0),
        (datetime(2026, 1, 12, 3, tzinfo=UTC), datetime(2026, 1, 15, 8, 59, 59, tzinfo=UTC), 0),
        (datetime(2026, 1, 12, 3, tzinfo=UTC), datetime(2026, 1, 15, 9, tzinfo=UTC), 1),  # grace: 6 hours
        (datetime(2026, 1, 5, 3, tzinfo=UTC), NOW, 3),
        (datetime(2025, 12, 1, 3, tzinfo=UTC), NOW, 13),
        (datetime(2025, 10, 1, 3, tzinfo=UTC), NOW, None),  # history
    ],
)
def test_slots_without_a_retrain_are_counted(tmp_path, newest, now, missed):
    settings = Settings(home=tmp_path, now=now)
    lab.write_run(settings, newest, "held")
    assert scrape(HomeCollector(settings)).get(("slots_missed",)) == missed


def test_a_damaged_run_and_one_of_the_future_are_told_and_the_others_count(settings, collector):
    lab.write_run(settings, NOW - timedelta(hours=9), "champion")
    lab.write_run(settings, NOW, "held", ended=NOW + timedelta(hours=1))
    (settings.runs / "torn").mkdir()
    (settings.runs / "torn" / "result.json").write_text('{"as_of": ')
    found = scrape(collector)
    assert ("retrain_timestamp_seconds", "held") not in found
    assert found["retrain_timestamp_seconds", "champion"] == (NOW - timedelta(hours=8)).timestamp()
    assert found["exporter_problems", "runs"] == 2


def test_a_year_of_checks_is_scraped_in_under_50_ms(settings, collector):
    columns = tuple(replace(lab.COLUMNS[1], name=f"c{i:03}") for i in range(150))
    for hours in range(8760):
        path = settings.monitoring / "checks" / f"{NOW - timedelta(hours=hours):%Y%m%dT%H%M%S}"
        path.mkdir(parents=True)
        if hours < 60:
            (path / "drift.json").write_text(lab.verdict(NOW - timedelta(hours=hours), columns=columns).to_json())
    lab.write_decisions(settings, [lab.decision("none")] * 8760)
    for slot in range(104):
        lab.write_run(settings, NOW - timedelta(days=3.5 * slot), "champion")
    list(collector.collect())
    took = []
    for _ in range(7):
        start = time.thread_time()  # what others do on this machine does not count
        list(collector.collect())
        took.append(time.thread_time() - start)
    assert min(took) < 0.05


def test_what_did_not_change_is_not_read_again(settings, collector, monkeypatch):
    full_home(settings)
    list(collector.collect())
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    assert list(collector.collect())
