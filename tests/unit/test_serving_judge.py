"""The judge's rules, each on its boundary, and what it makes of missing data, crashes and the order of stages."""

from dataclasses import replace

import numpy as np
import pytest

from serving.evidence import Arm, Evidence, Pairs
from serving.judge import Judge, homefeed, laptop
from serving.judge_facts import ANYTHING, Facts
from serving.judge_rules import CONSTANT_ANSWERS, LEAST_BEYOND, LEAST_PROVEN, TESTS, findings


def arm(n, failed=0, invalid=0, constant=0, ms=20.0, first_user=0):
    flags = [np.arange(n) < k for k in (failed, invalid, constant)]
    latency = np.where(flags[0], np.nan, ms)
    users = np.arange(first_user, first_user + n)
    return Arm(*flags, np.zeros(n, bool), latency, np.full(n, 0.1), users)


def pairs(n, failed=0, invalid=0, ms=1.0, score=1.0, hits=1.0, both_fail=0):
    """The champion's numbers differ from request to request, the challenger's are the same times a factor."""
    base = 1.0 + np.arange(n) % 3
    failed_P2 = np.stack([np.arange(n) < both_fail, np.arange(n) < max(failed, both_fail)], 1)
    invalid_P2 = np.stack([np.zeros(n, bool), np.arange(n) < invalid], 1)
    return Pairs(
        failed_P2,
        invalid_P2,
        np.stack([base, base * ms], 1) * 16,
        np.stack([base, base * score], 1) / 16,
        np.stack([base, base * hits], 1),
        np.arange(n),
    )


def dark(rules, **changes):
    return Judge(rules).look(Evidence(0, pairs=pairs(**({"n": 300} | changes))))


def outcome(judgement, rule):
    return next(f.outcome for f in judgement.findings if f.rule == rule)


LENIENT = replace(homefeed(), error_excess=(1.0, 1.0), tail=(ANYTHING, ANYTHING))  # for what 300 pairs can show


def test_a_sound_challenger_passes_and_every_finding_says_on_how_many_requests():
    judgement = dark(LENIENT)
    assert (judgement.outcome, judgement.rule) == ("pass", "")
    assert {f.n for f in judgement.findings if f.demanded} == {300}


@pytest.mark.parametrize("rules", [homefeed(), laptop()])
def test_no_evidence_at_all_is_no_success(rules):
    for percent in (0, 1, 10, 50, 100):
        assert Judge(rules).look(Evidence(percent)).outcome == "inconclusive"
    assert Judge(rules, first=True).look(Evidence(100)).outcome == "inconclusive"


def test_champions_requests_do_not_count_as_the_challengers():
    assert Judge(laptop()).look(Evidence(10, champion=arm(60))).outcome == "inconclusive"


@pytest.mark.parametrize(("rule", "change"), [("scores", {"score": np.nan}), ("latency (shadow)", {"ms": np.nan})])
def test_what_is_missing_keeps_the_stage_open(rule, change):
    judgement = dark(LENIENT, **change)
    assert judgement.outcome == "inconclusive" and outcome(judgement, rule) == "inconclusive"


def test_labels_that_are_missing_keep_the_stage_open_at_scale_and_not_on_a_laptop():
    assert outcome(dark(LENIENT, hits=np.nan), "quality") == "inconclusive"
    assert dark(laptop(), hits=np.nan).outcome == "pass"


def test_one_invalid_answer_fails_and_no_lost_request_among_many_does():
    judgement = dark(LENIENT, invalid=1)
    assert (judgement.outcome, judgement.rule) == ("fail", "invalid")
    live = Evidence(10, champion=arm(900), challenger=arm(100, invalid=1, first_user=900))
    assert Judge(homefeed()).look(live).rule == "invalid"
    lost = Evidence(10, champion=arm(900), challenger=arm(100, failed=1, first_user=900))
    assert Judge(homefeed()).look(lost).outcome == "inconclusive"


