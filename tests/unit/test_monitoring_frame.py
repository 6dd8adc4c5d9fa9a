"""The sample that drift is judged on; `window` and `SPEC` serve the other monitoring tests too."""

import numpy as np
import pyarrow as pa
import pytest

from engagement.errors import EvergreenError
from engagement.table import Feature, RankingTable, TableSpec
from monitoring import frame

SPEC = TableSpec(
    features=(
        Feature("user_id", "request", "categorical"),
        Feature("item_id", "candidate", "categorical"),
        Feature("country", "request", "categorical"),
        Feature("topic", "candidate", "categorical"),
        Feature("tags", "candidate", "categories", width=4),
        Feature("age", "request", "numeric"),
        Feature("clicks", "candidate", "numeric", transform="log1p"),
        Feature("price", "candidate", "numeric"),
        Feature("look", "candidate", "embedding", width=4),
        Feature("day_of_week", "request", "categorical"),
    ),
    actions=("save", "hide"),
    primary_action="save",
    negative_actions=("hide",),
)


def window(users: int = 100, per_user: int = 20, seed: int = 0) -> pa.Table:
    """Users with fixed features, four requests each; every column that `SPEC` declares, and scores."""
    rng = np.random.default_rng(seed)
    n = users * per_user
    user = np.repeat(np.arange(users), per_user)
    age, country = rng.normal(35, 10, users), rng.choice(["nl", "de", "fr", "be"], users)
    return pa.table(
        {
            "request_id": [f"s{seed}u{u}r{i % 4}" for i, u in enumerate(user)],
            "user_id": [f"s{seed}u{u}" for u in user],
            "item_id": [f"i{i}" for i in rng.integers(0, 500, n)],
            "country": country[user],
            "topic": rng.choice(["art", "food", "home", None], n, p=[0.4, 0.3, 0.25, 0.05]),
            "tags": [["a", "b"][: 1 + i % 2] for i in range(n)],
            "age": age[user],
            "clicks": rng.poisson(20, n),
            "price": np.where(rng.random(n) < 0.1, np.nan, rng.lognormal(1, 1, n)),
            "look": [[0.1, 0.2, 0.3, 0.4]] * n,
            "day_of_week": [str(seed % 7)] * n,
            "score_save": rng.beta(2, 20, n),
            "score_hide": rng.beta(1, 40, n),
            "label_save": rng.random(n) < 0.1,
            "label_hide": rng.random(n) < 0.02,
        }
    )


def put(table: pa.Table, name: str, values: object) -> pa.Table:
    """The table with one column replaced."""
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def ranking_table(requests: int, per_request: int) -> RankingTable:
    n = requests * per_request
    spec = TableSpec((Feature("price", "candidate", "numeric"),), ("save", "hide"), "save")
    none = np.zeros(0, dtype=np.int64)
    return RankingTable(
        spec=spec,
        request_id=np.array([f"r{r}" for r in range(requests)], dtype=np.bytes_),
        user_id=np.array([f"ü{r % 3}".encode() for r in range(requests)], dtype=np.bytes_),
        time=np.arange(requests, dtype=np.int64),
        offsets=np.arange(0, n + 1, per_request, dtype=np.int64),
        history_start=np.zeros(requests, dtype=np.int64),
        history_end=np.zeros(requests, dtype=np.int64),
        request_cat=np.zeros((requests, 0), dtype=np.int64),
        request_num=np.zeros((requests, 0), dtype=np.float32),
        item_id=np.array([f"i{i}" for i in range(n)], dtype=np.bytes_),
        item_cat=np.zeros((n, 0), dtype=np.int64),
        item_num=np.arange(n, dtype=np.float32)[:, None],
        labels=np.stack([np.arange(n) % 2, np.arange(n) % 3 == 0], axis=1).astype(np.uint8),
        sampled=np.zeros(n, dtype=bool),
        history_time=none,
        history_item=none,
        history_actions=none,
    )


