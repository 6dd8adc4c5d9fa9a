"""The thresholds on their boundaries, and the noise floor against brute force and against Evidently."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from engagement.importers.movielens import MANIFEST
from feature_repo.features import declare
from monitoring import noise, rules

PEOPLE = pa.schema([(name, pa.string()) for name in MANIFEST.user_features])


def test_column_drifts_at_its_threshold_and_not_below():
    assert rules.column_drifted(0.25, 0.25)
    assert not rules.column_drifted(np.nextafter(0.25, 0), 0.25)


def test_window_drifts_at_the_share_and_not_below():
    assert rules.window_drifted(rules.DRIFT_SHARE, prediction=False)
    assert not rules.window_drifted(np.nextafter(rules.DRIFT_SHARE, 0), prediction=False)


def test_window_drifts_by_its_prediction_alone():
    assert rules.window_drifted(0.0, prediction=True)


def test_trailing_numbers_of_a_view_weigh_as_much_as_one_feature():
    profiles = {"user_profile__age": True, "user_profile__country": True, "item_profile__length": False}
    trailing = {f"user_stats__impressions_{n}d": n < 4 for n in range(16)}
    assert rules.drift_share(profiles) == 2 / 3
    assert rules.drift_share(profiles | trailing) == (2 + 4 / 16) / 4
    assert rules.drift_share({}) == 0.0


def test_window_is_too_small_one_row_or_one_user_below():
    assert not rules.too_small(rules.MIN_ROWS, rules.MIN_USERS)
    assert rules.too_small(rules.MIN_ROWS - 1, rules.MIN_USERS)
    assert rules.too_small(rules.MIN_ROWS, rules.MIN_USERS - 1)


def test_missing_values_break_a_feature_at_the_stated_rise():
    assert rules.missing_broken(0.25, 0.25 + rules.BROKEN_MISSING)
    assert not rules.missing_broken(0.25, 0.25 + rules.BROKEN_MISSING - 0.01)
    assert not rules.missing_broken(0.9, 0.2)


def test_feature_is_stuck_only_if_it_varied_before():
    assert rules.stuck(rules.STUCK_SHARE, 1)
    assert not rules.stuck(np.nextafter(rules.STUCK_SHARE, 1), 1)
    assert not rules.stuck(0.1, 2)


def test_clocks_are_features_that_are_really_declared():
    spec = declare(MANIFEST, pa.schema([("genres", pa.list_(pa.string())), ("release_year", pa.float64())]), PEOPLE)
    assert set(rules.CLOCKS) <= {f.name for f in spec.features}


@pytest.fixture(scope="module")
def dealt():
    rng = np.random.default_rng(1)
    reference, current = rng.integers(0, 40, 600), rng.integers(0, 15, 300)
    values = np.where(rng.random(900) < 0.1, np.nan, rng.lognormal(0, 2, 900))
    return noise.Deal.of(reference, current), values, rng.integers(0, 12, 900)


def test_every_deal_keeps_the_number_of_users(dealt):
    deal, _, _ = dealt
    assert deal.current.shape == (noise.ROUNDS, 55)
    assert set(deal.current.sum(axis=1)) == {15}
    assert len({d.tobytes() for d in deal.current}) == noise.ROUNDS


def test_wasserstein_floor_is_the_largest_score_over_all_deals(dealt):
    deal, values, _ = dealt
    worst = 0.0
    for current in deal.current:
        side, known = current[deal.user], ~np.isnan(values)
        ref, cur = values[known & ~side], values[known & side]
        worst = max(worst, wasserstein_distance(ref, cur) / max(ref.std(), 0.001))
    assert deal.wasserstein(values) == pytest.approx(worst, rel=1e-9)


def test_jensenshannon_floor_is_the_largest_score_over_all_deals(dealt):
    deal, _, codes = dealt
    worst = 0.0
    for current in deal.current:
        side = current[deal.user]
        ref, cur = (np.bincount(codes[s], minlength=12) for s in (~side, side))
        worst = max(worst, jensenshannon(ref, cur))
    assert deal.jensenshannon(codes) == pytest.approx(worst, rel=1e-9)


def test_constant_column_has_no_noise(dealt):
    deal, values, codes = dealt
    assert deal.wasserstein(np.full_like(values, 3.0)) == 0.0
    assert deal.jensenshannon(np.zeros_like(codes)) == 0.0


def test_floor_counts_users_not_rows():
    """The same 2,000 rows by 20 users who are each alike carry far more noise than by 2,000 users."""
    few, many = np.arange(1000) % 20, np.arange(1000)
    by_user = np.random.default_rng(0).normal(size=20)
    values = np.concatenate([by_user[few], by_user[few][::-1]])
    assert noise.Deal.of(few, few).wasserstein(values) > 3 * noise.Deal.of(many, many).wasserstein(values)


def test_false_alarms_stay_at_the_stated_rate():
    """Two windows out of one population: at most about one column in `ROUNDS + 1` may pass its floor."""
    rng, passed = np.random.default_rng(5), 0
    for _ in range(150):
        users = rng.normal(size=60)
        owner = rng.integers(0, 60, 400)
        values = users[owner] + 0.3 * rng.normal(size=400)
        reference = owner < 40
        order = np.argsort(~reference, kind="stable")
        values, n = values[order], int(reference.sum())
        deal = noise.Deal.of(owner[order][:n], owner[order][n:])
        score = wasserstein_distance(values[:n], values[n:]) / values[:n].std()
        passed += score > deal.wasserstein(values)
    assert passed <= 5
