"""The truth of a simulated feed, read back for a ranking table; regret; the command line."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from engagement.errors import EvergreenError
from engagement.simulate.draw import ACTIONS
from engagement.simulate.truth import chances, regret
from engagement.simulate.worlds import Scale, recurring
from engagement.simulate.write import simulate
from engagement.table import RankingTable, TableSpec
from tests.commands import evergreen_json

SPEC = TableSpec((), ACTIONS, "save", ("hide",))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("truth") / "feed"
    simulate(recurring(), Scale.of(40, 7, 2000, seed=1), out)
    return out


@pytest.fixture(scope="module")
def table(directory):
    """The feed's requests as a ranking table without features, newest request first and candidates by name."""
    rows = pq.read_table(directory / "engagements").to_pandas()
    rows = rows.sort_values(["request_id", "item_id"], ascending=[False, True])
    request, sizes = np.unique(rows["request_id"], return_counts=True)
    requests, n = len(request), len(rows)
    no = np.zeros(0, np.int64)
    return RankingTable(
        spec=SPEC,
        request_id=request[::-1].astype(bytes),
        user_id=np.zeros(requests, "S1"),
        time=np.zeros(requests, np.int64),
        offsets=np.concatenate([[0], np.cumsum(sizes[::-1])]),
        history_start=np.zeros(requests, np.int64),
        history_end=np.zeros(requests, np.int64),
        request_cat=np.zeros((requests, 0), np.int64),
        request_num=np.zeros((requests, 0), np.float32),
        item_id=rows["item_id"].to_numpy().astype(bytes),
        item_cat=np.zeros((n, 0), np.int64),
        item_num=np.zeros((n, 0), np.float32),
        labels=rows[list(ACTIONS)].to_numpy().astype(np.uint8),
        sampled=np.zeros(n, bool),
        history_time=no,
        history_item=no,
        history_actions=no,
    )


def test_chances_are_found_by_name_whatever_the_order_of_rows(directory, table):
    written = pq.read_table(directory / "truth").to_pandas().set_index(["request_id", "item_id"])
    names = [
        (r.decode(), i.decode()) for r, i in zip(table.request_id[table.request_of_row], table.item_id, strict=True)
    ]
    np.testing.assert_array_equal(chances(directory, table), written.loc[names, list(ACTIONS)].to_numpy())


def test_true_order_has_no_regret_and_a_random_one_much_more_than_a_noisy_one(directory, table):
    save = chances(directory, table)[:, 0]
    rng = np.random.default_rng(0)
    none, some, much = (
        regret(table, save, s) for s in (np.log(save), save + rng.normal(0, 0.1, len(save)), rng.random(len(save)))
    )
    assert none.mean == none.relative == 0
    assert 0 < some.relative < 0.5 * much.relative < 0.5 * 0.8
    assert (much.best_Q >= much.got_Q).all() and len(much.best_Q) == table.requests
    assert much.mean == pytest.approx((much.best_Q - much.got_Q).mean())


def test_regret_of_one_request_is_what_a_hand_count_gives(directory, table):
    one = table.select(np.array([0]))
    save = np.array([0.9, 0.1, 0.5, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0])
    found = regret(one, save, -save)
    assert found.best_Q.tolist() == pytest.approx([1.8]) and found.got_Q.tolist() == [0.0]
    assert found.relative == 1.0


def test_equal_scores_and_nan_win_nothing(directory, table):
    save = chances(directory, table)[:, 0]
    equal, blind = regret(table, save, np.zeros(len(save))), regret(table, save, np.where(save > 0.5, np.nan, 0.0))
    assert blind.relative > equal.relative > 0.2


def test_order_by_the_truth_hits_far_more_saves_than_chance(directory, table):
    from model.metrics import hit3, hits, random_hit3

    found = hits(table, chances(directory, table))
    assert hit3(found)["save"] > 1.7 * random_hit3(found)["save"]
    assert hit3(found)["hide"] < 0.6 * random_hit3(found)["hide"]


def test_foreign_requests_and_a_directory_without_truth_are_refused(tmp_path, directory, table):
    with pytest.raises(EvergreenError, match="holds no truth"):
        chances(tmp_path, table)
    simulate(recurring(), Scale.of(40, 7, 500, seed=2), tmp_path / "other")
    with pytest.raises(EvergreenError, match="candidates are not in the truth of"):
        chances(tmp_path / "other", table)


def test_command_without_out_imports_the_feed_and_keeps_no_other_files(tmp_path):
    report = evergreen_json(tmp_path, "data", "simulate", "--users", "30", "--days", "5", "--world", "market")
    assert report["imported"] == 300 and not report["quarantined"]
    assert not list(tmp_path.rglob("truth"))
