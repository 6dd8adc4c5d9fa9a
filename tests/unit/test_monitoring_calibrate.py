"""Thresholds follow from the feed's own past, and hold against few, wild and thin windows."""

from datetime import timedelta

import numpy as np
import pytest

from monitoring import rules
from monitoring.calibrate import pasts, threshold
from monitoring.compare import compare
from monitoring.reference import Reference
from tests.feed_world import START, TRAINED, feed, put, window

DAY = timedelta(days=1)
KINDS = ("numeric", "categorical", "vocabulary", "embedding")
END = {"categorical": 0.83, "vocabulary": 1.0, "embedding": 1.0}  # the highest score there is


def usual(middle, spread, n, seed=0):
    return tuple(np.exp(np.random.default_rng(seed).normal(np.log(middle), spread, n)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_past_the_prior_threshold_counts(kind):
    assert threshold(kind, (), 50, 24) == rules.PRIOR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_stay_between_the_least_that_matters_and_the_most_there_can_be(kind):
    still = (rules.START[kind],) * 60
    assert threshold(kind, still, 50, 24) == pytest.approx(rules.LEAST[kind])
    wild = tuple(np.linspace(rules.START[kind] + 0.01, 0.9, 60))
    assert threshold(kind, wild, 50, 24) <= rules.MOST[kind]


def test_threshold_is_passed_by_chance_about_as_often_as_stated():
    level, passed, tries = rules.level(10), 0, 400
    for seed in range(tries):
        past = usual(0.2, 0.3, 40, seed)
        limit = threshold("numeric", past, 10, 24)
        passed += float((np.exp(np.random.default_rng(seed + 10**6).normal(np.log(0.2), 0.3, 500)) >= limit).mean())
    assert 0 < passed / tries < 2 * level


def test_threshold_grows_with_the_spread_the_columns_and_fewer_windows():
    base = threshold("numeric", usual(0.2, 0.3, 40), 50, 24)
    assert threshold("numeric", usual(0.2, 0.8, 40), 50, 24) > base
    assert threshold("numeric", usual(0.2, 0.3, 40), 500, 24) > base
    assert threshold("numeric", usual(0.2, 0.3, 40)[:4], 50, 24) > base
    assert threshold("numeric", usual(0.2, 0.3, 40), 50, 24, thin=0.5) == pytest.approx(2 * base)


def test_one_bad_day_in_the_past_does_not_excuse_the_next():
    calm = usual(0.2, 0.2, 40)
    assert threshold("numeric", (*calm, 20.0), 50, 24) < 1.5 * threshold("numeric", calm, 50, 24)


def test_past_windows_are_bounded_as_long_as_a_check_and_know_only_what_was_before_them():
    table = feed(days=28)
    whole = window(table, START, TRAINED)
    reference = Reference.of(whole, None)
    past = pasts(reference, whole)
    assert 10 < len(past) <= rules.PAST_WINDOWS and past[-1].end == TRAINED
    assert {p.end.hour for p in past} == {0, 23, 22, 21, 20, 19}  # anywhere within the blocks of the like
    assert all(p.end - p.start == timedelta(hours=reference.hours) for p in past)
    assert {(p.start - p.known).days for p in past} == set(rules.AGES)
    assert all(p.known - START >= timedelta(days=rules.PAST_DAYS) for p in past)
    scores = {n: len(s) for n, s in reference.usual.items() if not n.startswith(rules.MISSING_RISE)}
    assert set(scores.values()) == {len(past)} and len(scores) == 13


def test_feed_that_wanders_from_day_to_day_gets_wider_thresholds():
    table, still = feed(days=28, seed=5), {}
    calm = Reference.of(window(table, START, TRAINED), None)
    wandering = put(window(table, START, TRAINED), "user_profile__age", table.request_num[:, :1])
    day = (table.time - table.time[0]) // 86_400_000_000
    wandering.table.request_num[:, 0] += np.random.default_rng(0).normal(0, 6, 29)[day]
    restless = Reference.of(wandering, None)
    for made in (calm, restless):
        still[made.digest] = threshold("numeric", made.usual["user_profile__age"], 20, made.hours)
    assert still[restless.digest] > 1.5 * still[calm.digest]
    current = put(
        window(feed(days=30, seed=5), TRAINED, TRAINED + DAY),
        "user_profile__age",
        window(feed(days=30, seed=5), TRAINED, TRAINED + DAY).table.request_num[:, :1] + 20,
    )
    age = {
        made.digest: next(c for c in compare(made, current).columns if c.name == "user_profile__age")
        for made in (calm, restless)
    }
    assert age[calm.digest].drifted and not age[restless.digest].drifted


def test_past_windows_are_held_against_the_newest_that_was_known_as_a_check_is():
    table = feed(days=28)
    jumped = window(table, START, TRAINED)
    age = np.array(table.request_num[:, :1])
    age[table.time >= table.time[0] + 12 * 86_400_000_000] += 30
    made = Reference.of(put(jumped, "user_profile__age", age), None)
    # Most of the weeks before each of the last windows were another world, more than a standard deviation away.
    assert max(made.usual["user_profile__age"][-7:]) < 0.3


def test_training_window_too_short_for_a_past_falls_back_to_the_prior():
    made = Reference.of(window(feed(days=3), START, START + 3 * DAY), None)
    assert made.usual == {}
