"""The judge's rules, each on its boundary."""

from dataclasses import replace

import numpy as np
import pytest

from serving.judge import CONSTANT_RANGE, MAX_ERROR_RATE, MIN_ANSWERS, SCORE_TOLERANCE, Answer, judge

ITEMS = ("a", "b", "c")
TRUTH = np.array([[0.1, 0.5], [0.9, 0.5], [0.4, 0.5]], np.float32)  # rows in the order of ITEMS, column 0 primary
ORDER = (1, 2, 0)


def answer(i: int, wanted: str = "2") -> Answer:
    return Answer(
        request_id=f"r{i}",
        item_ids=ITEMS,
        wanted=wanted,
        status=200,
        latency_ms=5.0,
        version=wanted,
        ranked=tuple(ITEMS[o] for o in ORDER),
        scores=TRUTH[list(ORDER)],
    )


def decide(answers, expected=None):
    truth = {a.request_id: TRUTH for a in answers} if expected is None else expected
    return judge(answers, truth, challenger="2", primary=0)


def test_expected_answers_pass():
    assert decide([answer(i) for i in range(MIN_ANSWERS)]).outcome == "pass"


def test_one_answer_fewer_than_needed_is_inconclusive():
    verdict = decide([answer(i) for i in range(MIN_ANSWERS - 1)])
    assert (verdict.outcome, verdict.rule) == ("inconclusive", "too few")


def test_no_answer_at_all_never_counts_as_success():
    assert decide([]).outcome == "inconclusive"


def test_champions_answers_do_not_count_as_the_challengers():
    assert decide([answer(i, wanted="1") for i in range(50)]).outcome == "inconclusive"


@pytest.mark.parametrize("wanted", ["1", "2"])
def test_error_rate_fails_above_its_bound_and_not_on_it(wanted):
    total = round(1 / MAX_ERROR_RATE)
    answers = [answer(i) for i in range(MIN_ANSWERS)] if wanted == "1" else []
    answers += [answer(1000 + i, wanted) for i in range(total)]
    on = [replace(answers[-1], status=500, error="boom"), *answers[:-1]]
    assert decide(on).outcome == "pass"
    over = [replace(answers[-2], status=503, error="bang"), on[0], *answers[:-2]]
    verdict = decide(over)
    assert (verdict.outcome, verdict.rule) == ("fail", "errors")
    assert "bang" in verdict.reason and f"2 of {total}" in verdict.reason


def test_answer_by_the_champion_in_the_challengers_place_is_an_error():
    answers = [answer(i) for i in range(10)]
    answers[3] = replace(answers[3], version="1")
    verdict = decide(answers)
    assert (verdict.outcome, verdict.rule) == ("fail", "errors")
    assert "version 1 answered in its place" in verdict.reason


def test_failed_requests_outrank_too_few_answers():
    assert decide([replace(answer(0), status=0, version="")]).outcome == "fail"


@pytest.mark.parametrize(
    "change",
    [
        {"ranked": ("b", "c"), "scores": TRUTH[[1, 2]]},
        {"ranked": ("b", "c", "x")},
        {"ranked": ("b", "b", "c")},
        {"scores": np.empty((0, 0), np.float32)},
        {"scores": TRUTH[[1, 2]]},
    ],
    ids=["one-candidate-less", "foreign-item", "one-twice", "no-scores", "one-score-less"],
)
def test_missing_predictions_fail(change):
    answers = [answer(i) for i in range(10)]
    answers[4] = replace(answers[4], **change)
    assert decide(answers).rule == "missing"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_non_finite_score_fails(value):
    answers = [answer(i) for i in range(10)]
    scores = answers[7].scores.copy()
    scores[2, 1] = value
    answers[7] = replace(answers[7], scores=scores)
    assert decide(answers).rule == "non-finite"


def test_score_off_by_more_than_the_tolerance_fails_and_by_the_tolerance_passes():
    for off, rule in ((0.9 * SCORE_TOLERANCE, ""), (1.1 * SCORE_TOLERANCE, "wrong")):
        scores = TRUTH[list(ORDER)].copy()
        scores[0, 1] += np.float32(off)
        assert decide([*(answer(i) for i in range(9)), replace(answer(9), scores=scores)]).rule == rule


def test_scores_of_the_right_values_on_the_wrong_items_fail():
    assert decide([replace(answer(i), ranked=("a", "c", "b")) for i in range(9)]).rule == "wrong"


def test_answer_without_a_known_truth_fails():
    answers = [answer(i) for i in range(9)]
    assert decide(answers, {a.request_id: TRUTH for a in answers[1:]}).rule == "wrong"


def test_ranking_against_its_own_scores_fails():
    up = (0, 2, 1)
    wrong = replace(answer(9), ranked=tuple(ITEMS[o] for o in up), scores=TRUTH[list(up)])
    assert decide([*(answer(i) for i in range(9)), wrong]).rule == "order"


def test_constant_scores_fail_only_when_all_answers_are_constant():
    flat = np.full((3, 2), 0.5, np.float32)
    answers = [replace(answer(i), ranked=ITEMS, scores=flat) for i in range(9)]
    truth = {a.request_id: flat for a in answers}
    assert decide(answers, truth).rule == "constant"
    assert decide([*answers, answer(9)], truth | {"r9": TRUTH}).outcome == "pass"


def test_scores_that_differ_by_more_than_the_constant_range_are_not_constant():
    for spread, rule in ((CONSTANT_RANGE, "constant"), (4 * CONSTANT_RANGE, "")):
        scores = np.zeros((3, 2))
        scores[0, 0] = spread
        answers = [replace(answer(i), ranked=ITEMS, scores=scores) for i in range(9)]
        assert decide(answers, {a.request_id: scores for a in answers}).rule == rule
