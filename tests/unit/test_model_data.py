"""Batches against a loop over rows; what training hides; weights and statistics."""

import dataclasses

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.data import HOUR_US, Batcher, hash_rows, hide, numeric_statistics, row_weights, table_digest
from tests.unit.model_synth import make, recipe

CONFIG = recipe().ranker


def test_batch_equals_a_loop_over_requests_and_rows():
    table = make(50, seed=1)
    requests = np.array([7, 3, 44, 12])
    batch = Batcher(table, CONFIG).of_requests(requests)
    row = 0
    for b, r in enumerate(requests):
        known = range(table.history_end[r] - 1, table.history_start[r] - 1, -1)
        for place in range(batch.history_mask_BL.shape[1]):
            real = place < len(known)
            assert bool(batch.history_mask_BL[b, place]) == real
            expected = (0, 0, 0.0)
            if real:
                h = known[place]
                item = int(hash_rows(table.history_item[h : h + 1], CONFIG.buckets)[0])
                expected = (item, int(table.history_actions[h]), (table.time[r] - table.history_time[h]) / HOUR_US)
            got = (batch.history_ids_BL[b, place], batch.history_bits_BL[b, place], batch.history_hours_BL[b, place])
            assert tuple(float(g) for g in got) == pytest.approx(expected)
        for i in range(table.offsets[r], table.offsets[r + 1]):
            assert int(batch.request_of_row[row]) == b and int(batch.rows[row]) == i
            assert batch.labels_NA[row].tolist() == table.labels[i].tolist()
            assert batch.item_ids_NW[row].tolist() == hash_rows(table.item_cat[i], CONFIG.buckets).tolist()
            row += 1
    assert row == len(batch.rows)


def test_no_value_is_row_zero_and_no_hash_is():
    hashes = np.array([0, 1, CONFIG.buckets - 1, 2**62 + 5])
    rows = hash_rows(hashes, CONFIG.buckets)
    assert rows[0] == 0 and (rows[1:] > 0).all() and (rows < CONFIG.buckets).all()


def test_epoch_holds_every_request_once_and_its_order_follows_seed_and_epoch_alone():
    batcher = Batcher(make(45), CONFIG)
    one, again, other, seeded = (batcher.order(8, *k) for k in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert sorted(np.concatenate(one).tolist()) == list(range(45)) and [len(o) for o in one] == [8] * 5 + [5]
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert (np.concatenate(one) != np.concatenate(other)).any() and (
        np.concatenate(one) != np.concatenate(seeded)
    ).any()


def test_memory_mapped_table_gives_the_same_batches(tmp_path):
    table = make(30)
    table.save(tmp_path)
    mapped = RankingTable.load(tmp_path)
    one, two = (Batcher(t, CONFIG).of_requests(np.array([5, 2])) for t in (table, mapped))
    for field in dataclasses.fields(one):
        assert torch.equal(torch.nan_to_num(getattr(one, field.name)), torch.nan_to_num(getattr(two, field.name)))
    assert table_digest(table) == table_digest(mapped)
    assert table_digest(table) != table_digest(dataclasses.replace(table, labels=1 - table.labels))


def test_table_without_any_history_makes_batches():
    table = make(10)
    empty = {n: getattr(table, n)[:0] for n in ("history_time", "history_item", "history_actions")}
    none = np.zeros(10, np.int64)
    bare = dataclasses.replace(table, **empty, history_start=none, history_end=none)
    assert not Batcher(bare, CONFIG).of_requests(np.arange(10)).history_mask_BL.any()


def hidden(batch, seed=0, **changes):
    return hide(batch, recipe(**changes).train, torch.Generator().manual_seed(seed))


def test_time_window_hides_the_newest_actions_and_moves_the_rest_to_the_front():
    batch = Batcher(make(80), CONFIG).of_requests(np.arange(80))
    out = hidden(batch, id_dropout=0.0, time_window_hours=40.0)
    before, after = batch.history_mask_BL.sum(1), out.history_mask_BL.sum(1)
    assert (after < before).any() and ((after < before) & (after > 0)).any()
    for b in range(80):
        n, m = int(before[b]), int(after[b])
        assert out.history_mask_BL[b, :m].all() and not out.history_mask_BL[b, m:].any()
        assert out.history_hours_BL[b, :m].tolist() == batch.history_hours_BL[b, n - m : n].tolist()
        assert out.history_ids_BL[b, :m].tolist() == batch.history_ids_BL[b, n - m : n].tolist()
        assert not out.history_ids_BL[b, m:].any()


def test_time_window_is_drawn_for_each_request_and_follows_the_seed():
    batch = Batcher(make(80, users=1), CONFIG).of_requests(np.arange(40, 80))
    counts = hidden(batch, time_window_hours=8.0).history_mask_BL.sum(1)
    assert len(set(counts.tolist())) > 3
    assert torch.equal(counts, hidden(batch, time_window_hours=8.0).history_mask_BL.sum(1))
    assert not torch.equal(counts, hidden(batch, seed=1, time_window_hours=8.0).history_mask_BL.sum(1))


def test_ids_are_hidden_at_the_stated_rate():
    batch = Batcher(make(300), CONFIG).of_requests(np.arange(300))
    out = hidden(batch, id_dropout=0.3)
    real = batch.item_ids_NW != 0
    assert float((out.item_ids_NW[real] == 0).float().mean()) == pytest.approx(0.3, abs=0.03)


def test_row_weights_have_mean_one_and_follow_sampling_and_activity():
    table = make(60)
    sampled = np.arange(table.rows) % 2 == 0
    weights = row_weights(dataclasses.replace(table, sampled=sampled), recipe(sampled_weight=0.5).train)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert weights[sampled].max() == pytest.approx(0.5 * weights[~sampled].min(), rel=1e-5)
    by_user = row_weights(table, recipe(user_weight_power=1.0).train)
    per_request = {}
    for r in range(table.requests):
        per_request.setdefault(table.user_id[r], []).append(by_user[table.offsets[r]])
    totals = [sum(v) for v in per_request.values()]
    assert max(totals) == pytest.approx(min(totals), rel=1e-4)


def test_all_rows_weighing_nothing_is_told():
    table = make(20)
    with pytest.raises(EvergreenError, match="weight 0"):
        row_weights(dataclasses.replace(table, sampled=np.ones(table.rows, bool)), recipe(sampled_weight=0.0).train)


def test_statistics_leave_missing_and_infinite_values_out():
    block = np.array([[1.0, 5.0, 0.0], [3.0, np.nan, 0.0], [5.0, np.inf, 0.0]], np.float32)
    mean, std, missing = numeric_statistics(block, np.array([0, 1]))
    assert mean.tolist() == [3.0, 5.0] and std.tolist() == pytest.approx([1.632993, 0.0]) and missing.tolist() == [0, 1]
