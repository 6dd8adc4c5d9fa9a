"""Calibration: against a general minimiser, on fresh data, with labels that say little, and through a bundle."""

import dataclasses

import numpy as np
import pytest
import torch
import xxhash
from scipy.optimize import minimize
from scipy.special import expit

from engagement.errors import EvergreenError
from engagement.table import micros
from model.bundle import Bundle
from model.calibration import LEVEL_PRIOR, SCALE, SCALE_PRIOR, SHIFT, Calibration, calibrated, fit, report
from model.metrics import calibration_error, hit3, hits, ranks
from model.predict import logits, score
from model.train import train
from tests.unit.model_synth import make, recipe

LATER = {"seed": 6, "start_hour": 500}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return train(make(200), recipe(), "scratch", None, 0, tmp_path_factory.mktemp("c"))


def drawn(rows, scale=0.5, shift=-1.0, seed=0, heads=1):
    """Logits that are off by (scale, shift), and labels of the true probability."""
    rng = np.random.default_rng(seed)
    logits_NA = rng.normal(-1.0, 2.0, (rows, heads)).astype(np.float32)
    return (rng.random((rows, heads)) < expit(logits_NA * scale + shift)).astype(np.uint8), logits_NA


def minimum(labels, z):
    """The docstring's formula, written out and left to a general minimiser over (log scale, level)."""
    z, n, positives = z.astype(float), len(z), labels.sum()
    rarer = min(positives, n - positives)
    moved = rarer / (rarer + 2)
    target = np.array([1 - moved / positives if y else moved / (n - positives) for y in labels])
    p = 1 / (1 + np.exp(-z))
    pivot = (z * p * (1 - p)).sum() / (p * (1 - p)).sum()

    def objective(x):
        scale, level = np.exp(x[0]), x[1]
        q = expit(z + level + (scale - 1) * (z - pivot))
        cross_entropy = -(target * np.log(q) + (1 - target) * np.log1p(-q)).sum()
        return cross_entropy + LEVEL_PRIOR * level**2 / 2 + SCALE_PRIOR * (scale - 1 - np.log(scale))

    found = minimize(objective, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    scale, level = np.exp(found.x[0]), found.x[1]
    return scale, pivot + level - scale * pivot


@pytest.mark.parametrize("rows, scale, shift", [(2000, 0.5, -1.0), (60, 3.0, 1.0), (500, 1.0, -4.0), (300, -1.0, 0.0)])
def test_fit_equals_a_general_minimiser(rows, scale, shift):
    labels, z = drawn(rows, scale, shift)
    found = fit(labels, z)
    assert (found.scale_A[0], found.shift_A[0]) == pytest.approx(minimum(labels[:, 0], z[:, 0]), rel=1e-4, abs=1e-4)


def test_true_scale_and_shift_are_found_head_by_head():
    pairs = [(0.5, -1.0), (2.0, 0.5), (1.0, 0.0)]
    parts = [drawn(40_000, *pair, seed=i) for i, pair in enumerate(pairs)]
    found = fit(np.hstack([p[0] for p in parts]), np.hstack([p[1] for p in parts]))
    assert np.column_stack([found.scale_A, found.shift_A]) == pytest.approx(np.array(pairs), abs=0.08)


def test_error_falls_on_rows_that_did_not_fit():
    found = fit(*drawn(3000))
    labels, z = drawn(20_000, seed=1)
    before, after = (
        calibration_error(labels[:, 0], expit(z[:, 0])),
        calibration_error(labels[:, 0], found.apply(z)[:, 0]),
    )
    assert after < 0.02 < 0.1 < before


def test_calibrated_head_is_left_almost_alone():
    found = fit(*drawn(20_000, 1.0, 0.0))
    assert (found.scale_A[0], found.shift_A[0]) == pytest.approx((1.0, 0.0), abs=0.06)


def test_separable_labels_do_not_ask_for_an_infinite_scale():
    z = np.linspace(-3, 3, 200, dtype=np.float32)[:, None]
    found = fit((z > 0).astype(np.uint8), z)
    assert 1 < found.scale_A[0] < 20


@pytest.mark.parametrize("value", [0, 1])
def test_one_label_alone_moves_the_level_as_far_as_it_is_evidence(value):
    sign = 1 if value else -1
    z = np.full((1000, 1), 7.0 * -sign, np.float32) + np.random.default_rng(0).normal(size=(1000, 1))
    # About one row was expected to be otherwise: no surprise. Then a thousand are otherwise: a great one.
    expected = fit(np.full((1000, 1), 1 - value, np.uint8), z)
    surprised = fit(np.full((1000, 1), value, np.uint8), z)
    assert abs(expected.apply(z).mean() - expit(z).mean()) < 0.001
    assert expected.scale_A[0] == pytest.approx(1.0, abs=0.3)
    assert sign * (surprised.apply(z).mean() - 0.5) > 0.3 and surprised.scale_A[0] > 0


def test_rate_of_an_action_seen_once_is_not_doubled():
    labels, z = np.zeros((5000, 1), np.uint8), np.full((5000, 1), np.log(1 / 4999), np.float32)
    labels[17] = 1
    assert fit(labels, z).apply(z).mean() == pytest.approx(1 / 5000, rel=0.01)


def test_no_rows_give_identity():
    found = fit(np.zeros((0, 2), np.uint8), np.zeros((0, 2), np.float32))
    assert found.scale_A.tolist() == [1, 1] and found.shift_A.tolist() == [0, 0]


def test_constant_logits_keep_their_scale_and_take_the_rate():
    labels = (np.arange(1000) % 10 == 0).astype(np.uint8)[:, None]
    found = fit(labels, np.full((1000, 1), 2.0, np.float32))
    assert found.scale_A[0] == pytest.approx(1.0)
    assert found.apply(np.full((1, 1), 2.0)) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("size", [50.0, 1e4, 1e8])
@pytest.mark.parametrize("sign", [1, -1])
def test_absurd_logits_give_finite_numbers_and_a_positive_scale(size, sign):
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 1)) < 0.3).astype(np.uint8)
    z = (sign * size * (2.0 * labels - 1 + 0.5 * rng.normal(size=(400, 1)))).astype(np.float32)
    found = fit(labels, z)
    assert found.scale_A[0] > 0 and np.isfinite([*found.scale_A, *found.shift_A]).all()
    apart, before = (calibration_error(labels[:, 0], p[:, 0].astype(float)) for p in (found.apply(z), expit(z)))
    assert apart <= before + 0.05