def test_what_fails_both_versions_is_not_the_challengers_fault():
    assert outcome(dark(LENIENT, both_fail=200), "errors (shadow)") == "pass"
    assert dark(LENIENT, failed=200).rule == "errors (shadow)"


def test_requests_needed_are_fewer_below_five_per_cent_and_one_fewer_is_too_few():
    rules = replace(homefeed(), requests=100)
    assert [rules.needed(p) for p in (0, 1, 4, 5, 100)] == [100, 20, 80, 100, 100]
    assert outcome(dark(rules, n=99), "requests") == "inconclusive"
    assert outcome(dark(rules, n=100), "requests") == "pass"
    assert laptop().needed(1) == 1


@pytest.mark.parametrize(("failed", "expected"), [(1, "pass"), (2, "inconclusive")])
def test_laptop_allows_one_per_cent_of_failed_requests_and_no_more(failed, expected):
    live = Evidence(10, champion=arm(100), challenger=arm(100, failed=failed, first_user=100))
    assert outcome(Judge(laptop()).look(live), "errors") == expected
    alone = Evidence(100, challenger=arm(100, failed=failed))
    assert Judge(laptop(), first=True).look(alone).outcome == expected


def test_a_first_model_that_fails_often_is_taken_back_and_a_dead_one_at_once():
    judge = Judge(laptop(), first=True)
    judgement = judge.look(Evidence(100, challenger=replace(arm(60, failed=60), problems=("status 500",))))
    assert (judgement.outcome, judgement.rule) == ("fail", "errors alone")
    assert "status 500" in judgement.reason


def test_errors_with_no_champion_beside_them_do_not_thin_out_those_with_one():
    judge = Judge(homefeed())
    judge.look(Evidence(50, arm(400), arm(400, failed=4, first_user=400)))
    judgement = judge.look(Evidence(100, challenger=arm(8000)))
    found = {f.rule: f for f in judgement.findings}
    assert (found["errors"].n, found["errors"].value) == (400, 0.01)
    assert (found["errors alone"].n, found["errors alone"].outcome) == (8000, "pass")


def test_a_first_model_is_judged_on_shadow_requests_too():
    p = pairs(300, failed=100)
    nothing = np.array([np.nan, 1.0])
    alone = replace(p, latency_P2=p.latency_P2 * nothing, score_P2=p.score_P2 * nothing, hits_P2=p.hits_P2 * nothing)
    assert Judge(homefeed(), first=True).look(Evidence(0, pairs=alone)).rule == "errors alone"


@pytest.mark.parametrize(("name", "field"), [("scores", "score"), ("quality", "hits"), ("latency (shadow)", "ms")])
@pytest.mark.parametrize(("at", "expected"), [(0, "inconclusive"), (-1, "pass"), (1, "inconclusive")])
def test_a_margin_itself_is_not_excluded_and_a_little_better_is(name, field, at, expected):
    rules = replace(LENIENT, score=(4.0, 2.0), quality=(0.5, 0.75), shift=(4.0, 2.0))
    margin = {"hits": 0.75, "score": 2.0, "ms": 2.0 * (1 + 1e-12)}[field]  # logarithms are not exact
    better = -1 if field == "hits" else 1
    judgement = dark(rules, **{field: margin * (1 + better * at * 1e-6)})
    assert outcome(judgement, name) == expected


@pytest.mark.parametrize(
    ("name", "field", "margin", "worse"),
    [("scores", "score", 2.0, 1), ("scores", "score", 0.5, -1), ("quality", "hits", 0.5, -1)]
    + [("latency (shadow)", "ms", 2.0, 1), ("spread", "score", 4.0, 1), ("spread", "score", 0.25, -1)],
    ids=str,
)
def test_a_margin_itself_does_not_fail_and_a_little_more_does(name, field, margin, worse):
    spread = (16.0, 99.0) if name == "spread" else (99.0, 999.0)
    score = (99.0, 999.0) if name == "spread" else (2.0, 3.0)
    rules = replace(LENIENT, score=score, spread=spread, quality=(0.5, 0.4), shift=(2.0, 3.0))
    assert outcome(dark(rules, **{field: margin}), name) != "fail"
    assert outcome(dark(rules, **{field: margin * (1 + worse * 1e-6)}), name) == "fail"


