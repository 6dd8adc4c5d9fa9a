"""Quality on matured labels: what counts, what is expected of a model's age, and what is lost rather than chance."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from model.metrics import hit3, hits, random_hit3
from monitoring.outcome import LEAST_REQUESTS, MATURES, AgeCurve, Baseline, looked_at, outcome
from monitoring.verdict import DriftVerdict, Outcome
from tests.unit.model_synth import make

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
TABLE = make(requests=400, users=60, size=12)  # a request an hour, just after it
GOOD = np.clip(TABLE.labels * 0.5 + np.random.default_rng(0).random(TABLE.labels.shape) * 0.5, 0, 1)
CHANCE = np.random.default_rng(1).random(TABLE.labels.shape)
FLAT = AgeCurve((12.0, 500.0), (1.0, 1.0), 3)
UNKNOWN = AgeCurve((), (), 0)
AS_OF = EPOCH + 400 * HOUR + MATURES


def baseline_of(scores):
    counted = hits(TABLE, scores)
    return Baseline(hit3(counted)["save"], 0.02, random_hit3(counted)["save"])


def told(scores=GOOD, as_of=AS_OF, trained_to=EPOCH, baseline=None, curve=FLAT, table=TABLE):
    return outcome(table, scores, as_of, trained_to, baseline or baseline_of(GOOD), curve)


def test_labels_that_have_not_matured_are_immature_and_never_negative():
    later = told(as_of=EPOCH + 300 * HOUR)
    unlabelled = TABLE.labels.copy()
    unlabelled[TABLE.offsets[276] :] = 0  # nobody's actions of the last day are known yet
    assert told(as_of=EPOCH + 300 * HOUR, table=replace(TABLE, labels=unlabelled)) == later
    assert later.immature == 24


def test_a_request_matures_at_the_very_instant():
    sizes = np.diff(TABLE.offsets)
    request = int(np.flatnonzero(sizes > 3)[5])
    instant = EPOCH + timedelta(microseconds=int(TABLE.time[request])) + MATURES
    before, at = told(as_of=instant - timedelta(microseconds=1)), told(as_of=instant)
    assert (before.requests, at.requests) == (5, 6)


def test_nothing_matured_is_no_outcome():
    assert told(as_of=EPOCH + MATURES) is None
    assert told(trained_to=AS_OF) is None


def test_requests_that_the_model_learned_from_do_not_count():
    half = told(trained_to=EPOCH + 200 * HOUR)
    alone = TABLE.between(int(200 * 3.6e9), int(400 * 3.6e9))
    scores = GOOD[TABLE.offsets[200] :]
    assert half.hit3 == hit3(hits(alone, scores)) and half.requests < told().requests
    assert half.age_hours == pytest.approx(100, abs=1)


def test_intervals_hold_the_value_and_calibration_is_predicted_by_observed():
    found = told(GOOD * 0.5)
    for action, (low, high) in found.interval.items():
        assert low <= found.hit3[action] <= high
        assert found.calibration[action] == pytest.approx(found.predicted[action] / found.observed[action])
    assert found.observed["save"] == pytest.approx(TABLE.labels[:, 0].mean())
    assert told(GOOD).calibration["save"] == pytest.approx(2 * found.calibration["save"])


def test_an_action_that_nobody_did_has_no_calibration():
    labels = TABLE.labels.copy()
    labels[:, 2] = 0
    found = told(table=replace(TABLE, labels=labels))
    assert "hide" not in found.calibration and found.hit3["hide"] == 0.0


def test_a_model_that_ranks_by_chance_is_lost_and_the_one_that_was_admitted_is_not():
    assert told(GOOD).lost is False
    lost = told(CHANCE)
    assert lost.lost and lost.hit3["save"] < lost.expected and "more than 10% below it beyond chance" in lost.reason


def test_fewer_saves_for_everybody_are_not_held_against_the_model():
    rare = TABLE.labels.copy()
    rare[np.random.default_rng(3).random(TABLE.rows) < 0.6] = 0
    found = told(table=replace(TABLE, labels=rare))
    assert found.hit3["save"] < 0.6 * told().hit3["save"] and not found.lost


def test_what_earlier_models_lost_with_age_is_expected():
    half_way = GOOD.copy()
    worse = np.random.default_rng(4).random(TABLE.rows) < 0.6
    half_way[worse] = CHANCE[worse]
    assert told(half_way).lost
    faded = AgeCurve((12.0, 100.0), (1.0, 0.6), 5)
    assert not told(half_way, curve=faded).lost
    assert told(half_way, curve=faded).expected == pytest.approx(0.6 * told(half_way).expected)


def test_without_a_curve_only_a_fall_far_below_the_fresh_model_is_lost():
    found = told(CHANCE, curve=UNKNOWN)
    assert found.expected is None and found.lost and "when it was fresh" in found.reason
    assert told(GOOD, curve=UNKNOWN).lost is False
    assert outcome(TABLE, CHANCE, AS_OF, EPOCH, None, FLAT).lost is False


def test_too_few_requests_or_users_never_count_as_lost():
    few = TABLE.select(np.arange(LEAST_REQUESTS - 1))
    assert not told(CHANCE[: few.rows], table=few).lost
    alone = replace(TABLE, user_id=np.array([f"u{i % 19}" for i in range(TABLE.requests)], "S"))
    assert not told(CHANCE, table=alone).lost


def test_false_alarms_of_a_model_that_keeps_its_quality_are_rare():
    """A hundred windows of one unchanging model: none is lost, though many are below what is expected."""
    baseline, rng = baseline_of(GOOD), np.random.default_rng(5)
    below = lost = 0
    for _ in range(100):
        picked = np.sort(rng.integers(0, TABLE.requests, 200))
        found = told(GOOD[TABLE.rows_of(picked)], baseline=baseline, table=TABLE.select(picked))
        below += found.hit3["save"] < found.expected
        lost += found.lost
    assert below > 20 and lost == 0


def verdict(version, age, lift, requests=500):
    told_of = Outcome(requests, 0, {"save": lift * 0.2}, {}, {}, {}, {}, age, None, False, "", {"save": 0.2})
    nothing = {"evidence": (), "columns": (), "slices": (), "broken": {}, "skipped": {}, "window": ("", "")}
    counts = dict.fromkeys(("requests", "rows", "users"), (0, 0))
    names = {"as_of": "2024-01-01", "model_version": version, "slot": "", "kind": "none", "reason": ""}
    return DriftVerdict(**names, **nothing, **counts, drifted=False, outcome=told_of)


def test_age_curve_compares_each_model_with_its_own_youth():
    history = [verdict(f"{v}", age, (2 + v) * (1 - age / 500)) for v in range(4) for age in (12, 36, 60, 84)]
    curve = AgeCurve.of(history, "save")
    assert curve.models == 4 and curve.ages == (12, 36, 60, 84)
    assert curve.at(60) == pytest.approx((1 - 60 / 500) / (1 - 12 / 500))
    assert curve.at(5) == 1 and curve.at(1000) == curve.shares[-1]


def test_age_curve_never_rises_and_needs_enough_models():
    history = [verdict(f"{v}", age, lift) for v in range(3) for age, lift in ((12, 2.0), (36, 1.0), (60, 3.0))]
    assert AgeCurve.of(history, "save").shares == (1.0, 0.5, 0.5)
    few = AgeCurve.of(history[:6], "save")
    assert few.at(12) is None and few.ages == ()
    thin = [verdict(f"{v}", 12, 2.0, requests=LEAST_REQUESTS - 1) for v in range(5)]
    assert AgeCurve.of(thin, "save").at(12) is None
    assert AgeCurve.of([], "save").at(0) is None


def test_ages_that_few_models_reached_do_not_bend_the_curve():
    history = [verdict(f"{v}", 12, 2.0) for v in range(3)] + [verdict("0", 36, 0.1)]
    assert AgeCurve.of(history, "save").ages == (12,)


def test_baseline_is_read_from_the_gates_evidence_and_absent_where_nothing_was_measured():
    gate = {
        "primary_action": "save",
        "metrics": {
            "challenger": {"hit3": {"save": 0.5}, "interval": {"save": [0.4, 0.6]}},
            "random": {"hit3": {"save": 0.25}},
        },
    }
    found = Baseline.of(gate)
    assert found.lift == 2 and found.error == pytest.approx(0.2 / 3.92)
    gate["metrics"]["challenger"]["interval"] = {"save": [None, None]}
    assert Baseline.of(gate).error == 0
    assert (
        Baseline.of({"primary_action": "save", "metrics": dict.fromkeys(("champion", "challenger", "random"))}) is None
    )


def test_window_reaches_back_to_the_training_and_no_further():
    day = timedelta(days=1)
    assert looked_at(AS_OF, AS_OF - 10 * day) == (AS_OF - 4 * day, AS_OF)
    assert looked_at(AS_OF, AS_OF - 2 * day) == (AS_OF - 2 * day, AS_OF)
    assert looked_at(AS_OF, AS_OF + day) == (AS_OF, AS_OF)
