"""Always-valid statistics: how often they are wrong when they are looked at again and again, and whether they see."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from serving.judge_facts import Events
from serving.sequential import (
    CountRatio,
    Distinct,
    GroupedMean,
    Growth,
    Split,
    mixed,
    multiplier,
    pack,
    rate_bounds,
    unpack,
)

ALPHA = 0.05


def most(runs: int, alpha: float = ALPHA) -> int:
    """So many false alarms of `runs` are exceeded by luck once in ten thousand times when the rate is `alpha`."""
    return int(binom.ppf(0.9999, runs, alpha))


@pytest.mark.parametrize("tuned", [100, 3000])
def test_bound_on_a_mean_is_crossed_by_few_walks_over_thousands_of_looks(tuned):
    rng, runs, looks = np.random.default_rng(1), 1500, 3000
    sums = rng.standard_normal((runs, looks)).cumsum(1)
    bound = [multiplier(t, tuned, ALPHA) * np.sqrt(t) for t in range(1, looks + 1)]
    assert (sums > bound).any(1).sum() <= most(runs)
    fixed = 1.645 * np.sqrt(np.arange(1, looks + 1))
    assert (sums > fixed).any(1).mean() > 0.3  # what looking does to a test that is made for one look


def sticky(rng, looks, per_look, users=400, effect=0.0):
    """Portions of two arms; users keep their arm and their level (half of the variance)."""
    level_U, arm_U = rng.standard_normal(users), rng.random(users) < 0.3
    asks_U = rng.lognormal(0, 1, users)
    for _ in range(looks):
        user_N = rng.choice(users, per_look, p=asks_U / asks_U.sum())
        x_N = level_U[user_N] + rng.standard_normal(per_look) + rng.standard_normal() + effect * arm_U[user_N]
        yield x_N, user_N, arm_U[user_N]


def test_difference_of_arms_with_sticky_users_is_not_found_where_there_is_none():
    runs, false, naive = 120, 0, 0
    for run in range(runs):
        stat, sums, alarm, careless = GroupedMean(), [], False, False
        for x_N, user_N, ours_N in sticky(np.random.default_rng([2, run]), 30, 200):
            stat.add_arms(x_N[~ours_N], user_N[~ours_N], x_N[ours_N], user_N[ours_N])
            low, high = stat.bounds(ALPHA / 2, 500)
            alarm |= low > 0 or high < 0
            sums.append((x_N[ours_N].mean() - x_N[~ours_N].mean(), 2 / ours_N.sum() + 2 / (~ours_N).sum()))
            mean, variance = np.mean([s[0] for s in sums]), np.sum([s[1] for s in sums]) / len(sums) ** 2
            careless |= abs(mean) > multiplier(stat.time, 500, ALPHA / 2) * np.sqrt(variance)
        false, naive = false + alarm, naive + careless
    assert false <= most(runs)
    assert naive > most(runs)  # requests taken as independent


def test_difference_of_arms_is_found_and_its_size_is_inside_the_bounds():
    found = 0
    for run in range(20):
        stat = GroupedMean()
        for x_N, user_N, ours_N in sticky(np.random.default_rng([3, run]), 30, 200, effect=0.8):
            stat.add_arms(x_N[~ours_N], user_N[~ours_N], x_N[ours_N], user_N[ours_N])
        low, high = stat.bounds(0.01, 500)
        found += low > 0
        assert low < 0.8 < high
    assert found >= 16


def test_growing_share_in_a_slow_hour_is_no_difference():
    rng, stat = np.random.default_rng(4), GroupedMean()
    for share, hour in ((0.01, 0.0), (0.1, 1.0), (0.5, 5.0)):
        user_N = rng.integers(0, 5000, 4000)
        x_N, ours_N = hour + 0.1 * rng.standard_normal(4000), user_N < 5000 * share
        stat.add_arms(x_N[~ours_N], user_N[~ours_N], x_N[ours_N], user_N[ours_N])
    assert abs(stat.estimate) < 0.05


def test_ratio_of_totals_is_that_of_all_requests_and_unknown_without_any():
    stat = GroupedMean()
    assert np.isnan(stat.estimate) and stat.bounds(0.1, 10) == (-np.inf, np.inf)
    stat.add(np.array([3.0, 1.0]), np.array([4.0, 4.0]), np.array([1, 2]))
    stat.add(np.array([2.0]), np.array([0.0]), np.array([1]))
    assert stat.estimate == pytest.approx(6 / 8)


def test_arms_with_no_requests_on_one_side_say_nothing():
    stat = GroupedMean()
    stat.add_arms(np.ones(5), np.arange(5), np.empty(0), np.empty(0, np.int64))
    assert stat.n == 0 and np.isnan(stat.estimate)


def test_bet_on_more_errors_is_seldom_won_where_there_are_not_more():
    rng, runs, looks = np.random.default_rng(5), 300, 100
    a, b = rng.poisson(0.002 * 990, (runs, looks)), rng.poisson(0.002 * 10, (runs, looks))
    false = 0
    for run in range(runs):
        bet, alarm = CountRatio(), False
        for x, y in zip(a[run], b[run], strict=True):
            bet.add(x, y, (990, 10), 1.0)
            alarm |= bet.log_wealth >= -np.log(ALPHA)
        false += alarm
    assert 0 < false <= most(runs)


def test_bet_on_more_errors_is_won_soon_at_one_per_cent_of_the_users():
    bet, rng, asked = CountRatio(), np.random.default_rng(6), 0
    while bet.log_wealth < np.log(1000):
        bet.add(int(rng.binomial(9900, 0.0005)), int(rng.binomial(100, 0.02)), (9900, 100), 1.5)
        asked += 100
    assert asked <= 800


def test_users_whose_requests_always_fail_are_not_held_against_the_arm_they_are_in():
    runs, false, naive = 150, 0, 0
    for run in range(runs):
        rng = np.random.default_rng([7, run])
        users, prone_U = np.arange(1000), np.zeros(1000, bool)
        prone_U[rng.choice(1000, 12, replace=False)] = True
        ours_U = rng.random(1000) < 0.1
        events, each, alarm, careless = Events(), CountRatio(), False, False
        for _ in range(20):
            user_N = rng.choice(users, 300)
            bad_N, ours_N = prone_U[user_N], ours_U[user_N]
            events.add(bad_N[~ours_N], user_N[~ours_N], bad_N[ours_N], user_N[ours_N], 1.0)
            each.add(bad_N[~ours_N].sum(), bad_N[ours_N].sum(), ((~ours_N).sum(), ours_N.sum()), 1.0)
            alarm |= events.bet.log_wealth >= -np.log(ALPHA)
            careless |= each.log_wealth >= -np.log(ALPHA)
        false, naive = false + alarm, naive + careless
    assert false <= most(runs)
    assert naive > 2 * ALPHA * runs


def test_fair_split_is_seldom_called_a_mismatch_and_a_bent_one_is_found():
    rng, runs, looks = np.random.default_rng(8), 400, 300
    ours = rng.binomial(20, 0.1, (runs, looks)).cumsum(1)
    false = 0
    for row in ours:
        wealth = [Split(int(c), 20 * n).log_wealth(0.1) for n, c in zip(range(1, looks + 1, 6), row[::6], strict=True)]
        false += max(wealth) >= -np.log(ALPHA)
    assert false <= most(runs)
    assert Split(320, 4000).log_wealth(0.1) > np.log(100)
    assert Split(400, 4000).log_wealth(0.1) < 0


def test_bounds_on_a_rate_hold_over_all_looks_and_close_in():
    rng, runs, rate = np.random.default_rng(9), 150, 0.003
    looks = np.unique(np.geomspace(20, 20_000, 15).astype(int))
    below = above = 0
    for _ in range(runs):
        events = rng.binomial(np.diff(looks, prepend=0), rate).cumsum()
        bounds = np.array([rate_bounds(int(e), int(n), ALPHA) for e, n in zip(events, looks, strict=True)])
        below, above = below + (bounds[:, 0] > rate).any(), above + (bounds[:, 1] < rate).any()
    assert max(below, above) <= most(runs)
    low, high = rate_bounds(60, 20_000, ALPHA)
    assert 0.0015 < low < rate < high < 0.005
    assert rate_bounds(0, 0, ALPHA) == (0.0, 1.0) and rate_bounds(5, 5, ALPHA)[1] == 1.0


def test_growth_of_wild_symmetric_jumps_is_seldom_called_a_leak():
    rng, runs, looks = np.random.default_rng(10), 400, 120
    jumps = rng.standard_t(1.5, (runs, looks))
    false = 0
    for row in jumps:
        growth, alarm = Growth(), False
        for x in row:
            growth.add(float(x), 1.0, 0.0)
            alarm |= growth.total > growth.radius(ALPHA, 10.0)
        false += alarm
    assert false <= most(runs)


def test_one_jump_however_high_is_no_leak_and_a_steady_rise_is():
    jump, rise = Growth(), Growth()
    for k in range(40):
        jump.add(1000.0 if k == 3 else 0.0, 1.0, 0.1)
        rise.add(3.0, 1.0, 0.1)
    assert jump.total < jump.radius(0.01, 100.0)
    assert rise.total > rise.radius(0.01, 100.0)


def test_users_are_counted_once_and_thinned_alike_in_both_arms():
    seen, users = Distinct(), np.arange(100_000)
    assert seen.new(users[:10], users[10:30]) == (10, 20)
    assert seen.new(users[:20], users[:0]) == (0, 0)
    for start in range(0, 100_000, 10_000):
        a, b = seen.new(users[start : start + 5000], users[start + 5000 : start + 10_000])
        if start > 30_000:  # by now few are counted, of both arms
            assert 0 < a < 2500 and 0 < b < 2500 and abs(a - b) < 6 * np.sqrt(a + b)
    assert len(seen.hash_N) <= 4096


def test_hashes_of_neighbouring_users_spread_over_their_range():
    shares = np.bincount((mixed(np.arange(64_000)) % np.uint64(64)).astype(int), minlength=64) / 1000
    assert shares.min() > 0.85 and shares.max() < 1.15
    assert int(mixed(np.array([-1, 2**62])).max()) < 2**53


def test_states_survive_json_exactly():
    events, rng = Events(), np.random.default_rng(11)
    events.add(rng.random(50) < 0.5, np.arange(50), rng.random(9) < 0.5, np.arange(60, 69), 1.5)
    again = unpack(Events(), json.loads(json.dumps(pack(events))))
    assert pack(again) == pack(events)
    assert again.bet.log_wealth == events.bet.log_wealth and again.users.hash_N.dtype == np.int64