def test_fewer_than_so_many_requests_exclude_nothing():
    assert outcome(dark(LENIENT, n=LEAST_PROVEN - 1), "quality") == "inconclusive"
    assert outcome(dark(LENIENT, n=LEAST_PROVEN), "quality") == "pass"


def test_constant_scores_fail_when_all_of_five_are_and_not_of_four():
    for n, expected in ((CONSTANT_ANSWERS - 1, "pass"), (CONSTANT_ANSWERS, "fail")):
        live = Evidence(50, champion=arm(n), challenger=arm(n, constant=n, first_user=n))
        assert outcome(Judge(laptop()).look(live), "constant") == expected
        assert outcome(Judge(laptop(), first=True).look(replace(live, champion=Arm())), "constant") == expected
    some = Evidence(50, champion=arm(20), challenger=arm(20, constant=3, first_user=20))
    assert outcome(Judge(laptop()).look(some), "constant") == "pass"


@pytest.mark.parametrize("tests_name", ["errors", "errors (shadow)", "constant"])
def test_a_bet_fails_the_challenger_when_its_wealth_reaches_the_level(tests_name):
    facts = Facts()
    events = {"errors": facts.live_errors, "errors (shadow)": facts.shadow_errors, "constant": facts.constant}[
        tests_name
    ]
    events.asked, events.bad = np.array([100.0, 100.0]), np.array([0.0, 1.0])
    facts.flat = np.array([100.0, 1.0])
    level = np.log(TESTS / homefeed().alpha)
    for wealth, fails in ((level, True), (level - 1e-9, False)):
        events.bet.log_J = np.full(len(events.bet.log_J), wealth)
        found = next(f for f in findings(facts, homefeed(), 10, False) if f.rule == tests_name)
        assert (found.outcome == "fail") == fails


def test_tail_of_too_few_slow_requests_says_nothing():
    facts, rng = Facts(), np.random.default_rng(0)
    user = np.arange(20_000)
    a, b = (20 * np.exp(0.5 * rng.standard_normal(20_000)) for _ in range(2))
    facts.shadow_latency.add(a, user, b * 3, user, homefeed().tail, paired=True)
    for beyond, expected in ((LEAST_BEYOND - 1, "inconclusive"), (LEAST_BEYOND, "fail")):
        facts.shadow_latency.beyond = beyond
        found = next(f for f in findings(facts, homefeed(), 0, False) if f.rule == "p99 (shadow)")
        assert found.outcome == expected


def test_a_tail_alone_that_grows_fails_though_the_middle_does_not():
    rng, facts, user = np.random.default_rng(1), Facts(), np.arange(20_000)
    a, b = (20 * np.exp(0.5 * rng.standard_normal(20_000)) for _ in range(2))
    facts.shadow_latency.add(a, user, np.where(rng.random(20_000) < 0.02, b * 4, b), user, homefeed().tail, paired=True)
    found = {f.rule: f.outcome for f in findings(facts, homefeed(), 0, False)}
    assert found["p99 (shadow)"] == "fail" and found["latency (shadow)"] == "pass"


def leaking(judge, mb, looks, percent=50):
    rng, memory = np.random.default_rng(2), np.array([900.0, 700.0])
    for _ in range(looks):
        memory = memory + [0.0, mb * 4]
        now = memory + rng.standard_normal(2)
        evidence = Evidence(percent, arm(4000), arm(4000, first_user=4000), memory_mb=(float(now[0]), float(now[1])))
        judgement = judge.look(evidence)
    return next(f for f in judgement.findings if f.rule == "memory")


def test_a_slow_leak_is_found_and_a_steady_process_passes():
    assert leaking(Judge(homefeed()), 2.0, 40).outcome == "fail"
    steady = leaking(Judge(homefeed()), 0.0, 60)
    assert steady.outcome == "pass" and steady.low < 0 < steady.high


