"""The gate's verdicts, on data where the truth is known; what others read of them."""

import json
from dataclasses import replace

import numpy as np

from engagement.table import Feature, RankingTable, TableSpec
from model import gate_rules as rules
from model.cost import Cost
from model.gate import judge, tags_of
from model.gate_evidence import Evidence, Exam, measure, stability_index
from model.metrics import hit3, hits

SPEC = TableSpec((Feature("item_id", "candidate", "categorical"),), ("save", "hide"), "save", ("hide",))
STD = 0.01


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
    """Probabilities in the order of `by_row`, calibrated where that is the utility."""
    return np.stack([1 / (1 + np.exp(1.5 - by_row))] * 2, 1).astype(np.float32)


def noisy(utility: np.ndarray, noise: float, seed: int) -> np.ndarray:
    return scores(utility + noise * np.random.default_rng(seed).normal(size=len(utility)))


def evidence(challenger, champion=None, table=None, **more) -> Evidence:
    """Of a challenger that was trained to a later instant, unless told otherwise."""
    more = {"newer": champion is not None, "seed_std": STD, "ece": 0.01, **more}
    return measure(table or world()[0], challenger, champion, 0, **more)


def outcome(verdict, rule):
    return next(r for r in verdict.rules if r.rule == rule)


def test_first_model_goes_live_when_better_than_chance():
    table, utility = world()
    verdict = judge(evidence(scores(utility)))
    assert verdict.verdict == "promote" and "first model" in verdict.reason
    assert verdict.metrics["champion"] is None and verdict.difference is None


def test_first_model_worse_than_chance_is_held():
    _, utility = world()
    verdict = judge(evidence(scores(-utility)))
    assert verdict.verdict == "hold" and "random order" in verdict.reason


def test_equal_update_is_promoted_as_fresher_and_a_much_worse_one_held_as_worse():
    table, utility = world(2000, 400)
    good, bad = noisy(utility, 0.3, 1), noisy(utility, 2.5, 2)
    equal = judge(evidence(noisy(utility, 0.3, 7), good, table))
    assert equal.verdict == "promote" and equal.reason.endswith("not worse than the champion, and fresher")
    held = judge(evidence(bad, good, table))
    assert held.verdict == "hold" and "worse than the champion" in held.reason
    better = judge(evidence(good, bad, table, newer=False))
    assert better.verdict == "promote" and "and better" in better.reason and better.difference["save"]["value"] > 0.1


def test_equal_model_trained_to_the_same_instant_is_not_worth_a_rollout():
    table, utility = world(2000, 400)
    champion, same = noisy(utility, 0.3, 1), noisy(utility, 0.3, 3)
    held = judge(evidence(same, champion, table, newer=False))
    assert held.verdict == "hold" and held.reason.startswith("neither better nor cheaper nor fresher")
    slow, fast = Cost(4.0, 10_000, 20_000), Cost(3.0, 10_000, 20_000)
    cheaper = judge(evidence(same, champion, table, newer=False, costs=(fast, slow)))
    assert cheaper.verdict == "promote" and cheaper.reason.endswith("and cheaper")


def test_better_cannot_be_claimed_while_nobody_knows_how_much_seeds_differ():
    table, utility = world(2000, 400)
    good, bad = noisy(utility, 0.3, 1), noisy(utility, 2.5, 2)
    held = judge(evidence(good, bad, table, newer=False, seed_std=None))
    assert held.verdict == "hold" and "how much seeds differ is not known" in held.reason


def test_undecided_is_not_enough_evidence_and_names_the_requests_missing():
    table, utility = world(120, 30)
    verdict = judge(evidence(noisy(utility, 1.0, 1), noisy(utility, 1.0, 2), table))
    assert verdict.verdict == "hold" and verdict.reason.startswith("not enough evidence")
    numbers = outcome(verdict, "not worse").numbers
    assert numbers["requests_missing"] == numbers["requests_needed"] - 120 > 100
    assert f"{numbers['requests_missing']:,.0f} more comparable requests are missing" in verdict.reason


