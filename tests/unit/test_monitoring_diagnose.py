"""The likely kind of a drift, told from which columns moved together and how."""

import numpy as np
import pytest

from monitoring.compare import Pair
from monitoring.counts import categories, numbers
from monitoring.diagnose import diagnose
from monitoring.verdict import ColumnDrift, Outcome, SliceDrift

RNG = np.random.default_rng(7)


def column(
    name: str, group: str, ratio: float, kind: str = "numeric", missing: tuple[float, float] = (0, 0)
) -> ColumnDrift:
    return ColumnDrift(name, kind, group, ratio * 0.2, 0.05, 0.2, ratio >= 1, missing)


QUIET = [
    column("user__age", "user", 0.5),
    column("user__country", "user", 0.4, "categorical"),
    column("item__lens", "item", 0.6, "categorical"),
    column("context__surface", "context", 0.3, "categorical"),
    column("item_stats__rate_7d", "statistic", 0.7),
    column("user_stats__clicks_7d", "statistic", 0.5),
    column("score_click", "prediction", 0.4),
]


def with_moved(*moved: ColumnDrift) -> list[ColumnDrift]:
    names = {c.name for c in moved}
    return [*(c for c in QUIET if c.name not in names), *moved]


def numeric_pair(name: str, before: np.ndarray, now: np.ndarray) -> Pair:
    centre = float(np.median(before))
    return Pair(name, "numeric", centre, numbers(before, centre), numbers(now, centre), {})


def test_nothing_drifted_is_none() -> None:
    assert diagnose(QUIET, {}, None, ()) == ("none", ())


def test_a_column_that_cannot_be_right_is_broken_whatever_else_moved() -> None:
    columns = with_moved(column("user__age", "user", 5), column("item__lens", "item", 5, "categorical"))
    kind, evidence = diagnose(columns, {"user__country": "is missing in all rows"}, None, ())
    assert kind == "broken"
    assert evidence[0] == "user__country is missing in all rows"


@pytest.mark.parametrize("moved", ["user__age", "item_stats__rate_7d"])
def test_one_source_that_moved_hard_and_alone_is_broken(moved: str) -> None:
    group = next(c.group for c in QUIET if c.name == moved)
    kind, evidence = diagnose(with_moved(column(moved, group, 6), column("score_click", "prediction", 2)), {}, None, ())
    assert kind == "broken"
    assert moved.split("__")[0] in evidence[0]


def test_one_profile_that_moved_mildly_is_a_population_not_a_broken_feed() -> None:
    kind, evidence = diagnose(with_moved(column("user__age", "user", 1.3)), {}, None, ())
    assert kind == "population"
    assert "user__age" in evidence[0]


def test_profiles_and_the_statistics_that_follow_are_a_population() -> None:
    moved = [
        column("user__age", "user", 3),
        column("item__lens", "item", 2, "categorical"),
        column("item_stats__rate_7d", "statistic", 3),
        column("user_stats__clicks_7d", "statistic", 4),
        column("score_click", "prediction", 3),
    ]
    kind, evidence = diagnose(with_moved(*moved), {}, None, (SliceDrift("country=nl", "item__lens", 0.6, 0.3),))
    assert kind == "population"
    assert "country=nl" in evidence[-1]


def test_statistics_and_predictions_without_profiles_are_a_behaviour() -> None:
    moved = [
        column("item_stats__rate_7d", "statistic", 3),
        column("user_stats__clicks_7d", "statistic", 2),
        column("score_click", "prediction", 3),
    ]
    off = Outcome(500, 0, {}, {}, {"click": 0.3}, {"click": 0.1}, {"click": 3.0}, 10, None, False, "")
    kind, evidence = diagnose(with_moved(*moved), {}, off, ())
    assert kind == "behaviour"
    assert evidence[0] == "click is predicted 3.00 times as often as it is observed"


def test_a_thousandfold_unit_is_broken_even_where_its_column_moved_mildly() -> None:
    ages = RNG.normal(35, 10, 20_000)
    pair = numeric_pair("user__age", ages, RNG.normal(35, 10, 2_000) * 1000)
    kind, evidence = diagnose(with_moved(column("user__age", "user", 1.1)), {}, None, (), [pair])
    assert kind == "broken"
    assert "another unit" in evidence[0]


def test_a_thousandfold_unit_is_seen_through_the_logarithm() -> None:
    before, now = RNG.poisson(2, 20_000), RNG.poisson(2, 2_000)
    pair = numeric_pair("item_stats__views", np.log1p(before), np.log1p(now * 1000.0))
    kind, evidence = diagnose(with_moved(column("item_stats__views", "statistic", 1.1)), {}, None, (), [pair])
    assert kind == "broken"
    assert "before the logarithm" in evidence[0]


def test_twice_as_much_is_no_other_unit() -> None:
    before, now = RNG.poisson(20, 20_000), RNG.poisson(40, 2_000)
    pair = numeric_pair("user_stats__clicks_7d", np.log1p(before), np.log1p(now))
    moved = [column("user_stats__clicks_7d", "statistic", 3), column("item_stats__rate_7d", "statistic", 2)]
    assert diagnose(with_moved(*moved), {}, None, (), [pair])[0] == "behaviour"


def test_a_default_that_takes_rows_from_all_values_alike_is_broken() -> None:
    before = RNG.choice([1, 2, 3, 4], 20_000, p=[0.4, 0.3, 0.2, 0.1])
    now = RNG.choice([1, 2, 3, 4], 2_000, p=[0.4, 0.3, 0.2, 0.1])
    now[RNG.random(2_000) < 0.4] = 9
    pair = Pair("item__lens", "categorical", 0, categories(before), categories(now), {9: "unknown"})
    kind, evidence = diagnose(with_moved(column("item__lens", "item", 1.5, "categorical")), {}, None, (), [pair])
    assert kind == "broken"
    assert 'default: "unknown"' in evidence[0]


def test_a_default_is_not_seen_where_other_values_moved_too() -> None:
    before = RNG.choice([1, 2, 3, 4], 20_000, p=[0.4, 0.3, 0.2, 0.1])
    now = RNG.choice([1, 2, 3, 4], 2_000, p=[0.1, 0.1, 0.2, 0.6])
    pair = Pair("item__lens", "categorical", 0, categories(before), categories(now), {})
    moved = with_moved(column("item__lens", "item", 1.5, "categorical"))
    assert diagnose(moved, {}, None, (), [pair])[0] == "population"
