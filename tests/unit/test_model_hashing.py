"""Ids to rows of the table: what is missing, hidden or new, and how often two ids share."""

import numpy as np
import torch

from engagement.table import hash_id
from model.hashing import rows_of


def ids_of(count: int) -> torch.Tensor:
    return torch.tensor([hash_id("item_id", str(i)) for i in range(count)])


def test_rows_are_those_of_the_formula_on_python_integers():
    ids, buckets = ids_of(50), 1009
    expected = [[1 + h % (buckets - 1), 1 + h // (buckets - 1) % (buckets - 1)] for h in ids.tolist()]
    assert rows_of(ids, buckets).tolist() == expected


def test_missing_and_hidden_ids_have_no_row_and_no_other_id_has_that_one():
    rows = rows_of(torch.tensor([0, -5, -(2**62), 1, 2**63 - 1]), 4096)
    assert (rows[:3] == 0).all() and (rows[3:] > 0).all() and (rows < 4096).all()


def test_ids_share_a_row_as_often_as_chance_and_practically_never_both():
    count, buckets = 2000, 8192
    rows = rows_of(ids_of(count), buckets).numpy()
    assert len(np.unique(rows, axis=0)) == count
    for side in rows.T:
        expected = buckets * (1 - (1 - 1 / buckets) ** count)
        assert abs(len(np.unique(side)) - expected) < 60


def test_a_new_id_is_taken_for_a_known_one_only_by_the_square_of_the_filled_share():
    buckets, ids = 2**16, ids_of(30_000)
    seen = torch.zeros(buckets, dtype=torch.bool)
    seen[rows_of(ids[:3000], buckets)] = True
    known = seen[rows_of(ids[3000:], buckets)].all(-1)
    assert known.float().mean() < 2 * seen.float().mean() ** 2