def test_requests_that_the_verdict_asks_for_do_decide_between_equal_models():
    table, utility = world(200, 50)
    asked = judge(evidence(noisy(utility, 0.5, 1), noisy(utility, 0.5, 2), table))
    needed = int(outcome(asked, "not worse").numbers["requests_needed"])
    assert needed > 500
    passed = 0
    for seed in range(5):
        table, utility = world(needed, needed // 4, seed=seed + 1)
        e = evidence(noisy(utility, 0.5, 1), noisy(utility, 0.5, 2), table)
        passed += rules.not_worse(e.difference["save"].low)
    assert passed >= 3  # 80 % were aimed at


def test_too_few_requests_are_told_with_the_number_needed():
    table, utility = world(rules.MIN_REQUESTS - 1, 40)
    verdict = judge(evidence(scores(utility), None, table))
    assert verdict.verdict == "hold" and f"{rules.MIN_REQUESTS - 1} comparable requests" in verdict.reason
    assert outcome(verdict, "evidence").numbers["requests_missing"] == 1
    table, utility = world(rules.MIN_REQUESTS, 40)
    assert judge(evidence(scores(utility), None, table)).verdict == "promote"


def test_scores_that_are_not_numbers_or_all_the_same_are_held():
    _, utility = world()
    broken = scores(utility)
    broken[3, 0] = np.nan
    assert "not finite" in judge(evidence(broken, scores(utility))).reason
    assert "same score" in judge(evidence(np.ones_like(broken))).reason


def test_a_proven_rise_of_a_negative_action_holds():
    table, utility = world(2000, 400)
    hidden = table.labels[:, 1] * 0.6  # still ranks saves nearly as well, but pushes hides up
    verdict = judge(evidence(scores(utility + hidden), scores(utility), table))
    assert not outcome(verdict, "hide not worse").passed and verdict.verdict == "hold"
    assert outcome(judge(evidence(scores(utility), scores(utility + hidden), table)), "hide not worse").passed


def test_forgetting_the_past_holds_an_update_that_is_good_today():
    table, utility = world()
    past, then = world(1500, 300, seed=5)
    exam = Exam(past, noisy(then, 2.0, 1), scores(then))
    verdict = judge(evidence(scores(utility), scores(utility), table, exam=exam))
    assert verdict.verdict == "hold" and verdict.reason.startswith("forgets")
    same = replace(exam, challenger=exam.champion)
    assert judge(evidence(scores(utility), scores(utility), table, exam=same)).verdict == "promote"


def test_scores_may_shift_only_where_better_calibration_explains_it():
    _, utility = world()
    right, wrong = scores(utility), scores(utility - 2)
    fixed = judge(evidence(right, wrong))
    assert outcome(fixed, "scores").numbers["psi"] > rules.PSI_LIMIT and fixed.verdict == "promote"
    spoiled = judge(evidence(wrong, right, ece=None))
    assert not outcome(spoiled, "scores").passed and not outcome(spoiled, "calibration").passed


def test_a_model_that_became_slow_or_large_is_held():
    _, utility = world()
    old = Cost(4.0, 10_000, 20_000)
    for new, told in ((Cost(6.5, 10_000, 20_000), "too slow"), (Cost(4.0, 20_001, 20_000), "too large")):
        verdict = judge(evidence(scores(utility), scores(utility), costs=(new, old)))
        assert verdict.verdict == "hold" and verdict.reason.startswith(told)


def test_no_requests_at_all_is_a_hold_not_a_crash():
    table, utility = world(10, 5, size=3)  # three candidates: nothing to tell apart
    verdict = judge(evidence(scores(utility), scores(utility), table))
    assert verdict.verdict == "hold" and verdict.requests == 0 and verdict.skipped_requests == 10
    told = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert told["metrics"]["challenger"]["hit3"]["save"] is None and verdict.to_markdown()


def test_one_user_is_too_little_for_any_interval_and_no_crash():
    table, utility = world(200, 1)
    verdict = judge(evidence(noisy(utility, 1, 1), noisy(utility, 1, 2), table))
    assert verdict.verdict == "hold" and "1 users" in verdict.reason
    assert verdict.metrics["challenger"]["interval"]["save"] == [0.0, 3.0]
    json.dumps(verdict.to_json(), allow_nan=False)


def test_every_rule_is_recorded_although_an_early_one_failed():
    table, utility = world(50, 10)
    verdict = judge(evidence(scores(utility), scores(utility), table))
    assert not verdict.rules[1].passed
    assert [r.rule for r in verdict.rules] == [
        "finite", "evidence", "floor", "not worse", "worth it", "slices", "hide not worse", "forgetting",
        "calibration", "scores",
    ]  # fmt: skip


def test_interval_holds_the_measured_value_and_the_verdict_is_plain_json():
    table, utility = world()
    verdict = judge(evidence(noisy(utility, 1, 1), noisy(utility, 1, 2)))
    low, high = verdict.metrics["challenger"]["interval"]["save"]
    assert low < verdict.metrics["challenger"]["hit3"]["save"] < high
    assert verdict.metrics["challenger"]["hit3"] == hit3(hits(table, noisy(utility, 1, 1)))
    told = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert told["difference"]["save"]["value"] == verdict.difference["save"]["value"]
    assert "| save |" in verdict.to_markdown()
    assert [r["rule"] for r in told["rules"]] == [r.rule for r in verdict.rules]


def test_tags_name_every_rule_with_its_outcome():
    table, utility = world(50, 10)
    tags = tags_of(judge(evidence(scores(utility), scores(utility), table)).to_json())
    assert tags["gate.evidence"].startswith("fail: not enough evidence: 50 comparable requests")
    assert tags["gate.hide_not_worse"].startswith("pass: HIT@3/hide")


def test_same_seed_same_verdict_other_seed_other_bounds():
    table, utility = world()
    one, two, three = (judge(measure(table, noisy(utility, 1, 1), noisy(utility, 1, 2), s)) for s in (0, 0, 1))
    assert one == two
    assert one.metrics != three.metrics


def test_stability_index_is_the_textbook_sum_and_zero_for_the_same_scores():
    rng = np.random.default_rng(0)
    before, after = rng.random(5000), rng.random(5000) ** 2
    assert stability_index(before, before) == 0
    edges = np.r_[-np.inf, np.quantile(before, np.arange(1, 10) / 10), np.inf]
    p, q = ((np.histogram(s, edges)[0] + 0.5) / 5005 for s in (before, after))
    assert np.isclose(stability_index(before, after), ((q - p) * np.log(q / p)).sum(), rtol=1e-6)
    assert stability_index(before, after) > rules.PSI_LIMIT > stability_index(before, before + 0.02)