def sample_of(table: RankingTable, rows: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "row": rows,
            "request_id": [table.request_id[r].decode() for r in table.request_of_row[rows]],
            "item_id": [table.item_id[r].decode() for r in rows],
            "price": table.item_num[rows, 0],
        }
    )


def test_sample_gets_the_scores_labels_and_user_of_its_own_rows():
    table = ranking_table(requests=6, per_request=5)
    scores = np.random.default_rng(0).random((30, 2)).astype(np.float32)
    rows = np.array([0, 7, 29])
    joined = frame.sample_frame(sample_of(table, rows), table, scores)
    assert "row" not in joined.column_names
    assert joined["user_id"].to_pylist() == ["ü0", "ü1", "ü2"]
    assert joined["score_hide"].to_pylist() == scores[rows, 1].astype(np.float64).tolist()
    assert joined["label_save"].to_pylist() == [False, True, True]
    assert joined["price"].to_pylist() == [0.0, 7.0, 29.0]


def test_empty_sample_keeps_every_column():
    table = ranking_table(requests=2, per_request=5)
    joined = frame.sample_frame(sample_of(table, np.zeros(0, dtype=np.int64)), table, np.zeros((10, 2)))
    assert joined.num_rows == 0
    assert {"user_id", "score_save", "score_hide", "label_save"} <= set(joined.column_names)


@pytest.mark.parametrize(("shape", "row"), [((29, 2), 0), ((30, 1), 0), ((30, 2), 30), ((30, 2), -1)])
def test_scores_of_another_table_are_refused(shape, row):
    table = ranking_table(requests=6, per_request=5)
    sample = put(sample_of(table, np.array([0])), "row", [row])
    with pytest.raises(EvergreenError, match="do not fit a table of 30 rows"):
        frame.sample_frame(sample, table, np.zeros(shape))


def test_limit_keeps_whole_requests_whatever_the_row_order():
    table = window(users=50)
    taken = frame.take_requests(table, 300, seed=1)
    assert 290 <= taken.num_rows <= 300
    sizes = table.group_by("request_id").aggregate([("item_id", "count")]).to_pylist()
    size = {r["request_id"]: r["item_id_count"] for r in sizes}
    for r in taken.group_by("request_id").aggregate([("item_id", "count")]).to_pylist():
        assert r["item_id_count"] == size[r["request_id"]]
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    again = frame.take_requests(shuffled, 300, seed=1)
    assert set(again["request_id"].to_pylist()) == set(taken["request_id"].to_pylist())
    assert set(frame.take_requests(table, 300, seed=2)["request_id"].to_pylist()) != set(
        taken["request_id"].to_pylist()
    )


def test_one_request_larger_than_the_limit_is_cut():
    table = put(window(users=5), "request_id", ["r"] * 100)
    assert frame.take_requests(table, 30).num_rows == 30


def test_numbers_that_are_no_numbers_become_missing():
    column = pa.chunked_array([pa.array([1.0, None, float("inf"), float("nan"), -3.0])])
    assert frame.numbers(column).tolist()[::4] == [1.0, -3.0]
    assert np.isnan(frame.numbers(column)[1:4]).all()
    assert frame.numbers(column, "log1p").tolist()[::4] == [np.log1p(1.0), 0.0]
    assert np.isnan(frame.numbers(pa.chunked_array([pa.array(["a", "b"])]))).all()


def test_unseen_counts_rows_with_new_values_and_ignores_missing_ones():
    def column(values):
        return pa.chunked_array([pa.array(values)])

    assert frame.unseen(column(["a", "b"]), column(["a", "c", None, "c"])) == 0.5
    assert frame.unseen(column([["a"], ["b"]]), column([["a", "x", "y"], ["b"], None, []])) == 0.25
    assert frame.unseen(column([1, 2]), column([2, 3])) == 0.5
    assert frame.unseen(column(["a"]), column(["a"]).slice(0, 0)) == 0.0
