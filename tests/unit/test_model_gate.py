"""The gate: each rule on its boundary, its verdicts on data where the truth is known."""

import json

import numpy as np
import pytest

from engagement.table import Feature, RankingTable, TableSpec
from model import gate_rules as rules
from model.bootstrap import interval, resample_means
from model.gate import judge
from model.metrics import hit3, hits

SPEC = TableSpec((Feature("item_id", "candidate", "categorical"),), ("save", "hide"), "save", ("hide",))


def world(requests: int = 400, users: int = 80, size: int = 10, seed: int = 0) -> tuple[RankingTable, np.ndarray]:
    """Requests whose labels follow a hidden utility; returns the table and each row's utility."""
    rng = np.random.default_rng(seed)
    rows = requests * size
    utility = rng.normal(size=rows)
    labels = np.stack([rng.random(rows) < 1 / (1 + np.exp(1.5 - utility)), rng.random(rows) < 0.05], 1).astype(np.uint8)
    zeros = np.zeros(requests, np.int64)
    table = RankingTable(
        spec=SPEC,
        request_id=np.array([f"r{i}" for i in range(requests)], "S"),
        user_id=np.array([f"u{i % users}" for i in range(requests)], "S"),
        time=np.arange(requests),
        offsets=np.arange(requests + 1) * size,
        history_start=zeros,
        history_end=zeros,
        request_cat=np.zeros((requests, 0), np.int64),
        request_num=np.zeros((requests, 0), np.float32),
        item_id=np.array([f"i{i}" for i in range(rows)], "S"),
        item_cat=np.zeros((rows, 1), np.int64),
        item_num=np.zeros((rows, 0), np.float32),
        labels=labels,
        sampled=np.zeros(rows, bool),
        history_time=np.zeros(0, np.int64),
        history_item=np.zeros(0, np.int64),
        history_actions=np.zeros(0, np.int64),
    )
    return table, utility


def scores(by_row: np.ndarray) -> np.ndarray:
    return np.stack([by_row, by_row], 1).astype(np.float32)


def noisy(utility: np.ndarray, noise: float, seed: int) -> np.ndarray:
    return scores(utility + noise * np.random.default_rng(seed).normal(size=len(utility)))


def test_first_model_goes_live_when_better_than_chance():
    table, utility = world()
    verdict = judge(table, scores(utility), None, seed=0)
    assert verdict.verdict == "promote" and "first model" in verdict.reason
    assert verdict.metrics["champion"] is None and verdict.difference is None


def test_first_model_worse_than_chance_is_held():
    table, utility = world()
    verdict = judge(table, scores(-utility), None, seed=0)
    assert verdict.verdict == "hold" and "random order" in verdict.reason


def test_equal_model_is_promoted_and_much_worse_is_held_as_worse():
    table, utility = world(2000, 400)
    good, bad = noisy(utility, 0.3, 1), noisy(utility, 2.5, 2)
    assert judge(table, noisy(utility, 0.3, 3), good, seed=0).verdict == "promote"
    held = judge(table, bad, good, seed=0)
    assert held.verdict == "hold" and "worse than the champion" in held.reason
    better = judge(table, good, bad, seed=0)
    assert better.verdict == "promote" and better.difference["save"]["value"] > 0.1


def test_too_wide_an_interval_is_not_enough_evidence_rather_than_worse():
    table, utility = world(120, 30)
    verdict = judge(table, noisy(utility, 1.0, 1), noisy(utility, 1.0, 2), seed=0)
    assert verdict.verdict == "hold" and verdict.reason.startswith("not enough evidence")


def test_too_few_requests_are_told_with_the_number_needed():
    table, utility = world(rules.MIN_REQUESTS - 1, 40)
    verdict = judge(table, scores(utility), None, seed=0)
    assert verdict.verdict == "hold" and f"{rules.MIN_REQUESTS - 1} comparable requests" in verdict.reason
    table, utility = world(rules.MIN_REQUESTS, 40)
    assert judge(table, scores(utility), None, seed=0).verdict == "promote"


