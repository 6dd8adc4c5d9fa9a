"""Batches against a loop over rows; what training hides; weights and statistics."""

import dataclasses

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.data import Batcher, Share, hide, numeric_statistics, table_digest
from model.history import HOUR_US
from model.weights import row_weights
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
                age = (table.time[r] - table.history_time[h]) / HOUR_US
                expected = (int(table.history_item[h]), int(table.history_actions[h]), age)
            got = (batch.history_ids_BL[b, place], batch.history_bits_BL[b, place], batch.history_hours_BL[b, place])
            assert tuple(float(g) for g in got) == pytest.approx(expected)
        for i in range(table.offsets[r], table.offsets[r + 1]):
            assert int(batch.request_of_row[row]) == b and int(batch.rows[row]) == i
            assert batch.labels_NA[row].tolist() == table.labels[i].tolist()
            assert batch.item_ids_NW[row].tolist() == table.item_cat[i].tolist()
            row += 1
    assert row == len(batch.rows)


def test_epoch_holds_every_request_once_and_its_order_follows_seed_and_epoch_alone():
    batcher = Batcher(make(45), CONFIG)
    one, again, other, seeded = (batcher.order(*k) for k in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert sorted(one.tolist()) == list(range(45)) and (one == again).all()
    assert (one != other).any() and (one != seeded).any()


def test_what_is_hidden_in_a_batch_is_the_same_whether_it_is_split_or_not():
    table, train = make(40), recipe(id_dropout=0.3, time_window_hours=40.0).train
    batcher, requests = Batcher(table, CONFIG), np.arange(40)[::-1].copy()
    starts = np.concatenate([[0], np.cumsum(batcher.sizes(requests))])
    whole = hide(batcher.of_requests(requests), train, torch.Generator().manual_seed(3))
    parts = [
        hide(
            batcher.of_requests(requests[a:b]),
            train,
            torch.Generator().manual_seed(3),
            Share(40, a, table.rows, int(starts[a])),
        )
        for a, b in ((0, 35), (35, 40))  # the second one's histories are short, so its columns are fewer
    ]
    assert parts[1].history_ids_BL.shape[1] < parts[0].history_ids_BL.shape[1]
    for name in ("request_ids_BW", "item_ids_NW", "history_ids_BL", "history_hours_BL", "history_mask_BL"):
        width = parts[1].history_ids_BL.shape[1] if "history" in name else None
        joined = torch.cat([getattr(p, name)[:, :width] for p in parts])
        assert torch.equal(joined, getattr(whole, name)[:, :width]), name


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
    before, after = batch.history_mask_BL.sum(1), out.history_visible_BL.sum(1)
    assert (after < before).any() and ((after < before) & (after > 0)).any()
    for b in range(80):
        n, m = int(before[b]), int(after[b])
        assert out.history_visible_BL[b, :m].all() and not out.history_visible_BL[b, m:].any()
        assert out.history_hours_BL[b, :m].tolist() == batch.history_hours_BL[b, n - m : n].tolist()
        assert out.history_ids_BL[b, :m].tolist() == batch.history_ids_BL[b, n - m : n].tolist()
        rest = sorted(out.history_ids_BL[b, m:].tolist())
        assert rest == sorted(batch.history_ids_BL[b].tolist()[: n - m] + batch.history_ids_BL[b].tolist()[n:])
    assert torch.equal(out.history_mask_BL, batch.history_mask_BL)  # what is hidden is still known, behind the rest


def test_time_window_is_drawn_for_each_request_and_follows_the_seed():
    batch = Batcher(make(80, users=1), CONFIG).of_requests(np.arange(40, 80))
    counts = hidden(batch, time_window_hours=8.0).history_visible_BL.sum(1)
    assert len(set(counts.tolist())) > 3
    assert torch.equal(counts, hidden(batch, time_window_hours=8.0).history_visible_BL.sum(1))
    assert not torch.equal(counts, hidden(batch, seed=1, time_window_hours=8.0).history_visible_BL.sum(1))


def test_ids_are_hidden_by_their_sign_at_the_stated_rate():
    batch = Batcher(make(300), CONFIG).of_requests(np.arange(300))
    out = hidden(batch, id_dropout=0.3)
    real = batch.item_ids_NW != 0
    assert float((out.item_ids_NW[real] < 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(out.item_ids_NW.abs(), batch.item_ids_NW)


def of_all(weights):
    return weights.of(np.arange(weights.table.rows), weights.table.request_of_row)


def test_row_weights_have_mean_one_and_follow_sampling_and_activity():
    table = make(60)
    sampled = np.arange(table.rows) % 2 == 0
    weights = of_all(row_weights(dataclasses.replace(table, sampled=sampled), recipe(sampled_weight=0.5).train))
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert weights[sampled].max() == pytest.approx(0.5 * weights[~sampled].min(), rel=1e-5)
    by_user = of_all(row_weights(table, recipe(user_weight_power=1.0).train))
    assert by_user.mean() == pytest.approx(1, rel=1e-5)
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
