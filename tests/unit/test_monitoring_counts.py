"""Counts by bucket: every value is counted where it lies, and what is counted apart adds up to the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement.table import MISSING
from monitoring import counts as counting
from monitoring import distance
from monitoring.counts import (
    NO_NUMBER,
    OTHER,
    Counts,
    added,
    aligned,
    categories,
    drawn,
    drawn_categories,
    kept,
    numbers,
    points,
    trimmed,
)

FLOATS = st.lists(st.floats(width=32), max_size=60)
HASHES = st.lists(st.integers(0, 9) | st.integers(2**62, 2**62 + 9), max_size=60)
DENORMAL = float(np.float32(1e-45))


def array(values, dtype=np.float32):
    return np.array(values, dtype)


def counted(keys, many):
    return Counts(np.array(keys, np.int64), np.array(many, float))


def same(a: Counts, b: Counts) -> bool:
    return a.keys.tolist() == b.keys.tolist() and a.counts.tolist() == b.counts.tolist()


def as_dict(counts: Counts) -> dict:
    return dict(zip(counts.keys.tolist(), counts.counts.tolist(), strict=True))


@settings(deadline=None)
@given(FLOATS, FLOATS, st.floats(-(2.0**99), 2.0**99, width=32))
def test_numbers_counted_apart_add_up_to_those_counted_at_once(a, b, centre):
    whole = numbers(array(a + b), centre)
    assert same(added([numbers(array(a), centre), numbers(array(b), centre)]), whole)
    assert whole.total == len(a) + len(b)


@settings(deadline=None)
@given(HASHES, HASHES)
def test_categories_counted_apart_add_up_to_those_counted_at_once(a, b):
    parts = [categories(array(side, np.int64)) for side in (a, b)]
    assert same(added(parts), categories(array(a + b, np.int64)))


@settings(deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_a_number_is_at_most_a_hundredth_of_its_distance_from_its_point(value, centre):
    at = points(numbers(array([value]), centre).keys, centre)[0]
    assert abs(at - value) <= abs(value - centre) / 100 + abs(centre) * 1e-6 + 1e-30


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([0.0, -0.0, DENORMAL, -DENORMAL, 1e-38, -1e-38], {0.0: 6}),
        ([3.4e38, -3.4e38], {-3.4e38: 1, 3.4e38: 1}),
        ([-2.0, -2.0, 2.0], {-2.0: 2, 2.0: 1}),
        ([7.0] * 5, {7.0: 5}),
        ([], {}),
        ([1e20], {1e20: 1}),
    ],
)
def test_odd_numbers_are_counted_where_they_lie(values, places):
    counts = numbers(array(values), 0.0)
    found = dict(zip(points(counts.keys, 0.0).tolist(), counts.counts.tolist(), strict=True))
    assert list(found.values()) == [places[p] for p in sorted(places, key=lambda p: (p < 0, abs(p)))]
    assert np.allclose(sorted(found), sorted(places), rtol=0.01)


def test_what_is_no_number_is_counted_as_missing_and_not_as_a_value():
    counts = numbers(array([np.nan, np.inf, -np.inf, 1.0, -np.nan]), 0.0)
    assert counts.at(NO_NUMBER) == 4 and counts.without(NO_NUMBER).total == 1
    signalling = np.array([0x7F80_0001, 0xFF80_0001], np.uint32).view(np.float32)
    assert numbers(signalling, 0.0).at(NO_NUMBER) == 2
    assert as_dict(numbers(array([np.nan] * 3), 5.0)) == {NO_NUMBER: 3}


def test_a_number_too_far_from_the_centre_for_a_float32_is_not_missing():
    counts = numbers(array([3.4e38, -3.4e38, np.inf, np.nan]), -3.4e38)
    assert counts.at(NO_NUMBER) == 2
    assert counts.without(NO_NUMBER).total == 2
    beyond = numbers(np.array([1e300, -1e300, 1.0]), 0.0)  # float64
    assert beyond.at(NO_NUMBER) == 0 and beyond.total == 3


def test_a_constant_far_from_nought_is_one_bucket_at_its_value():
    counts = numbers(np.full(9, 16_777_216, np.float32), 16_777_217.0)  # the centre is no float32
    assert points(counts.keys, 16_777_217.0).tolist() == [16_777_216.0]


def test_parts_longer_than_a_chunk_are_counted_whole(monkeypatch):
    monkeypatch.setattr(counting, "CHUNK", 7)
    values = np.random.default_rng(0).normal(size=50)
    assert numbers(values, 0.0).total == 50
    hashes = np.arange(50) // 10
    assert as_dict(categories(hashes)) == dict.fromkeys(range(5), 10.0)


def test_a_hundred_thousand_categories_are_counted_one_by_one():
    hashes = np.random.default_rng(0).integers(1, 2**62, 100_000)
    counts = categories(np.concatenate([hashes, hashes[:10]]))
    assert len(counts.keys) == len(np.unique(hashes)) and counts.at(OTHER) == 0
    assert all(counts.at(key) == 2 for key in hashes[:10])


def test_the_rarest_of_more_categories_than_are_kept_become_other(monkeypatch):
    monkeypatch.setattr(counting, "MOST_CATEGORIES", 3)
    values = np.concatenate([np.repeat(np.arange(1, 101), 2), np.full(9, 5), np.full(8, 7), np.full(4, MISSING)])
    counts = categories(values)
    assert as_dict(counts) == {OTHER: 194.0, MISSING: 4.0, 1: 2.0, 5: 11.0, 7: 10.0}


def test_trimmed_says_that_a_kept_category_did_not_occur():
    counts = counted([MISSING, 3, 4, 9], [5, 2, 8, 1])
    assert as_dict(kept(counts, np.array([4, 6]))) == {OTHER: 3, MISSING: 5, 4: 8, 6: 0}
    assert as_dict(trimmed(counts, 1)) == {OTHER: 3, MISSING: 5, 4: 8}
    assert trimmed(counts, 3) is counts
    again = kept(counted([OTHER, 4], [3, 8]), np.array([4, 6]))  # 6 may be among the others
    assert as_dict(again) == {OTHER: 3, 4: 8}


def test_a_category_known_to_one_part_only_among_others_is_no_category_of_the_sum():
    parts = [counted([OTHER, 4], [10, 5]), counted([MISSING, 4, 6], [1, 5, 7])]
    assert as_dict(added(parts)) == {OTHER: 17, MISSING: 1, 4: 10}
    assert added([]).total == 0


def test_aligned_numbers_ascend_and_leave_out_what_is_missing():
    a, b = array([-3, 2, 2, np.nan, 9]), array([2, np.nan, np.nan, -7, 1])
    at, reference, current = aligned(numbers(a, 1.5), numbers(b, 1.5), 1.5)
    assert np.allclose(at, [-7, -3, 1, 2, 9], atol=0.07)
    assert reference.tolist() == [0, 1, 0, 2, 1]
    assert current.tolist() == [1, 0, 1, 1, 0]


def test_aligned_categories_fold_what_one_side_has_only_among_others():
    plain = counted([MISSING, 5, 6, 7], [9, 3, 4, 1])
    at, reference, current = aligned(counted([OTHER, MISSING, 5], [2, 8, 6]), plain, None)
    assert at.tolist() == [0, 1]
    assert (reference.tolist(), current.tolist()) == ([2, 6], [5, 3])
    _, reference, current = aligned(counted([5, 8], [1, 1]), plain, None)
    assert (reference.tolist(), current.tolist()) == ([1, 0, 0, 1], [3, 4, 1, 0])


def test_a_trimmed_side_of_many_categories_is_no_drift_but_one_that_vanished_is():
    rng = np.random.default_rng(0)
    a, b = (categories(1 + (100_000 * rng.random(200_000) ** 3).astype(np.int64)) for _ in range(2))
    _, p, q = aligned(trimmed(a, 1000), b, None)
    assert distance.jensenshannon(p, q) < 0.05
    gone = Counts(b.keys[b.keys != 1], b.counts[b.keys != 1])
    _, p, q = aligned(trimmed(a, 1000), gone, None)
    assert distance.jensenshannon(p, q) > 0.09


@pytest.mark.parametrize("centre", [None, 0.0])
def test_aligned_empty_windows_have_no_bins(centre):
    assert [len(x) for x in aligned(Counts.none(), Counts.none(), centre)] == [0, 0, 0]
    at, reference, current = aligned(Counts.none(), counted([3], [2]), centre)
    assert (reference.tolist(), current.tolist()) == ([0], [2])


def test_drawn_values_are_evenly_spaced_and_deterministic():
    values = array([1, 1, 1, 2, 3, np.nan])
    counts = numbers(values, 0.0)
    out = drawn(counts, 0.0, 12)
    assert np.allclose(out[:10], [1] * 6 + [2] * 2 + [3] * 2, rtol=0.01) and np.isnan(out[10:]).all()
    assert np.array_equal(out, drawn(counts, 0.0, 12), equal_nan=True)
    assert len(drawn(Counts.none(), 0.0, 12)) == 0
    assert np.isnan(drawn(numbers(array([np.nan]), 0.0), 0.0, 4)).tolist() == [True] * 4
    assert len(drawn(counts.scaled(0.001), 0.0, 7)) == 7


@pytest.mark.parametrize("draw", ["normal", "lognormal", "standard_t", "poisson"])
def test_drawn_values_have_the_distance_of_the_counts_they_stand_for(draw):
    from scipy.stats import wasserstein_distance

    rng, arguments = np.random.default_rng(1), {"standard_t": (5,), "poisson": (3,)}.get(draw, ())
    a, b = (getattr(rng, draw)(*arguments, size=50_000) * scale for scale in (1.0, 1.1))
    counts = [numbers(v, 0.5) for v in (a, b)]
    apart = distance.wasserstein(*aligned(counts[0], counts[1], 0.5))
    x, y = (drawn(c, 0.5, 5_000) for c in counts)
    assert abs(wasserstein_distance(x, y) / x.std() - apart) < 0.01


def test_drawn_categories_are_named_most_frequent_first():
    counts = counted([OTHER, MISSING, 5, 0x1A2B3C << 40], [2, 1, 4, 1])
    out = drawn_categories(counts, {5: "de"}, 8)
    assert out.dtype == object
    assert out.tolist() == ["de"] * 4 + ["(other)"] * 2 + ["(missing)", "#1a2b3c"]
    assert drawn_categories(Counts.none(), {}, 5).tolist() == []
