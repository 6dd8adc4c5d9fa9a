"""Our distances of counts are Evidently's of the rows, to 1e-6 on the same bins, and buckets change them by little."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from benchmarks.drift.agreement import DRAWS, METHODS, at_points, evidently, known, of_categories, on_its_bins, sides
from monitoring.counts import aligned, drawn, numbers
from monitoring.distance import SMALLEST_SPREAD, binned, jensenshannon, psi, wasserstein

NAMES = tuple(DRAWS)


@pytest.mark.parametrize("name", NAMES)
def test_psi_and_jensenshannon_are_evidently_s_on_its_own_bins(name):
    a, b = sides(DRAWS[name], 1.0)
    assert on_its_bins(a, b) == pytest.approx(evidently(a, b, METHODS[:2]), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_score_is_evidently_s_where_values_lie_at_points(name):
    a, b = sides(DRAWS[name], 1.0, 1500)
    centre = float(np.nanmedian(a))
    at, p, q = aligned(numbers(a, centre), numbers(b, centre), centre)
    bins = binned(at, p, q)
    mine = [psi(*bins), jensenshannon(*bins), wasserstein(at, p, q)]
    assert mine == pytest.approx(evidently(at_points(a, centre), at_points(b, centre)), abs=1e-6)


@pytest.mark.parametrize(("values", "bins"), [(20, 20), (21, 14)])
def test_up_to_twenty_values_are_bins_of_their_own(values, bins):
    counts = np.full(values, 100.0)
    assert [len(x) for x in binned(np.arange(float(values)), counts, counts)] == [bins, bins]


@pytest.mark.parametrize("many", [2, 30, 2000])
def test_categories_score_as_in_evidently(many):
    mine, theirs = of_categories(many, 0.5)
    assert mine == pytest.approx(theirs, abs=1e-6)


def test_a_constant_column_is_divided_by_the_smallest_spread():
    a, b = np.full(2000, 3.0), np.full(2000, 3.5)
    at, p, q = aligned(numbers(a, 3.0), numbers(b, 3.0), 3.0)
    assert wasserstein(at, p, q) == pytest.approx((at[1] - 3.0) / SMALLEST_SPREAD, rel=1e-12)
    assert evidently(a, b, ("wasserstein",)) == pytest.approx([500.0])
    assert wasserstein(*aligned(numbers(a, 3.0), numbers(a, 3.0), 3.0)) == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drift", [0.0, 0.5, 2.0])
def test_buckets_change_the_wasserstein_distance_by_less_than_a_hundredth(name, drift):
    a, b = sides(DRAWS[name], drift)
    exact = wasserstein_distance(known(a), known(b)) / known(a).std()
    centre = float(np.nanmedian(a))
    counts = [numbers(side, centre) for side in (a, b)]
    assert abs(wasserstein(*aligned(*counts, centre)) - exact) < 0.005 + 0.01 * exact
    if name != "one far away":  # drawn values cannot show one row of thousands
        x, y = (known(drawn(c, centre, 5000)) for c in counts)
        assert abs(wasserstein_distance(x, y) / x.std() - exact) < 0.01


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30), st.floats(0.001, 1000))
def test_distances_are_nought_of_the_same_and_do_not_depend_on_how_many_rows(pairs, weight):
    p, q = np.array(pairs, float).T
    at = np.arange(len(p), dtype=float)
    for distance in (psi, jensenshannon, lambda a, b: wasserstein(at, a, b)):
        found = distance(p, q)
        if not (p.sum() and q.sum()):
            assert np.isnan(found)
            continue
        assert found >= -1e-12
        assert distance(p, p) == pytest.approx(0.0, abs=1e-7)
        assert distance(p * weight, q) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("n", [0, 3])
def test_a_side_without_rows_is_no_number_and_no_error(n):
    none, some, at = np.zeros(n), np.ones(n), np.arange(float(n))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan([psi(none, some), jensenshannon(some, none), wasserstein(at, none, none)]).all()
        assert [len(x) for x in binned(at, none, none)] == [n, n]


def test_one_row_a_side_is_compared():
    at, p, q = aligned(numbers(np.array([1.0]), 0.0), numbers(np.array([2.0]), 0.0), 0.0)
    assert jensenshannon(p, q) == pytest.approx(np.sqrt(np.log(2)))
    assert wasserstein(at, p, q) == pytest.approx((at[1] - at[0]) / SMALLEST_SPREAD)
    assert all(np.isfinite([psi(p, q), *binned(at, p, q)[0]]))