def test_scores_that_are_not_numbers_or_all_the_same_are_held():
    table, utility = world()
    broken = scores(utility)
    broken[3, 0] = np.nan
    assert "not finite" in judge(table, broken, None, seed=0).reason
    assert "same score" in judge(table, np.ones_like(broken), None, seed=0).reason


def test_a_proven_rise_of_a_negative_action_holds():
    table, utility = world(2000, 400)
    champion = scores(utility)
    hidden = table.labels[:, 1] * 0.6  # still ranks saves nearly as well, but pushes hides up
    verdict = judge(table, scores(utility + hidden), champion, seed=0)
    assert verdict.difference["hide"]["interval"][0] > rules.NEGATIVE_MARGIN
    assert verdict.verdict == "hold"


def test_no_requests_at_all_is_a_hold_not_a_crash():
    table, utility = world(10, 5, size=3)  # three candidates: nothing to tell apart
    verdict = judge(table, scores(utility), scores(utility), seed=0)
    assert verdict.verdict == "hold" and verdict.requests == 0 and verdict.skipped_requests == 10
    told = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert told["metrics"]["challenger"]["hit3"]["save"] is None


def test_interval_holds_the_measured_value_and_the_verdict_is_plain_json():
    table, utility = world()
    verdict = judge(table, noisy(utility, 1, 1), noisy(utility, 1, 2), seed=0)
    low, high = verdict.metrics["challenger"]["interval"]["save"]
    assert low < verdict.metrics["challenger"]["hit3"]["save"] < high
    assert verdict.metrics["challenger"]["hit3"] == hit3(hits(table, noisy(utility, 1, 1)))
    told = json.loads(json.dumps(verdict.to_json()))
    assert told["difference"]["save"]["value"] == verdict.difference["save"]["value"]
    assert "| save |" in verdict.to_markdown()


def test_same_seed_same_verdict_other_seed_other_bounds():
    table, utility = world()
    one, two, three = (judge(table, noisy(utility, 1, 1), noisy(utility, 1, 2), seed=s) for s in (0, 0, 1))
    assert one == two
    assert one.difference["save"]["interval"] != three.difference["save"]["interval"]


@pytest.mark.parametrize(
    ("rule", "at", "beyond"),
    [
        (rules.not_worse, -rules.MARGIN, -rules.MARGIN + 1e-9),  # strictly above the margin
        (rules.proven_worse, 0.0, -1e-9),
    ],
)
def test_strict_rules_fail_on_their_boundary(rule, at, beyond):
    assert not rule(at) and rule(beyond)


@pytest.mark.parametrize(
    ("rule", "at", "beyond"),
    [(rules.above_random, 0.0, -1e-9), (rules.negative_not_worse, rules.NEGATIVE_MARGIN, rules.NEGATIVE_MARGIN + 1e-9)],
)
def test_inclusive_rules_pass_on_their_boundary(rule, at, beyond):
    assert rule(at) and not rule(beyond)


def test_evidence_rule_on_its_boundary():
    assert rules.enough(rules.MIN_REQUESTS, rules.MIN_USERS)
    assert not rules.enough(rules.MIN_REQUESTS - 1, rules.MIN_USERS)
    assert not rules.enough(rules.MIN_REQUESTS, rules.MIN_USERS - 1)


def test_bootstrap_resamples_whole_users():
    """Against a loop over users, resample by resample."""
    rng = np.random.default_rng(0)
    user, values = rng.integers(0, 7, 50), rng.normal(size=(50, 2))
    user = np.unique(user, return_inverse=True)[1]
    drawn = resample_means(values, user, 20, seed=3)
    users = user.max() + 1
    picks = np.random.default_rng(3).integers(0, users, (20, users))
    for b in range(20):
        rows = np.concatenate([np.flatnonzero(user == u) for u in picks[b]])
        assert drawn[b] == pytest.approx(values[rows].mean(0))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(200):
        user = np.repeat(np.arange(60), 5)
        values = np.repeat(rng.normal(size=60), 5)[:, None] + rng.normal(size=(300, 1))  # users differ
        low, high = interval(resample_means(values, user, 400, seed=i)[:, 0], 0.95)
        covered += low < 0 < high
    assert 0.88 <= covered / 200 <= 0.99
