"""One window against its like: what moved, what is broken, and what must not be called either."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from engagement.table import hash_id, micros
from monitoring import rules
from monitoring.compare import EVERYTHING, Window, compare
from monitoring.reference import Reference
from monitoring.sketch import feature_blocks
from tests.feed_world import SPEC, START, TRAINED, feed, hashed, put, window

TABLE = feed()
DAY = timedelta(days=1)
NAMES = {"user_profile__country": {hash_id("user_profile__country", c): c for c in ("nl", "de", "fr")}}


@pytest.fixture(scope="module")
def reference():
    return Reference.of(window(TABLE, START, TRAINED, NAMES), None)


def day(turn, table=TABLE):
    return window(table, TRAINED + turn * DAY, TRAINED + (turn + 1) * DAY, NAMES)


def values(of, name):
    return next(np.array(block) for feature, block in feature_blocks(of.table) if feature.name == name)


def drifted(found):
    return {c.name for c in found.columns if c.drifted}


def column(found, name):
    return next(c for c in found.columns if c.name == name)


@pytest.mark.parametrize("turn", [0, 1, 4, 5, 6])  # Monday, Tuesday, Friday, and a weekend
def test_ordinary_days_are_no_drift_nor_are_weekends_with_other_people(reference, turn):
    found = compare(reference, day(turn))
    assert drifted(found) == set() and found.broken == {}
    assert {c.name for c in found.columns} == {
        *("user_profile__country", "user_profile__age", "user_stats__clicks_7d", "item_profile__topic"),
        *("item_profile__tags", "item_profile__price", "item_profile__look", "score_save", "score_hide"),
        *("new user_id", "new item_id", "new item_profile__tags"),
    }
    assert set(found.skipped) == {"user_id", "item_id", "hour_of_day", "item_profile__fixed"}


def test_day_like_a_sunday_drifts_unless_it_is_known_as_a_holiday(reference):
    wednesday, table = 2, feed(holidays=(30,))
    # The newest that this model learned is a Tuesday, not the Sunday that such a day is like.
    tuesday = Reference.of(window(TABLE, TRAINED, TRAINED + wednesday * DAY), reference)
    assert "user_profile__country" in drifted(compare(tuesday, day(wednesday, table)))
    knowing = replace(tuesday, holidays=frozenset({(TRAINED + wednesday * DAY).date().isoformat()}))
    assert "user_profile__country" not in drifted(compare(knowing, day(wednesday, table)))


def test_shifted_number_is_found_and_told_in_its_raw_unit(reference):
    current = day(1)
    found = compare(reference, put(current, "user_stats__clicks_7d", values(current, "user_stats__clicks_7d") + 1.5))
    assert drifted(found) == {"user_stats__clicks_7d"}
    clicks = column(found, "user_stats__clicks_7d")
    assert clicks.group == "statistic" and clicks.usual < clicks.threshold < clicks.score
    before, after = (float(n) for n in clicks.note.removeprefix("median ").split(" → "))
    assert before == pytest.approx(7, abs=1.2) and after == pytest.approx(8 * np.exp(1.5) - 1, rel=0.15)


def test_scores_are_those_of_the_rows_themselves_weighed_to_the_windows_mix(reference):
    current = day(1)
    moved = values(current, "item_profile__price") * 3
    found = compare(reference, put(current, "item_profile__price", moved))
    # Items come alike at all hours, so the mix of hours does not matter.
    old = window(TABLE, START, TRAINED).table.item_num[:, 0]
    expected = wasserstein_distance(old, moved[:, 0]) / old.std()
    assert column(found, "item_profile__price").score == pytest.approx(expected, rel=0.05)


def test_category_that_takes_over_is_named(reference):
    current = day(1)
    country = values(current, "user_profile__country")
    country[::2] = hash_id("user_profile__country", "fr")
    found = compare(reference, put(current, "user_profile__country", country))
    assert drifted(found) == {"user_profile__country"}
    assert column(found, "user_profile__country").note == '"fr" 0% → 50%'
    pair = next(p for p in found.pairs if p.name == "user_profile__country")
    assert pair.names[hash_id("user_profile__country", "fr")] == "fr"


def test_list_of_categories_vectors_predictions_and_new_users_drift_by_themselves(reference):
    current = day(1)
    tags = put(current, "item_profile__tags", hash_id("item_profile__tags", "tag1"))
    assert "item_profile__tags" in drifted(compare(reference, tags))
    look = compare(reference, put(current, "item_profile__look", values(current, "item_profile__look") + 0.8))
    assert drifted(look) == {"item_profile__look"} and "centre moved" in column(look, "item_profile__look").note
    scored = compare(reference, replace(current, scores=np.sqrt(current.scores)))
    assert {"score_save", "score_hide"} >= drifted(scored) != set()
    users = values(current, "user_id")
    users[::2] = hashed("user_id", [f"new{i}" for i in range(len(users[::2]))])[:, None]
    churned = compare(reference, put(current, "user_id", users))
    assert drifted(churned) == {"new user_id"}
    assert column(churned, "new user_id").score == pytest.approx(0.5, abs=0.01)


def test_window_that_was_learned_itself_is_compared_with_what_was_before_it(reference):
    learned = window(TABLE, TRAINED - DAY, TRAINED)
    shifted = put(learned, "user_profile__age", values(learned, "user_profile__age") + 30)
    own = replace(TABLE, request_num=np.array(TABLE.request_num))
    own.request_num[(own.time >= micros(TRAINED - DAY)) & (own.time < micros(TRAINED)), 0] += 30
    knows = Reference.of(window(own, START, TRAINED), None)
    assert "user_profile__age" in drifted(compare(knows, shifted))


def test_vanished_column_is_broken_and_the_others_are_compared(reference):
    table = day(1).table
    short = replace(table, spec=replace(SPEC, features=SPEC.features[:-1]), item_num=table.item_num[:, :-1])
    age = replace(
        short, spec=replace(short.spec, features=tuple(f for f in short.spec.features if "age" not in f.name))
    )
    found = compare(reference, replace(day(1), table=replace(age, request_num=age.request_num[:, 1:])))
    assert found.broken == {
        "user_profile__age": "has vanished: the window does not hold it",
        "item_profile__fixed": "has vanished: the window does not hold it",
    }
    assert column(found, "user_stats__clicks_7d").score < column(found, "user_stats__clicks_7d").threshold


def test_column_of_another_kind_is_broken_and_a_new_one_is_left_out(reference):
    features = [replace(f, transform="log1p") if f.name == "item_profile__price" else f for f in SPEC.features]
    features[-1] = replace(features[-1], name="item_profile__added")
    table = replace(day(1).table, spec=replace(SPEC, features=tuple(features)))
    found = compare(reference, replace(day(1), table=table))
    assert "was declared as numeric of width 1, transform none, now as" in found.broken["item_profile__price"]
    assert found.skipped["item_profile__added"] == "is new: the model does not know it"


@pytest.mark.parametrize(
    ("name", "gone", "compared"),
    [
        ("user_profile__age", np.nan, False),
        ("user_profile__age", np.inf, False),
        ("user_profile__country", 0, True),  # "no value" is a category like any other
        ("item_profile__tags", 0, False),
        ("item_profile__look", np.nan, False),
    ],
)
def test_column_without_any_value_is_broken_and_stops_nothing(reference, name, gone, compared):
    found = compare(reference, put(day(1), name, gone))
    assert found.broken[name].startswith("is missing in 100% of its rows, 0%") or name == "item_profile__tags"
    assert (name in {c.name for c in found.columns}) == compared
    assert len(found.columns) >= 10


def test_third_of_the_values_missing_is_broken_though_the_rest_is_as_before(reference):
    current = day(1)
    age = values(current, "user_profile__age")
    age[::3] = np.nan
    found = compare(reference, put(current, "user_profile__age", age))
    assert found.broken == {"user_profile__age": "is missing in 33% of its rows, 0% before"}
    assert not column(found, "user_profile__age").drifted


def test_column_that_always_lacked_values_is_skipped(reference):
    nothing = put(window(TABLE, START, TRAINED), "user_profile__age", np.nan)
    knows = Reference.of(nothing, None)
    found = compare(knows, day(1))
    assert found.skipped["user_profile__age"] == "has no values in the reference"


def test_frozen_column_is_broken_and_a_constant_one_is_not(reference):
    found = compare(reference, put(day(1), "user_profile__age", 31.0))
    assert found.broken["user_profile__age"].startswith("is stuck at one value, 3")
    assert found.skipped["item_profile__fixed"] == "is the same everywhere, before and now"
    moved = compare(reference, put(day(1), "item_profile__fixed", 8.0))
    assert "item_profile__fixed" in drifted(moved)


def test_empty_and_thin_windows_are_told_and_never_called_drift(reference):
    empty = compare(reference, Window.empty(SPEC, TRAINED, TRAINED + DAY))
    assert empty.skipped == {EVERYTHING: "the window holds no requests"} and empty.columns == ()
    few = compare(reference, window(TABLE, TRAINED, TRAINED + timedelta(minutes=30)))
    assert "too few to tell" in few.skipped[EVERYTHING] and few.columns == ()
    for turn in range(20):
        start = TRAINED + timedelta(hours=8 * turn)
        assert drifted(compare(reference, window(TABLE, start, start + timedelta(hours=4)))) == set()


def test_window_in_which_nothing_was_scored_compares_its_features(reference):
    current = day(1)
    part = current.table.select(np.arange(0))
    found = compare(reference, replace(current, part=part, scores=np.zeros((0, 2))))
    assert not any(c.prediction for c in found.columns) and len(found.columns) == 10


def test_hundred_thousand_categories_are_compared_by_the_frequent_ones_and_by_what_is_new():
    rng = np.random.default_rng(0)

    def topics(of, first):
        some = first + rng.integers(0, 100_000, (of.table.rows, 1)).astype(np.uint64)
        return put(of, "item_profile__topic", (some * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(1)).astype(np.int64))

    knows = Reference.of(topics(window(TABLE, START, TRAINED), 1), None)
    assert drifted(compare(knows, topics(day(1), 1))) == set()
    other = compare(knows, topics(day(1), 10**6))
    assert column(other, "new item_profile__topic").score == 1.0
    assert "new item_profile__topic" in drifted(other)


def test_model_that_has_learned_the_new_world_for_a_day_is_at_home_in_it_and_in_the_old_one(reference):
    moved = replace(TABLE, request_num=np.array(TABLE.request_num), item_num=np.array(TABLE.item_num))
    moved.request_num[moved.time >= micros(TRAINED), 0] += 30
    moved.item_num[moved.time[moved.request_of_row] >= micros(TRAINED), 1:5] += 0.8
    found = drifted(compare(reference, day(1, moved)))
    assert {"user_profile__age", "item_profile__look"} <= found
    renewed = Reference.of(window(moved, TRAINED, TRAINED + DAY), reference)
    assert drifted(compare(renewed, day(1, moved))) == drifted(compare(renewed, day(3, moved))) == set()
    assert "user_profile__age" not in drifted(compare(renewed, day(3)))  # back to what it was
    further = put(day(1, moved), "user_profile__age", values(day(1, moved), "user_profile__age") + 30)
    assert "user_profile__age" in drifted(compare(renewed, further))


def test_model_that_has_learned_broken_data_still_calls_it_broken(reference):
    def halved(of):
        age = values(of, "user_profile__age")
        age[::2] = np.nan
        return put(of, "user_profile__age", age)

    renewed = Reference.of(halved(window(TABLE, TRAINED, TRAINED + DAY)), reference)
    assert "is missing in 50%" in compare(renewed, halved(day(1))).broken["user_profile__age"]


def test_new_values_of_a_model_that_was_long_not_renewed_are_expected(reference):
    fresh, late = (column(compare(reference, day(turn)), "new item_id") for turn in (0, 13))
    assert late.threshold == pytest.approx(
        min(fresh.threshold * 13 / rules.AGES[-1], rules.MOST["vocabulary"]), rel=0.02
    )


def test_same_windows_give_the_same_comparison(reference):
    assert compare(reference, day(3)).columns == compare(reference, day(3)).columns


def test_least_that_counts_is_between_none_and_the_prior():
    for kind, least in rules.LEAST.items():
        assert rules.START[kind] < least < rules.PRIOR[kind] < rules.MOST[kind]


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_vectors_of_very_large_or_small_numbers_are_still_told_apart(scale):
    def scaled(of, shift=0.0):
        return put(of, "item_profile__look", (values(of, "item_profile__look") + shift) * scale)

    knows = Reference.of(scaled(window(TABLE, START, TRAINED)), None)
    assert drifted(compare(knows, scaled(day(1)))) == set()
    assert drifted(compare(knows, scaled(day(1), 0.8))) == {"item_profile__look"}


def test_half_of_the_rows_without_any_tag_is_broken_however_many_tags_the_others_have(reference):
    current = day(1)
    tags = values(current, "item_profile__tags")
    usual = float((tags == 0).all(axis=1).mean())
    tags[::2] = 0
    found = compare(reference, put(current, "item_profile__tags", tags))
    assert found.broken["item_profile__tags"].startswith(f"is missing in {0.5 + usual / 2:.0%} of its rows, ")
    assert column(found, "item_profile__tags").missing == pytest.approx((usual, 0.5 + usual / 2), abs=0.01)


def test_rare_number_that_no_row_has_any_more_is_broken_and_one_too_rare_to_tell_is_skipped():
    def rarely(of, share):
        age = values(of, "user_profile__age")
        return put(of, "user_profile__age", np.where(np.random.default_rng(0).random(age.shape) < share, age, np.nan))

    knows = Reference.of(rarely(window(TABLE, START, TRAINED), 0.12), None)
    lost = compare(knows, put(day(1), "user_profile__age", np.nan))
    assert lost.broken == {"user_profile__age": "has no value at all, 12% of its rows had before"}
    barely = Reference.of(rarely(window(TABLE, START, TRAINED), 0.01), None)
    lost = compare(barely, put(day(1), "user_profile__age", np.nan))
    assert lost.broken == {} and lost.skipped["user_profile__age"] == "has no values in the window"


def test_statistics_that_new_users_lack_are_no_broken_feed_unless_nobody_is_known():
    current = day(1)
    users, clicks = values(current, "user_id"), values(current, "user_stats__clicks_7d")
    knows = Reference.of(window(TABLE, START, TRAINED), None)
    some = np.arange(len(users)) % 10 < 4
    users[some], clicks[some] = hashed("user_id", [f"new{i}" for i in range(some.sum())])[:, None], np.nan
    came = compare(knows, put(put(current, "user_id", users), "user_stats__clicks_7d", clicks))
    assert came.broken == {} and "new user_id" in drifted(came)
    lost = compare(knows, put(current, "user_stats__clicks_7d", clicks))
    assert lost.broken == {"user_stats__clicks_7d": "is missing in 40% of its rows, 0% before"}
    ids = put(current, "user_id", hashed("user_id", [f"x{i}" for i in range(len(users))])[:, None])
    renamed = compare(knows, put(ids, "user_stats__clicks_7d", np.nan))
    assert renamed.broken == {"user_stats__clicks_7d": "is missing in 100% of its rows, 0% before"}