def test_memory_is_demanded_from_half_of_the_users_on_and_not_on_a_laptop():
    assert not leaking(Judge(homefeed()), 0.0, 2, percent=10).demanded
    assert leaking(Judge(homefeed()), 0.0, 2, percent=50).demanded
    assert "memory" not in {f.rule for f in dark(laptop()).findings}


def test_unknown_memory_is_no_success_at_scale():
    judge = Judge(homefeed())
    for _ in range(3):
        judgement = judge.look(Evidence(100, challenger=arm(4000)))
    assert outcome(judgement, "memory") == "inconclusive"


@pytest.mark.parametrize(("ours", "expected"), [(100, "pass"), (200, "fail")])
def test_users_of_a_bent_split_fail_it(ours, expected):
    evidence = Evidence(10, arm(1000 - ours), arm(ours, first_user=1000))
    assert outcome(Judge(homefeed()).look(evidence), "split") == expected


def test_split_waits_for_enough_distinct_users():
    rules = replace(homefeed(), users=100)
    judge, once = Judge(rules), Evidence(10, arm(89), arm(10, first_user=1000))
    assert outcome(judge.look(once), "split") == "inconclusive"
    assert outcome(judge.look(once), "split") == "inconclusive"  # the same users again
    assert outcome(judge.look(Evidence(10, arm(0), arm(1, first_user=5000))), "split") == "pass"


@pytest.mark.filterwarnings("error")
def test_bounds_of_very_few_requests_are_no_warning():
    few = Pairs(
        np.zeros((3, 2), bool), latency_P2=np.array([[1.0, 9.0], [5.0, 1.0], [2.0, 90.0]]), user_P=np.array([1, 1, 2])
    )
    judgement = Judge(laptop()).look(Evidence(0, pairs=few))
    (found,) = [f for f in judgement.findings if f.rule == "latency (shadow)"]
    assert found.high == np.inf and found.low == 0.0


def test_the_last_look_of_a_stage_says_that_it_was_the_last():
    judge = Judge(replace(laptop(), looks=3))
    said = [judge.look(Evidence(10)).exhausted for _ in range(3)]
    assert said == [False, False, True]
    assert judge.look(Evidence(50)).exhausted is False  # a new stage has looks of its own
    assert "not shown within 3 looks" in [judge.look(Evidence(50)).reason for _ in range(2)][-1]


def test_what_a_stage_has_shown_stays_shown_at_the_next_unless_later_evidence_turns_it():
    judge = Judge(LENIENT)
    judge.look(Evidence(0, pairs=pairs(300)))
    live = Evidence(1, arm(990), arm(20, first_user=990))
    assert outcome(judge.look(live), "quality") == "pass"
    worse = judge.look(replace(live, pairs=pairs(9000, hits=0.5)))
    assert (worse.outcome, worse.rule) == ("fail", "quality")


def test_labels_that_come_later_are_no_new_requests():
    judge, late = Judge(LENIENT), pairs(300)
    nothing = np.full((300, 2), np.nan)
    judge.look(Evidence(0, pairs=replace(late, hits_P2=nothing)))
    judgement = judge.look(Evidence(0, pairs=replace(late, latency_P2=nothing, score_P2=nothing)))
    assert judgement.outcome == "pass"
    assert {f.n for f in judgement.findings if f.demanded} == {300}


def test_a_judge_that_was_written_down_goes_on_as_if_nothing_had_happened():
    rng, kept, crashed = np.random.default_rng(3), Judge(homefeed()), Judge(homefeed())
    for percent in (0, 0, 1, 1, 10, 10):
        p = pairs(200, ms=float(rng.uniform(0.9, 1.1)), both_fail=3)
        evidence = Evidence(percent, arm(500, failed=2), arm(40, failed=1, first_user=500), p, (900.0, rng.normal(700)))
        crashed = Judge.from_json(crashed.to_json())
        said, again = kept.look(evidence), crashed.look(evidence)
        assert repr(said) == repr(again)
    assert kept.to_json() == crashed.to_json()
    assert Judge.from_json(Judge(laptop(), first=True).to_json()).first
