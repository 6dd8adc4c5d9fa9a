"""Embeddings: a shift is told, chance is not, and parts add up."""

import numpy as np
import pytest

from monitoring import vectors
from monitoring.distance import wasserstein
from monitoring.sketch import aligned
from monitoring.vectors import VECTORS, VectorTally, all_vectors, centroid_shift, tell_apart


def held(values):
    tally = VectorTally(values.shape[1])
    tally.add(np.ascontiguousarray(values.T, np.float32))
    return tally.vectors()


def normal(n=4000, width=16, seed=0, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, width))


def test_no_shift_cannot_be_told_apart():
    scores = [tell_apart(held(normal(seed=2 * i)), held(normal(seed=2 * i + 1))) for i in range(20)]
    assert min(scores) >= 0.5
    assert np.mean(scores) < 0.515 and max(scores) < 0.54


def test_a_shift_of_the_mean_is_told_apart_however_the_sides_are_given():
    shift = np.zeros(16)
    shift[3] = 1.0
    a, b = held(normal()), held(normal(seed=1) + shift)
    assert tell_apart(a, b) == pytest.approx(0.76, abs=0.03)  # Phi(1 / sqrt(2))
    assert tell_apart(a, b) == pytest.approx(tell_apart(b, a), abs=1e-12)
    assert tell_apart(a, b, seed=1) != tell_apart(a, b)


def test_a_turn_that_leaves_every_norm_is_told_by_classifier_and_centroid():
    values = normal(mean=1.0, scale=0.3)
    a, b = held(values), held(np.concatenate([-values[:, :8], values[:, 8:]], axis=1))
    assert tell_apart(a, b) > 0.99
    assert centroid_shift(a, b) == pytest.approx(1.0, abs=0.02)
    assert wasserstein(*aligned(a.norms, b.norms, 0.0)) == 0.0


def test_another_length_is_told_by_the_norms_though_not_by_the_direction():
    a, b = held(normal(mean=1.0)), held(normal(mean=1.0, seed=1) * 1.5)
    assert centroid_shift(a, b) < 0.001
    assert wasserstein(*aligned(a.norms, b.norms, 0.0)) > 1


def test_the_same_window_is_no_shift_at_all():
    a = held(normal(mean=0.2))
    assert centroid_shift(a, a) == pytest.approx(0.0, abs=1e-12)
    assert tell_apart(a, a) == 0.5


@pytest.mark.parametrize("n", [0, 1, 7])
def test_too_few_vectors_tell_nothing(n):
    assert tell_apart(held(normal(n)), held(normal(mean=9.0))) == 0.5


def test_vectors_without_a_direction_are_no_error():
    nothing, zeros, some = held(normal(0)), held(np.zeros((20, 16))), held(normal(mean=1.0))
    assert centroid_shift(nothing, zeros) == 0.0
    assert centroid_shift(zeros, some) == 1.0
    assert tell_apart(zeros, zeros) == 0.5
    assert tell_apart(zeros, held(np.ones((20, 16)))) == 1.0  # both constant, but not the same
    assert tell_apart(held(np.ones((20, 1))), held(np.full((20, 1), 2.0))) == 1.0


def test_a_vector_with_a_hole_is_missing_and_the_rest_are_sampled_evenly():
    values = normal(VECTORS * 3, 4)
    values[::2, 1] = np.nan
    values[1, 2] = np.inf
    one = held(values)
    assert (one.count, one.missing) == (VECTORS * 3 // 2 - 1, VECTORS * 3 // 2 + 1)
    whole = values[np.isfinite(values).all(axis=1)]
    assert VECTORS / 2 < len(one.sample) <= VECTORS
    assert np.array_equal(one.sample, whole[:: len(whole) // len(one.sample) + 1].astype(np.float32))
    assert np.allclose(one.total, whole.astype(np.float32).sum(axis=0, dtype=float))
    assert one.norms.total == one.count


def test_parts_of_a_window_are_gathered_as_the_whole(monkeypatch):
    values = normal(5000, 3)
    values[7:90] = np.nan
    tally = VectorTally(3)
    for start in range(0, 5000, 37):
        tally.add(np.ascontiguousarray(values[start : start + 37].T, np.float32))
    parts, whole = tally.vectors(), held(values)
    assert np.array_equal(parts.sample, whole.sample)
    assert (parts.count, parts.missing) == (whole.count, whole.missing)
    assert np.array_equal(parts.norms.keys, whole.norms.keys) and np.allclose(parts.total, whole.total)


def test_windows_together_are_sampled_by_their_rows_not_by_their_number():
    big, small = held(normal(40_000, 2)), held(normal(400, 2, seed=1, mean=50.0))
    both = all_vectors([big, small])
    assert both.count == 40_400 and both.norms.total == 40_400
    assert len(both.sample) <= VECTORS
    assert (both.sample[:, 0] > 25).mean() == pytest.approx(400 / 40_400, rel=0.2)
    assert np.allclose(both.total, big.total + small.total)
    none = held(normal(0, 2))
    assert all_vectors([none, small]).count == 400 and len(all_vectors([none, none]).sample) == 0


def test_the_fewest_vectors_are_told_apart_at_their_boundary():
    n = vectors.FEWEST_VECTORS
    assert tell_apart(held(normal(n, 2)), held(normal(n, 2, mean=50.0))) == 1.0
    assert tell_apart(held(normal(n - 1, 2)), held(normal(n, 2, mean=50.0))) == 0.5
