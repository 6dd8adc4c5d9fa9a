"""HIT@3 and the usual metrics against brute force written from their definitions."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import xxhash

from model.metrics import auc, calibration_error, grouped_auc, hit3, hits, log_loss, random_hit3, ranks
from tests.unit.model_synth import make


def brute_force(table, by_row):
    """Request by request, as the definition reads."""
    counts, skipped, requests = np.zeros(len(table.spec.actions)), 0, 0
    for r in range(table.requests):
        rows = list(range(table.offsets[r], table.offsets[r + 1]))
        if len(rows) <= 3:
            skipped += 1
            continue
        seed = xxhash.xxh3_64_intdigest(bytes(table.request_id[r]))
        rows.sort(key=lambda i: xxhash.xxh3_64_intdigest(bytes(table.item_id[i]), seed=seed))  # the shuffle
        rows.sort(key=lambda i: -by_row[i])  # stable
        counts += table.labels[rows[:3]].sum(0)
        requests += 1
    return counts / requests, skipped, requests


def distinct(**kwargs):
    """A table in which no request shows one item twice, as logs do."""
    table = make(**kwargs)
    return dataclasses.replace(table, item_id=np.array([f"x{i}" for i in range(table.rows)], "S"))


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_hit3_equals_brute_force_with_and_without_ties(levels):
    table = distinct(requests=200, seed=4)
    by_row = np.random.default_rng(0).integers(0, levels, table.rows).astype(np.float32)
    expected, skipped, requests = brute_force(table, by_row)
    h = hits(table, by_row)
    assert (h.skipped, len(h.requests)) == (skipped, requests) and skipped > 20
    assert [hit3(h)[a] for a in table.spec.actions] == pytest.approx(expected)


def test_ranking_follows_the_primary_action_alone():
    table = distinct(requests=50)
    scores = np.random.default_rng(1).random((table.rows, 3)).astype(np.float32)
    assert hit3(hits(table, scores)) == hit3(hits(table, scores[:, 0]))
    assert hit3(hits(table, scores)) != hit3(hits(table, scores[:, 1]))


def test_logged_order_cannot_leak_through_ties():
    table = distinct(requests=400, size=10)
    labels = np.zeros_like(table.labels)
    labels[table.offsets[:-1], 0] = 1  # the first logged candidate of each request is the saved one
    biased = dataclasses.replace(table, labels=labels)
    h = hits(biased, np.zeros(table.rows, np.float32))
    assert hit3(h)["save"] == pytest.approx(random_hit3(h)["save"], abs=0.08)
    assert hit3(h)["save"] < 0.7  # without the shuffle it is 1


def test_order_of_rows_in_a_request_changes_nothing():
    table = distinct(requests=60, seed=2)
    by_row = np.random.default_rng(0).integers(0, 2, table.rows).astype(np.float32)
    turned = np.concatenate(
        [np.arange(b - 1, a - 1, -1) for a, b in zip(table.offsets, table.offsets[1:], strict=False)]
    )
    columns = {n: getattr(table, n)[turned] for n in ("item_id", "labels")}
    assert hit3(hits(dataclasses.replace(table, **columns), by_row[turned])) == hit3(hits(table, by_row))


def test_expectation_of_a_random_order_is_exact():
    table = distinct(requests=150, seed=6)
    rng = np.random.default_rng(0)
    draws = [hit3(hits(table, rng.random(table.rows)))["save"] for _ in range(200)]
    expected = random_hit3(hits(table, np.zeros(table.rows)))["save"]
    assert abs(np.mean(draws) - expected) < 4 * np.std(draws) / np.sqrt(len(draws))


def test_three_candidates_are_left_out_and_four_are_compared():
    h = hits(make(100, size=3), np.zeros(make(100, size=3).rows))
    assert len(h.requests) == 0 and h.skipped == 100 and np.isnan(hit3(h)["save"])
    table = make(100, size=4)
    assert set(np.diff(table.offsets)[hits(table, np.zeros(table.rows)).requests]) == {4}


def test_scores_that_are_not_numbers_come_last():
    table = distinct(requests=30)
    by_row = np.random.default_rng(0).random(table.rows)
    by_row[table.offsets[:-1]] = np.nan
    assert (ranks(table, by_row)[table.offsets[:-1]] == np.diff(table.offsets) - 1).all()


def test_shuffle_is_the_same_in_another_process():
    code = (
        "from tests.unit.model_synth import make; from model.metrics import ranks; import numpy as np;"
        "t = make(40); print(ranks(t, np.zeros(t.rows)).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    table = make(40)
    assert out.stdout.strip() == str(ranks(table, np.zeros(table.rows)).tolist())


def pairs_auc(labels, scores):
    """Every pair, as the definition reads."""
    above = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1].tolist() for n in scores[labels == 0].tolist()]
    return np.mean(above) if above else np.nan


def drawn(rows, levels, users=6, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, rows) / levels
    return (
        (rng.random(rows) < 0.2 + 0.4 * scores).astype(np.uint8),
        scores.astype(np.float32),
        rng.integers(0, users, rows),
    )


@pytest.mark.parametrize("levels", [1, 4, 10_000])
@pytest.mark.parametrize("rows", [2, 30, 300])
def test_auc_equals_the_share_of_ordered_pairs(levels, rows):
    labels, scores, _ = drawn(rows, levels)
    labels[:2] = 0, 1
    assert auc(labels, scores) == pytest.approx(pairs_auc(labels, scores), abs=1e-12)


@pytest.mark.parametrize("levels", [1, 4, 10_000])
def test_grouped_auc_weighs_users_with_both_labels_by_their_impressions(levels):
    labels, scores, users = drawn(200, levels, users=40)
    names = np.array([f"u{u}" for u in users], "S")
    by_user = [(pairs_auc(labels[users == u], scores[users == u]), (users == u).sum()) for u in np.unique(users)]
    both = [(a, n) for a, n in by_user if not np.isnan(a)]
    assert 5 < len(both) < len(by_user)
    expected = sum(a * n for a, n in both) / sum(n for _, n in both)
    assert grouped_auc(labels, scores, names) == pytest.approx(expected, abs=1e-12)


def test_auc_log_loss_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, scores, _ = drawn(5000, 50)
    assert auc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)
    inside = 0.01 + 0.98 * scores.astype(np.float64)
    assert log_loss(labels, inside) == pytest.approx(sklearn.log_loss(labels, inside), abs=1e-12)


def test_metrics_that_nothing_defines_are_nan():
    ones, none = np.ones(3, np.uint8), np.empty(0)
    broken = np.array([0.1, np.nan, 0.3])
    assert np.isnan(auc(ones, np.arange(3.0))) and np.isnan(auc(none, none))
    assert np.isnan(auc(np.array([0, 1, 1]), broken))
    assert np.isnan(grouped_auc(np.array([0, 1, 1]), np.arange(3.0), np.array([0, 1, 1])))
    assert np.isnan(log_loss(none, none)) and np.isnan(log_loss(ones, broken))
    assert np.isnan(calibration_error(none, none)) and np.isnan(calibration_error(ones, broken))


def test_log_loss_of_a_sure_error_is_large_and_finite():
    assert 15 < log_loss(np.array([0, 1]), np.array([1.0, 0.0], np.float32)) < 17


@pytest.mark.parametrize("rows", [7, 150, 1000])
def test_calibration_error_equals_a_loop_over_bins(rows):
    labels, scores, _ = drawn(rows, 10**6, seed=rows)
    order = np.argsort(scores)
    expected = 0.0
    for b in range(15):
        rows_b = [i for rank, i in enumerate(order) if rank * 15 // rows == b]
        if rows_b:
            expected += len(rows_b) / rows * abs(labels[rows_b].mean() - scores[rows_b].astype(float).mean())
    assert calibration_error(labels, scores) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_of_tied_probabilities_does_not_depend_on_the_order_of_rows():
    labels = np.repeat([1, 0], 500)  # sorted: bins that cut through ties would see only one label
    assert calibration_error(labels, np.full(1000, 0.5)) == 0
    assert calibration_error(labels, np.full(1000, 0.8)) == pytest.approx(0.3)
    turned, probability = np.random.default_rng(0).permutation(1000), np.tile([0.2, 0.6], 500)
    assert calibration_error(labels[turned], probability[turned]) == pytest.approx(
        calibration_error(labels, probability)
    )


def test_calibration_error_of_a_perfect_model_is_what_chance_leaves():
    rng = np.random.default_rng(0)
    probability = rng.random(100_000)
    assert 0 < calibration_error(rng.random(100_000) < probability, probability) < 0.01
