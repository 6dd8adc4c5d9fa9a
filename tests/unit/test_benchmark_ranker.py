"""What the peers are given, and the numbers that all are judged by."""

import json

import numpy as np
import pytest

from benchmarks.ranker.peers import arrays, configs
from tests.unit import model_synth


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    table = model_synth.make(requests=200)
    train, evaluation = table.between(0, int(table.time[150])), table.between(int(table.time[150]), 2**62)
    path = tmp_path_factory.mktemp("arrays")
    arrays.write(train, evaluation, path)
    loaded = {name: dict(np.load(path / f"{name}.npz")) for name in ("train", "evaluation")}
    return train, evaluation, loaded, json.loads((path / "meta.json").read_text())


def test_peers_sequences_hold_each_users_last_actions_before_the_request_newest_first(written):
    train, evaluation, loaded, _ = written
    code = arrays.Codes(train.item_cat[:, :1])
    for table, part in ((train, loaded["train"]), (evaluation, loaded["evaluation"])):
        for name, bits in (("recent", 7), ("save", 1), ("click", 2), ("hide", 4)):
            for r in range(table.requests):
                span = slice(table.history_start[r], table.history_end[r])
                mine = table.history_item[span][(table.history_actions[span] & bits) > 0]
                expected = np.zeros(arrays.HISTORY, int)
                last = code(mine[::-1][: arrays.HISTORY])
                expected[: len(last)] = last
                assert part[f"seq_{name}"][r].tolist() == expected.tolist()


def test_an_id_that_is_not_twice_in_training_is_unknown_and_no_value_is_none():
    code = arrays.Codes(np.array([[5], [5], [9], [7], [7], [0], [0]]))
    assert code(np.array([5, 7, 9, 11, 0])).tolist() == [2, 3, arrays.UNKNOWN, arrays.UNKNOWN, arrays.NONE]
    assert code.size == 4
    assert arrays.Codes(np.array([[0]]))(np.array([0, 3])).tolist() == [arrays.NONE, arrays.UNKNOWN]


def test_peers_get_every_declared_column_in_row_order(written):
    train, _, loaded, meta = written
    part, row = loaded["train"], train.request_of_row
    assert list(meta["cat"]) == ["user_id", "item_id"] and list(meta["slots"]) == ["topics"]
    np.testing.assert_array_equal(part["num"], np.concatenate([train.request_num[row], train.item_num], 1))
    np.testing.assert_array_equal(part["label"], train.labels[:, 0])
    user = arrays.Codes(train.request_cat)
    np.testing.assert_array_equal(part["cat"][:, 0], user(train.request_cat[row, 0]))
    assert part["slots_topics"].shape == (train.rows, 3)
    assert max(part["cat"][:, 1].max(), part["seq_recent"].max()) < meta["cat"]["item_id"]


def test_what_was_chosen_for_a_peer_is_of_its_grid():
    for dataset, chosen in configs.CHOSEN.items():
        assert set(chosen) == set(configs.NAMES), dataset
        for model, config in chosen.items():
            tried = [{**g, "epochs": 0, "rounds": 0, "trace": 0} for g in configs.GRID[model]]
            assert {**config, "epochs": 0, "rounds": 0, "trace": 0} in tried, (dataset, model)
