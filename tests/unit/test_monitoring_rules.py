"""The rules on their boundaries."""

import numpy as np
import pyarrow as pa
import pytest

from engagement.importers.movielens import MANIFEST
from feature_repo.features import declare
from monitoring import rules

PEOPLE = pa.schema([(name, pa.string()) for name in MANIFEST.user_features])


def test_column_drifts_at_its_threshold_and_not_below():
    assert rules.column_drifted(0.25, 0.25)
    assert not rules.column_drifted(np.nextafter(0.25, 0), 0.25)


def test_window_is_too_small_one_row_or_one_user_below():
    assert not rules.too_small(rules.MIN_ROWS, rules.MIN_USERS)
    assert rules.too_small(rules.MIN_ROWS - 1, rules.MIN_USERS)
    assert rules.too_small(rules.MIN_ROWS, rules.MIN_USERS - 1)


def test_missing_values_break_a_feature_at_the_stated_rise_and_above_what_is_usual():
    assert rules.missing_broken(0.25, 0.25 + rules.BROKEN_MISSING)
    assert not rules.missing_broken(0.25, 0.24 + rules.BROKEN_MISSING)
    assert not rules.missing_broken(0.9, 0.2)
    assert not rules.missing_broken(0.0, 0.29, usual=0.1)
    assert rules.missing_broken(0.0, 0.31, usual=0.1)
    assert rules.missing_broken(0.0, rules.GONE_MISSING, usual=0.4)


def test_feature_is_stuck_only_if_it_varied_before():
    assert rules.stuck(rules.STUCK_SHARE, 1)
    assert not rules.stuck(np.nextafter(rules.STUCK_SHARE, 1), 1)
    assert not rules.stuck(0.1, 2)


def test_level_shares_the_false_alarms_of_a_month_between_columns_and_episodes():
    assert rules.level(50) * 50 * 720 / rules.EPISODE_HOURS == pytest.approx(rules.FALSE_ALARMS)
    assert rules.level(0) == rules.level(1)


def test_only_new_values_may_be_further_away_the_older_a_model_is():
    assert rules.aged("vocabulary", 2 * rules.AGES[-1]) == 2
    assert rules.aged("vocabulary", -1) == rules.aged("numeric", 100) == 1


def test_thin_windows_are_scaled_by_the_root_of_their_users_and_full_ones_are_not():
    assert rules.thin(25, 100) == pytest.approx(0.5)
    assert rules.thin(400, 100) == rules.thin(100, 100) == 1.0
    assert rules.thin(0, 0) == 1.0


def test_features_that_rules_name_are_really_declared():
    spec = declare(MANIFEST, pa.schema([("genres", pa.list_(pa.string())), ("release_year", pa.float64())]), PEOPLE)
    assert {*rules.CLOCKS, *rules.TRAILING} <= {f.name for f in spec.features}


def test_a_trailing_number_that_looks_back_further_than_the_log_is_not_compared():
    from datetime import timedelta

    assert rules.still_filling("item_stats__impressions_30d", timedelta(days=29, hours=23))
    assert not rules.still_filling("item_stats__impressions_30d", timedelta(days=30))
    assert not rules.still_filling("item_stats__impressions_1h", timedelta(0))
