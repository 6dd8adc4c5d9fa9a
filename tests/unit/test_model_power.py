"""Power analysis against simulation."""

import numpy as np
import pytest
from scipy import stats

from model.power import power, requests_needed


def test_needed_requests_give_the_power_that_they_were_needed_for():
    needed = requests_needed(0.03, 0.05, 400, 5000, 0.95, 0.8)
    assert power(0.03 * np.sqrt(400 / needed), 0.05, 5000, 0.95) == pytest.approx(0.8, abs=0.002)
    assert needed == pytest.approx(400 * 7.849 * (0.03 / 0.05) ** 2, rel=0.01)  # (1.96 + 0.84)^2


def test_predicted_power_is_what_simulated_intervals_do():
    rng, error, users = np.random.default_rng(0), 0.02, 30
    values = rng.normal(0, error, 20_000)
    errors = error * np.sqrt(rng.chisquare(users - 1, 20_000) / (users - 1))
    excluded = values - stats.t.ppf(0.975, users - 1) * errors > -0.05
    assert np.mean(excluded) == pytest.approx(power(error, 0.05, users, 0.95), abs=0.02)


def test_fewer_users_need_more_requests():
    few, many = (requests_needed(0.03, 0.05, 400, users, 0.95, 0.8) for users in (20, 2000))
    assert few > many


def test_no_number_of_requests_excludes_a_margin_that_the_truth_is_beyond():
    assert requests_needed(0.03, 0.0, 400, 50, 0.95, 0.8) == np.inf
    assert requests_needed(np.inf, 0.05, 400, 1, 0.95, 0.8) == np.inf
    assert power(0.0, 0.05, 50, 0.95) == 1.0
