"""The simulated canaries: the rivals judge as their projects document it, and the worlds hold the harm they name."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.canary.drive import METHODS, drive
from benchmarks.canary.report import wilson
from benchmarks.canary.rivals import Flagger, classify
from benchmarks.canary.traffic import Scenario, World


def test_mann_whitney_calls_equal_points_pass_and_shifted_ones_by_their_side():
    points = np.random.default_rng(0).standard_normal(50)
    other = np.random.default_rng(1).standard_normal(50)
    assert classify(points, points) == "Pass"
    assert classify(points + 3, other) == "High" and classify(points - 3, other) == "Low"
    assert classify(np.full(50, np.nan), points) == "Nodata"


def test_mann_whitney_drops_nan_and_far_outliers():
    points = np.random.default_rng(0).standard_normal(50)
    assert classify(np.concatenate([points, [np.nan, 1e9]]), points) == "Pass"


@pytest.mark.parametrize(("threshold", "expected"), [(1, ["fail"]), (3, ["go on", "go on", "fail"])])
def test_flagger_fails_when_as_many_checks_have_failed_as_its_threshold(threshold, expected):
    world, flagger = World(Scenario("broken", errors=0.5), 1), Flagger(0.99, 1e9, threshold)
    assert [flagger.look(world.look(50)) for _ in expected] == expected


def test_users_stay_in_their_arm_and_who_is_in_stays_in():
    world = World(Scenario("as good", harmful=False), 2)
    ten, again, half = (world.look(p).evidence for p in (10, 10, 50))
    assert not np.intersect1d(ten.challenger.user_N, again.champion.user_N).size
    assert not np.intersect1d(ten.challenger.user_N, half.champion.user_N).size
    assert 0.05 < len(ten.challenger) / (len(ten.challenger) + len(ten.champion)) < 0.15


def test_a_loss_of_hits_is_of_the_size_that_was_asked_for_and_known_late():
    world, hits = World(Scenario("worse", hits=0.8), 3), []
    for look in range(12):
        now = world.look(0).evidence.pairs.hits_P2
        known = now[np.isfinite(now).all(1)]
        assert bool(len(known)) == (look >= 6)
        hits.append(known)
    champion, challenger = np.concatenate(hits).mean(0)
    assert challenger / champion == pytest.approx(0.8, abs=0.03)


def test_a_harmful_model_is_taken_back_before_any_user_sees_it_and_flagger_lets_it_pass():
    harm = Scenario("HIT@3 -20 %", hits=0.8)
    assert drive(harm, METHODS[0], 4).exposed == 0
    assert drive(harm, METHODS[5], 4).promoted
    assert not drive(replace(harm, live_only=True, errors=0.3, hits=1.0), METHODS[5], 4).promoted


def test_interval_of_no_false_alarm_in_five_hundred_ends_below_one_per_cent():
    assert wilson(0, 520)[1] < 0.01 < wilson(3, 520)[1]
