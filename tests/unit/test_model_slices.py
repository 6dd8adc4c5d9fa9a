"""Slices: who is new, light, fresh or tail, and which slice is proven worse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engagement.table import Feature, hash_id
from model import gate_rules as rules
from model.metrics import hits
from model.slices import Slices, compare, holm, slices_of
from tests.unit.model_synth import SPEC, hashed, make

CONTEXT = replace(SPEC, features=(SPEC.features[0], Feature("hour", "request", "categorical"), *SPEC.features[1:]))


def remembered(users, user_rows, items, item_rows) -> dict[str, torch.Tensor]:
    """The champion's memory of rows: for each known id how many."""
    found = {}
    for name, ids, rows in (("user", users, user_rows), ("item", items, item_rows)):
        keys = hashed(f"{name}_id", np.array(ids))
        order = np.argsort(keys)
        found[f"content.{name}_keys"] = torch.from_numpy(keys[order])
        found[f"content.pair_{name}"] = torch.from_numpy(np.repeat(np.arange(len(ids)), np.array(rows)[order]))
    return found


def of_user(table, user) -> np.ndarray:
    return table.request_cat[:, 0] == hash_id("user_id", str(user))


def test_champions_memory_tells_who_is_new_or_light_and_what_is_fresh_or_tail():
    table = make(requests=200, users=4, items=4)
    # User 0 was never seen, 1 and 2 make up a fifth of 100 rows; item 3 is unknown, item 0 is the rarest fifth.
    memory = remembered([1, 2, 3], [8, 12, 80], [0, 1, 2], [20, 30, 50])
    slices = slices_of(table, memory)
    assert np.array_equal(slices.requests["new users"], of_user(table, 0))
    assert np.array_equal(slices.requests["light users"], of_user(table, 1) | of_user(table, 2))
    item = table.item_cat[:, 0]
    assert np.array_equal(slices.items["fresh items"], item == hash_id("item_id", "3"))
    assert np.array_equal(slices.items["tail items"], item == hash_id("item_id", "0"))


def test_every_common_value_of_a_context_is_a_slice_with_a_name():
    table = make(requests=300)
    hours = hashed("hour", np.repeat([7, 23, "night"], [150, 101, 49]))
    table = replace(table, spec=CONTEXT, request_cat=np.column_stack([table.request_cat, hours]))
    found = slices_of(table, remembered([1], [1], [1], [1])).requests
    assert set(found) == {"new users", "light users", "hour=7", "hour=23"}  # 49 requests at night are too few
    assert found["hour=23"].sum() == 101
    table = replace(
        table, request_cat=np.column_stack([table.request_cat[:, 0], np.roll(hours, 1)[::-1] * 0 + hours[-1]])
    )
    named = set(slices_of(table, remembered([1], [1], [1], [1])).requests) - {"new users", "light users"}
    assert named == {f"hour={hash_id('hour', 'night'):016x}"[:13]}


def judged(table, slices, after, before):
    wide = slices.widen(table)
    return compare(slices, table, "save", hits(wide, after), hits(wide, before))


def test_the_slice_that_lost_is_found_and_no_other():
    table = make(requests=1500, users=300, items=200, seed=1)
    half = of_user(table, 0) | (np.arange(1500) % 2 == 0)
    good = np.random.default_rng(0).random(table.rows) + table.labels[:, 0]
    bad = np.where(half[table.request_of_row], np.random.default_rng(1).random(table.rows), good)
    results, thin = judged(table, Slices({"lost": half, "kept": ~half, "few": of_user(table, 0)}, {}), bad, good)
    assert [s.name for s in results] == ["lost", "kept"] and thin == ("few",)
    assert results[0].adjusted < 0.001 and results[0].difference < -0.2
    assert results[1].difference == 0 and not rules.slice_worse(results[1].adjusted)


def test_an_item_slice_counts_hits_on_its_items_alone():
    table = make(requests=1500, users=300, items=20, seed=2)
    fresh = table.item_cat[:, 0] == hash_id("item_id", "3")
    good = np.random.default_rng(0).random(table.rows) + table.labels[:, 0]
    bad = good - 3 * fresh  # buries the slice's items, all else as before
    slices = Slices({}, {"fresh items": fresh, "others": ~fresh})
    (lost, other), _ = judged(table, slices, bad, good)
    shown = np.bincount(table.request_of_row, fresh, table.requests) > 0
    assert lost.name == "fresh items" and rules.slice_worse(lost.adjusted)
    assert lost.requests == (shown & (np.diff(table.offsets) > 3)).sum()
    assert other.difference >= 0 and not rules.slice_worse(other.adjusted)


def test_holm_is_the_textbook_procedure():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.5])) == pytest.approx([1.0, 1.0]) and len(holm(np.zeros(0))) == 0
