"""Windows are held against the same weekdays and hours; holidays are Sundays."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engagement.errors import EvergreenError
from engagement.table import micros
from monitoring.like import (
    BLOCKS,
    CELLS,
    begins,
    blocks_of,
    cells_of,
    composition,
    holiday_days,
    like,
    newest,
    older,
    week_name,
)
from monitoring.sketch import centres_of, sketch
from tests.feed_world import START, feed

TABLE = feed(days=10)


def cell_at(instant, holidays=frozenset()):
    monday, cell = blocks_of(np.array([micros(instant)]), holidays)
    return week_name(monday[0]), int(cell[0])


@pytest.mark.parametrize(
    ("instant", "cell"),
    [
        ((2026, 3, 2, 0, 0), ("2026-W10", 0)),
        ((2026, 3, 2, 5, 59), ("2026-W10", 0)),
        ((2026, 3, 2, 6, 0), ("2026-W10", 1)),
        ((2026, 3, 8, 23, 59), ("2026-W10", 27)),
        ((2027, 1, 1, 12, 0), ("2026-W53", 18)),  # a year's first days can be of the week of the year before
        ((1969, 12, 31, 23, 0), ("1970-W01", 11)),
    ],
)
def test_cell_is_the_week_the_weekday_and_the_block_of_six_hours(instant, cell):
    at = datetime(*instant, tzinfo=UTC)
    assert cell_at(at) == cell
    assert begins(cell) <= at < begins(cell) + timedelta(hours=6)


def test_holiday_counts_as_the_sunday_of_its_week():
    wednesday = datetime(2026, 3, 4, 13, tzinfo=UTC)
    assert cell_at(wednesday, frozenset({"2026-03-04"})) == ("2026-W10", 26)
    assert cell_at(wednesday, frozenset({"2026-03-05"})) == ("2026-W10", 10)


def test_holidays_are_those_of_all_named_countries_within_the_days_asked_for():
    start, end = datetime(2026, 4, 20, tzinfo=UTC), datetime(2026, 5, 2, tzinfo=UTC)
    assert holiday_days("nl, DE", start, end) == {"2026-04-27", "2026-05-01"}  # king's day, and the first of May
    assert holiday_days("", start, end) == frozenset()
    with pytest.raises(EvergreenError, match="'XX' are not known.*ISO 3166"):
        holiday_days("XX", start, end)


def test_cells_hold_every_request_once_also_where_a_holiday_is_joined_to_a_sunday():
    centres = centres_of(TABLE)
    for holidays in (frozenset(), frozenset({"2026-03-04"})):
        cells = cells_of(TABLE, holidays, centres)
        assert sum(s.requests for s in cells.values()) == TABLE.requests
        whole = sketch(TABLE, centres).columns["user_profile__country"]
        for key in whole.keys.tolist():
            assert sum(s.columns["user_profile__country"].at(key) for s in cells.values()) == whole.at(key)
    assert not {c for w, c in cells if w == "2026-W10" and 8 <= c < 12}  # that Wednesday


def test_like_has_the_windows_own_share_of_each_cell():
    cells = np.tile(np.arange(CELLS), 4)
    requests = np.tile(np.where(np.arange(CELLS) < 20, 300.0, 900.0), 4)
    wanted = np.zeros(CELLS)
    wanted[[0, 27]] = 100, 50
    mixed = like(cells, requests, wanted) * requests
    assert np.bincount(cells, mixed, CELLS) == pytest.approx(wanted)
    assert mixed[cells == 0] == pytest.approx([25] * 4)  # every week counts the same


def test_cell_that_is_thin_in_the_reference_is_filled_from_its_block_and_then_from_everything():
    cells, requests = np.arange(CELLS), np.full(CELLS, 100.0)
    requests[5] = 30
    wanted = np.zeros(CELLS)
    wanted[5] = 40
    same_block = (like(cells, requests, wanted) > 0).nonzero()[0]
    assert same_block.tolist() == [1, 5, 9, 13, 17, 21, 25]
    wanted[5] = 1000
    everything = like(cells, requests, wanted)
    assert (everything > 0).all() and everything @ requests == pytest.approx(1000)


def test_cells_that_must_not_be_used_weigh_nothing():
    cells, requests = np.arange(CELLS), np.full(CELLS, 100.0)
    requests[3] = 0
    assert like(cells, requests, np.full(CELLS, 10.0))[3] == 0
    assert (like(cells, np.zeros(CELLS), np.full(CELLS, 10.0)) == 0).all()


def test_newest_is_the_last_cell_of_each_block_of_the_window_whatever_the_weekday():
    cells = np.tile(np.arange(CELLS), 2)
    requests = np.full(len(cells), 100.0)
    wanted = np.zeros(CELLS)
    wanted[[0, 1, 9]] = 60, 30, 10  # the first two blocks of a day, the second on two days
    mixed = newest(cells, requests, wanted) * requests
    assert np.flatnonzero(mixed).tolist() == [len(cells) - BLOCKS, len(cells) - BLOCKS + 1]
    assert mixed[mixed > 0] == pytest.approx([60, 40])


def test_newest_reaches_further_back_where_the_last_cells_are_thin_or_the_window_is_long():
    cells, requests, wanted = np.arange(CELLS), np.full(CELLS, 100.0), np.zeros(CELLS)
    requests[24] = 5  # training ended in this block
    wanted[8] = 60
    weights = newest(cells, requests, wanted)
    assert np.flatnonzero(weights).tolist() == [20, 24] and weights @ requests == pytest.approx(60)
    long = newest(cells, requests, np.full(CELLS, 90.0))
    assert (long > 0).all() and long @ requests == pytest.approx(CELLS * 90)


def test_newest_of_nothing_weighs_nothing_and_passes_over_what_must_not_be_used():
    cells, wanted = np.arange(CELLS), np.full(CELLS, 10.0)
    assert (newest(cells, np.zeros(CELLS), wanted) == 0).all()
    requests = np.where(np.arange(CELLS) < 12, 100.0, 0.0)
    assert np.flatnonzero(newest(cells, requests, wanted)).tolist() == [8, 9, 10, 11]


def test_composition_counts_requests_by_cell_and_older_cells_are_those_that_are_over():
    assert composition(TABLE, frozenset()).sum() == TABLE.requests
    assert older([("2026-W10", 0), ("2026-W10", 1)], START + timedelta(hours=6)).tolist() == [True, False]
