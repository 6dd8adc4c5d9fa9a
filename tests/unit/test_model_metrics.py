"""HIT@3 against a brute force written from its definition."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import xxhash

from model.metrics import hit3, hits, random_hit3, ranks
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
