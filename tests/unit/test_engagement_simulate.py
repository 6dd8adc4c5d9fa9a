"""The simulator: what it writes is in the contract, and its truth is what the world's laws say."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from engagement.errors import EvergreenError
from engagement.importers import contract_dir
from engagement.simulate.draw import ACTIONS, DAY_US, blocks, half_time, populate
from engagement.simulate.worlds import START, WORLDS, Scale, World, drift, market, recurring, shock, world
from engagement.simulate.write import simulate
from engagement.store import EngagementStore

LATER = datetime(2025, 1, 1, tzinfo=UTC)
SMALL = Scale.of(users=60, days=42, impressions=6000, seed=3)


@pytest.fixture(scope="module", params=sorted(WORLDS))
def feed(request, tmp_path_factory):
    """A written feed: its name, directory, engagements with truth, items and users."""
    out = tmp_path_factory.mktemp("feed") / request.param
    simulate(world(request.param), SMALL, out)
    shown, truth, items, users = (
        pl.concat([pl.read_parquet(f) for f in sorted((out / room).iterdir())])
        for room in ("engagements", "truth", "items", "users")
    )
    assert shown.select("request_id", "item_id").equals(truth.select("request_id", "item_id"))
    rows = shown.with_columns(truth.select(pl.col(a).alias(f"true_{a}") for a in ACTIONS))
    return request.param, out, rows, items, users


def test_import_takes_every_row_and_leaves_the_truth_alone(feed, tmp_path):
    _, out, rows, items, users = feed
    report = EngagementStore(tmp_path / "store").append(contract_dir.read(out), LATER)
    assert report.imported == rows.height == 6000
    assert not report.quarantined and not report.quarantined_items and not report.quarantined_users
    assert not report.notes  # an ignored column or file would be told
    assert {"item_id", "created_timestamp", "category", "format"} == set(items.columns)
    assert {"user_id", "event_timestamp", "country"} == set(users.columns)


def test_no_item_is_shown_before_its_birth_or_after_its_death(feed):
    name, _, rows, items, _ = feed
    people = populate(world(name), SMALL)
    item = rows["item_id"].str.slice(1).cast(pl.Int64).to_numpy()
    day = (rows["event_timestamp"] - START).dt.total_days().to_numpy()
    assert (people.born_I[item] <= day).all() and (day < people.died_I[item]).all()
    born = rows.join(items, on="item_id").select((pl.col("created_timestamp") <= pl.col("event_timestamp")).all())
    assert born.item()
    assert len({day.min(), day.max()} & {0, 41}) == 2


def test_requests_are_whole_in_time_order_and_show_distinct_items(feed):
    _, _, rows, _, _ = feed
    by_request = rows.group_by("request_id", maintain_order=True).agg(
        pl.len(), pl.col("item_id", "user_id").n_unique(), pl.col("position").sort(), pl.col("event_timestamp").first()
    )
    assert set(by_request["len"]) == set(by_request["item_id"]) == {10} and set(by_request["user_id"]) == {1}
    assert (by_request["position"].list.get(9) == 9).all()
    assert by_request["event_timestamp"].is_sorted()


def test_true_chances_are_those_by_which_actions_happened(feed):
    """Mean of (acted - chance * examination) is zero within four standard errors, for every action."""
    name, _, rows, _, _ = feed
    looked = (1.0 + rows["position"].to_numpy()) ** -world(name).examination
    for action in ACTIONS:
        chance = rows[f"true_{action}"].to_numpy() * looked
        error = rows[action].to_numpy() - chance
        assert abs(error.mean()) < 4 * np.sqrt((chance * (1 - chance)).mean() / len(error)), action


def test_new_country_its_users_and_its_categories_are_absent_before_its_day(feed):
    name, _, rows, items, users = feed
    known = rows.join(users, on="user_id").join(items, on="item_id")
    new = known.filter((pl.col("country") == "land6") | pl.col("category").is_in(["c12", "c13", "c14"]))
    assert bool(new.height) == (name == "market")
    if new.height:
        assert new["event_timestamp"].min() >= START + timedelta(days=half_time(SMALL.days))
        assert known.filter(pl.col("country") == "land6").height > 0.1 * rows.height / 2


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    scale = replace(SMALL, impressions=600)
    feeds = [
        simulate(recurring(), s, tmp_path / n) for n, s in (("a", scale), ("b", scale), ("c", replace(scale, seed=4)))
    ]
    assert feeds[0] | {"out": ""} == feeds[1] | {"out": ""}
    a, b, c = (
        {f.relative_to(tmp_path / n): f.read_bytes() for f in sorted((tmp_path / n).rglob("*.*"))} for n in "abc"
    )
    assert len(a) > 80 and a == b
    assert all(
        a[f] != c[f]
        for f in a
        if f.parts[0] in ("engagements", "truth") and pq.read_metadata(tmp_path / "a" / f).num_rows
    )


def test_seasons_return_with_the_same_effects_and_cancel_out_over_a_year():
    people = populate(replace(recurring(), popularity_turn=0.0), replace(SMALL, days=100))
    year = [people.effects(14 * season + 3) for season in range(6)]
    steady = np.mean(year, 0)  # the popularity, which is not of a season
    np.testing.assert_array_equal(year[0], people.effects(84 + 3))
    assert all(np.abs(one - other).max() > 0.1 for one, other in zip(year, year[1:], strict=False))
    assert [people.season(day) for day in (13, 14, 83, 84)] == ["frost", "thaw", "fog", "frost"]
    np.testing.assert_allclose((year[0] - steady).mean(axis=(0, 2)), people.country_SGC[0].mean(0), atol=1e-5)
    assert people.format_SF.std() == pytest.approx(recurring().season_format, rel=1e-5)


def test_shock_lasts_two_weeks_and_half_of_it_stays():
    people = populate(replace(shock(), popularity_turn=0.0), SMALL)
    before, holiday, after = (people.effects(day) for day in (20, 21, 35))
    np.testing.assert_array_equal(people.effects(0), before)
    np.testing.assert_array_equal(people.effects(34), holiday)
    np.testing.assert_allclose(after - before, (holiday - before) / 2, atol=1e-5)
    assert np.abs(holiday - before).max() > 1.0


def test_tastes_turn_by_the_stated_angle():
    people = populate(drift(), SMALL)
    cosine = (people.tastes(4) * people.tastes(34)).sum(1)
    np.testing.assert_allclose(np.rad2deg(np.arccos(cosine)), 30 * drift().turn, rtol=1e-3)


def test_position_bias_shows_in_the_rates_of_random_orders():
    law = replace(World("flat"), explore=1.0, examination=1.0)
    people = populate(law, replace(SMALL, days=7, impressions=100_000))
    acted = np.concatenate([b.acted_RN3 for day in range(7) for b in blocks(people, day)])
    truth = np.concatenate([b.truth_RN3 for day in range(7) for b in blocks(people, day)])
    rate = acted.mean(0) / truth.mean(0)
    np.testing.assert_allclose(rate[:, :2].mean(1), 1 / np.arange(1, 11), atol=0.05)


def test_activity_has_a_heavy_tail_and_the_day_a_rhythm():
    people = populate(recurring(), replace(SMALL, users=1000, days=7, impressions=100_000))
    drawn = [b for day in range(7) for b in blocks(people, day)]
    count = np.sort(np.bincount(np.concatenate([b.user_R for b in drawn]), minlength=1000))
    assert count[-100:].sum() > 0.3 * count.sum()
    hour = np.concatenate([b.time_R for b in drawn]) % DAY_US // (DAY_US // 24)
    assert (hour == 19).sum() > 4 * (hour == 7).sum() > 0


def test_hides_fall_and_saves_rise_with_the_same_utility():
    truth = np.concatenate([b.truth_RN3 for b in blocks(populate(market(), SMALL), 0)]).reshape(-1, 3)
    save, click, hide = truth[np.argsort(truth[:, 0])].T
    assert (np.diff(click) >= 0).all() and (np.diff(hide) <= 0).all() and save[-1] > 2 * save[0]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"users": 0}, "0 users"),
        ({"days": 0}, "0 days"),
        ({"items": 9}, "10 candidates, and there are only 9 items"),
        ({"items": 12}, "items are alive, and a request has 10 candidates"),
        ({"impressions": 9}, "9 impressions are less than one request"),
        ({"days": 5000}, "future"),
        ({"seed": -1}, "negative"),
    ],
)
def test_nonsense_is_refused_in_one_line_and_nothing_is_written(tmp_path, wrong, match):
    with pytest.raises(EvergreenError, match=match) as caught:
        simulate(drift(), replace(SMALL, **wrong), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_unknown_world_and_a_directory_in_use_are_refused(tmp_path):
    with pytest.raises(EvergreenError, match="Choose one of recurring, drift, shock, market"):
        world("flat")
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(EvergreenError, match="not empty"):
        simulate(drift(), SMALL, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"