def test_rows_that_are_not_finite_are_passed_over_and_stay_visible():
    labels, z = drawn(500)
    reference = fit(labels, z)
    broken_y, broken_z = np.vstack([labels, [[1], [0]]]), np.vstack([z, [[np.nan], [np.inf]]]).astype(np.float32)
    found = fit(broken_y, broken_z)
    assert found.scale_A == pytest.approx(reference.scale_A) and found.shift_A == pytest.approx(reference.shift_A)
    assert np.isnan(found.apply(broken_z)[-2, 0])


@pytest.mark.parametrize("scale, shift", [(0.01, -9.0), (0.7, 3.0), (40.0, 0.0), (1e-4, 12.0)])
def test_no_two_scores_change_places(scale, shift):
    z = np.sort(np.random.default_rng(0).normal(-2, 4, 20_000).astype(np.float32))[:, None]
    assert (np.diff(Calibration(np.array([scale]), np.array([shift])).apply(z)[:, 0]) >= 0).all()


def test_report_judges_users_by_what_others_fitted():
    """Two halves of users that contradict each other: one fit for all is right on average, across it is all wrong."""
    users = np.array([f"u{i % 40}" for i in range(4000)], "S")
    labels, z = halves(users)[:, None].astype(np.uint8), np.zeros((4000, 1), np.float32)
    assert calibration_error(labels[:, 0], fit(labels, z).apply(z)[:, 0]) < 0.2
    assert report(("save",), labels, z, users)["save"]["after"] > 0.9


def halves(users):
    return np.array([xxhash.xxh3_64_intdigest(u) % 2 for u in users.tolist()])


