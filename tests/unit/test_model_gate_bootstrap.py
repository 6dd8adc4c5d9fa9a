"""The gate's intervals: against formulas and loops, and against the truth."""

import numpy as np
import pytest

from model.bootstrap import MOST, Ratios, one_sided, ratios, strata_of, sums_by_user


def drawn_users(users: int, seed: int) -> np.ndarray:
    return 1 + np.random.default_rng(seed).poisson(np.linspace(0, 6, users))


def test_sums_by_user_equal_a_loop():
    rng = np.random.default_rng(0)
    user = np.unique(rng.integers(0, 7, 50), return_inverse=True)[1]
    values = rng.normal(size=(50, 2))
    by_loop = [values[user == u].sum(0) for u in range(user.max() + 1)]
    assert sums_by_user(values, user) == pytest.approx(np.array(by_loop))


def test_error_of_a_ratio_is_cochrans_by_strata():
    rng, counts = np.random.default_rng(1), drawn_users(60, 1)
    x, y = rng.normal(size=60) + counts, counts + rng.random(60)
    found, strata = ratios(x[:, None], y[:, None], counts, 10, 0), strata_of(counts)
    e = x - x.sum() / y.sum() * y
    square = sum((s := e[strata == h]).var(ddof=1) * len(s) for h in np.unique(strata))
    assert len(np.unique(strata)) == 3
    assert found.error_M[0] == pytest.approx(np.sqrt(square) / y.sum())


def test_each_resample_draws_whole_users_within_their_stratum():
    """In a resample every stratum keeps its number of users: sums of ones by stratum never change."""
    counts = np.repeat([1, 5, 9], 20)
    one = np.stack([counts == c for c in (1, 5, 9)], 1).astype(float)
    found = ratios(one, np.ones_like(one), counts, 50, 0)
    assert found.drawn_BM == pytest.approx(np.full((50, 3), 1 / 3))


def test_all_quantities_share_their_resamples():
    rng, counts = np.random.default_rng(2), drawn_users(40, 2)
    a, b = rng.normal(size=(2, 40))
    found = ratios(np.stack([a, b, a - b], 1), np.tile(counts[:, None], 3), counts, 30, 0)
    assert found.drawn_BM[:, 0] - found.drawn_BM[:, 1] == pytest.approx(found.drawn_BM[:, 2])


def test_light_medium_heavy_users_are_parted_and_small_strata_joined():
    assert np.bincount(strata_of(np.repeat([1, 4, 30], 15))).tolist() == [15, 15, 15]
    assert np.bincount(strata_of(np.repeat([1, 4, 30], [40, 15, 5]))).tolist() == [40, 20]
    assert strata_of(np.array([3, 1, 2])).tolist() == [0, 0, 0]
    assert strata_of(np.ones(50)).tolist() == [0] * 50


def test_identical_models_differ_by_zero_with_certainty():
    counts = drawn_users(40, 3)
    found = ratios(np.zeros((40, 1)), counts[:, None].astype(float), counts, 200, 0).estimates(0.95)[0]
    assert (found.value, found.low, found.high, found.error) == (0, 0, 0, 0)


def test_an_action_of_one_user_has_no_upper_bound():
    counts, hits = np.full(40, 3), np.zeros((40, 1))
    hits[7] = 1
    found = ratios(hits, counts[:, None].astype(float), counts, 500, 0).estimates(0.95)[0]
    assert found.low <= 0 < found.value and found.high == np.inf


def test_many_users_are_pooled_without_changing_the_answer():
    rng = np.random.default_rng(4)
    counts = 1 + rng.poisson(2, 5 * MOST)
    x = (rng.normal(size=len(counts)) * counts + 0.1)[:, None]
    e = x[:, 0] - x.sum() / counts.sum() * counts
    found = ratios(x, counts[:, None].astype(float), counts, 200, 0)
    assert found.value_M[0] == pytest.approx(x.sum() / counts.sum())
    assert found.error_M[0] == pytest.approx(np.sqrt((e**2).sum()) / counts.sum(), rel=0.1)


@pytest.mark.parametrize(("users", "per_user"), [(20, 5), (60, 5)])
def test_interval_covers_the_truth_as_often_as_it_says_even_with_few_users(users, per_user):
    rng, pairs = np.random.default_rng(users), 1000
    counts = 1 + rng.multinomial(users * per_user - users, rng.dirichlet(np.ones(users)))
    own = rng.normal(size=(users, pairs))  # users differ, and their requests are alike
    sums = own * counts[:, None] + rng.normal(size=(users, pairs)) * np.sqrt(counts)[:, None]
    found: Ratios = ratios(sums, np.tile(counts[:, None].astype(float), pairs), counts, 400, 0)
    low, high = found.bounds(0.95)
    assert 0.92 <= np.mean((low < 0) & (high > 0)) <= 0.99
    percentile = np.quantile(found.drawn_BM, [0.025, 0.975], axis=0)
    assert np.mean((percentile[0] < 0) & (percentile[1] > 0)) < np.mean((low < 0) & (high > 0))


def test_one_sided_p_is_uniform_at_the_edge_of_its_hypothesis():
    rng = np.random.default_rng(5)
    p = np.array([one_sided(rng.normal(size=25)) for _ in range(2000)])
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.015)
    assert one_sided(np.full(5, -1.0)) == 0 and one_sided(np.zeros(5)) == 1
