import numpy as np
import pytest

from model import continual_metrics as cm


def in_data(*values):
    """(B,) of the data alone, and resamples equal to it."""
    return [np.full(3, v, float) for v in values]


def matrices(R, requests=10):
    """Hits and requests of a lower triangle of means, as `matrix` gives them."""
    R = np.array(R, float)
    R[np.triu_indices(len(R), 1)] = np.nan
    return np.repeat((R * requests)[None], 3, 0), np.full((3, len(R)), float(requests))


R = [[0.8, 0, 0], [0.9, 0.6, 0], [0.5, 0.4, 0.7]]


def test_backward_transfer_compares_the_last_model_with_each_windows_own():
    assert cm.backward_transfer(cm.ratings(*matrices(R)))[0] == pytest.approx(((0.5 - 0.8) + (0.4 - 0.6)) / 2)


def test_forgetting_compares_the_last_model_with_the_best_before_it():
    assert cm.forgetting(cm.ratings(*matrices(R)))[0] == pytest.approx(((0.9 - 0.5) + (0.6 - 0.4)) / 2)


def test_which_model_was_best_is_not_chosen_again_in_a_resample():
    hits_BIJ, requests_BJ = matrices(R)
    hits_BIJ[1, 0, 0] = 50.0  # here another model would be best
    assert cm.forgetting(cm.ratings(hits_BIJ, requests_BJ))[1] == pytest.approx(((0.9 - 0.5) + (0.6 - 0.4)) / 2)


def test_memory_is_pooled_over_requests_and_starts_after_the_history():
    hits_BIJ, _ = matrices([[8, 0, 0, 0], [8, 6, 0, 0], [8, 3, 2, 0], [8, 2, 1, 9]], requests=1)
    lost = cm.memory(hits_BIJ)
    assert {lag: v[0] for lag, v in lost.items()} == {
        0: 0.0,
        1: pytest.approx(1 - (3 + 1) / (6 + 2)),
        2: pytest.approx(1 - 2 / 6),
    }


def test_stability_is_the_mean_below_the_diagonal():
    assert cm.stability(cm.ratings(*matrices(R)))[0] == pytest.approx((0.9 + 0.5 + 0.4) / 3)


def test_a_window_without_exam_is_left_out_and_not_counted_as_zero():
    hits_BIJ, requests_BJ = matrices(R)
    hits_BIJ[:, 1:, 1], requests_BJ[:, 1] = 0, 0
    assert cm.backward_transfer(cm.ratings(hits_BIJ, requests_BJ))[0] == pytest.approx(0.5 - 0.8)


def test_one_model_has_forgotten_nothing_that_could_be_measured():
    R_BIJ = cm.ratings(*matrices([[0.5]]))
    assert cm.estimate(cm.forgetting(R_BIJ)) is None and cm.estimate(cm.backward_transfer(R_BIJ)) is None


def test_share_of_a_resolved_gap():
    strategy_B, finetune_B, scratch_B = in_data(1.05, 1.0, 1.2)
    closed = cm.gap_closed(strategy_B, finetune_B, scratch_B)
    assert closed["why_none"] == "" and closed["share"]["value"] == pytest.approx(0.25)
    assert closed["gap"]["value"] == pytest.approx(0.2)


def test_gap_that_may_be_zero_has_no_share():
    scratch_B = np.array([1.01, 0.9, 1.1, 0.95, 1.05])
    closed = cm.gap_closed(np.full(5, 1.0), np.full(5, 1.0), scratch_B)
    assert closed["why_none"] == "gap not resolved" and closed["share"] is None
    assert closed["gap"]["low"] < 0 < closed["gap"]["high"]


def test_scratch_that_is_behind_leaves_no_gap_to_close():
    strategy_B, finetune_B, scratch_B = in_data(1.05, 1.0, 0.9)
    closed = cm.gap_closed(strategy_B, finetune_B, scratch_B)
    assert closed["why_none"] == "scratch is behind" and closed["share"] is None


def test_strategies_share_the_resamples():
    rng = np.random.default_rng(0)
    hits_Q = rng.integers(0, 4, 200)
    users = cm.Users([rng.integers(0, 20, 200)], 50)
    first, second, more = users.sums(0, np.stack([hits_Q, hits_Q, hits_Q + 1], 1))
    assert (cm.relative(first.mean_B, second.mean_B) == 0).all()
    assert np.allclose(more.mean_B - first.mean_B, 1)  # though the means themselves move
    assert first.mean_B.std() > 0


def test_users_are_drawn_whole_and_together_in_every_window():
    user = np.array(["a"] * 5 + ["b"] * 3)
    users = cm.Users([user, user[::-1]], 100)
    (first,), (second,) = users.sums(0, np.ones((8, 1))), users.sums(1, np.ones((8, 1)))
    assert set(first.requests_B) <= {6.0, 8.0, 10.0} and len(set(first.requests_B)) == 3  # bb, ab, aa
    assert (first.requests_B == second.requests_B).all() and first.requests_B[0] == 8


def test_chosen_requests_are_matched_with_their_own_users():
    users = cm.Users([np.array(["a", "b", "a", "c"])], 40)
    (of_a,) = users.sums(0, np.array([[1], [1]]), np.array([True, False, True, False]))
    assert (of_a.hits_B == of_a.requests_B).all() and set(of_a.requests_B % 2) == {0.0}


def test_interval_has_its_nominal_coverage():
    rng, inside = np.random.default_rng(1), 0
    for trial in range(200):
        of_user = rng.normal(1.0, 0.5, 60)
        user = np.repeat(np.arange(60), 4)
        hits_QM = (of_user[user] + rng.normal(0, 0.3, 240))[:, None]
        found = cm.estimate(cm.Users([user], 200, seed=trial).sums(0, hits_QM)[0].mean_B)
        inside += found["low"] <= 1.0 <= found["high"]
    assert 0.89 <= inside / 200 <= 0.99


def test_all_ages_are_compared_on_the_windows_that_the_oldest_saw():
    tested = {(w, a): cm.Sums(*in_data(10 * w + a, 1)) for w in range(1, 5) for a in range(w)}
    assert cm.comparable_ages((0, 1, 2, 4, 8), 4) == (0, 1, 2)
    fresh = cm.freshness(tested, (0, 1, 2))
    assert {a: v[0] for a, v in fresh.items()} == {0: 35.0, 1: 36.0, 2: 37.0}  # windows 3 and 4


@pytest.mark.parametrize(("windows", "ages"), [(1, (0,)), (2, (0, 1)), (3, (0, 1)), (16, (0, 1, 2, 4, 8))])
def test_ages_that_few_windows_can_test_are_left_out(windows, ages):
    assert cm.comparable_ages((0, 1, 2, 4, 8), windows) == ages


def test_no_request_gives_no_number():
    users = cm.Users([np.array([], np.uint64)], 10)
    (nothing,) = users.sums(0, np.zeros((0, 1)))
    assert cm.estimate(nothing.mean_B) is None