def test_report_tells_an_error_that_falls_and_counts_positives():
    labels, z = drawn(4000, heads=2)
    users = np.array([f"u{i % 100}" for i in range(4000)], "S")
    told = report(("save", "click"), labels, z, users)
    assert list(told) == ["save", "click"]
    for a, action in enumerate(told):
        assert told[action]["after"] < 0.05 < told[action]["before"]
        assert told[action]["before"] == pytest.approx(calibration_error(labels[:, a], expit(z[:, a])), abs=1e-6)
        assert told[action]["positives"] == labels[:, a].sum()


def test_a_user_is_never_calibrated_by_their_own_rows():
    labels, z = drawn(2000)
    one_user = report(("save",), labels, z, np.full(2000, b"u1"))["save"]
    assert one_user["after"] == pytest.approx(one_user["before"], abs=1e-6)  # nobody else: identity


def test_shapes_that_do_not_match_are_refused():
    labels, z = drawn(10, heads=2)
    with pytest.raises(EvergreenError, match="do not belong"):
        fit(labels[:, :1], z)
    with pytest.raises(EvergreenError, match="2 heads"):
        fit(labels, z).apply(z[:, :1])


def test_bundle_scores_what_the_calibration_says_and_orders_as_before(bundle, tmp_path):
    later = make(300, **LATER)
    done = calibrated(bundle, later)
    done.save(tmp_path / "b")
    back, table = Bundle.load(tmp_path / "b"), make(100, seed=7)
    found = fit(later.labels, logits(bundle, later))
    np.testing.assert_allclose(score(back, table), found.apply(logits(bundle, table)), rtol=1e-6)
    before, after = score(bundle, table), score(back, table)
    assert np.abs(after - before).max() > 0.01
    for action in range(3):
        assert (ranks(table, after[:, action]) == ranks(table, before[:, action])).all()
    assert hit3(hits(table, after)) == hit3(hits(table, before))
    assert back.digest == done.digest != bundle.digest and back.metrics == done.metrics
    for action in table.spec.actions:
        assert {f"ece_{action}_before", f"ece_{action}_after"} <= back.metrics.keys()


def test_calibrating_again_starts_from_the_raw_logits(bundle):
    later = make(300, **LATER)
    once = calibrated(bundle, later)
    twice = calibrated(once, later)
    assert twice.digest == once.digest


def test_uncalibrated_bundle_gives_the_plain_sigmoid(bundle):
    table = make(50, seed=7)
    assert torch.equal(bundle.weights[SCALE], torch.ones(3, dtype=torch.float64))
    np.testing.assert_allclose(score(bundle, table), expit(logits(bundle, table)), rtol=1e-6)


def test_update_learns_the_same_from_a_champion_with_other_calibration(bundle, tmp_path):
    champion, table = calibrated(bundle, make(300, **LATER)), make(60, seed=8, start_hour=900)
    runs = [
        train(table, recipe(), "finetune", parent, 0, tmp_path / name)
        for name, parent in (("raw", bundle), ("calibrated", champion))
    ]
    assert runs[0].weights.keys() == runs[1].weights.keys()
    assert all(torch.equal(v, runs[1].weights[k]) for k, v in runs[0].weights.items())
    assert runs[1].weights[SHIFT].tolist() == [0, 0, 0]


def test_table_that_is_empty_or_not_later_is_refused(bundle):
    with pytest.raises(EvergreenError, match="no later engagement"):
        calibrated(bundle, make(5, **LATER).select(np.array([], int)))
    later = make(50, **LATER)
    ends_inside = dataclasses.replace(later, time=later.time - later.time.min() + micros(bundle.train_end))
    with pytest.raises(EvergreenError, match="after the training window"):
        calibrated(bundle, ends_inside)
    assert calibrated(bundle, dataclasses.replace(ends_inside, time=ends_inside.time + 1))


def test_calibration_of_other_heads_is_refused(bundle):
    other = {**bundle.weights, SCALE: torch.ones(2, dtype=torch.float64)}
    with pytest.raises(EvergreenError, match="do not fit"):
        score(dataclasses.replace(bundle, weights=other), make(5))
