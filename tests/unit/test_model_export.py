"""An exported model computes what PyTorch does, without PyTorch, and says so when it cannot."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.table import Feature, RankingTable, hash_id
from model import export as exporting
from model.bundle import Bundle
from model.columns import widen_table
from model.export import PARITY, POPULARITY_PRIOR, export
from model.files import stamped
from model.hashing import rows_of
from model.lookups import NO_VALUE, UNKNOWN, TableRows, find
from model.predict import score
from model.quantise import HIT_LOSS, OVERLAP, compared, within_budget
from model.served import CARD, GRAPH, LOOKUPS, ServedRanker
from model.train import train
from tests.unit.model_synth import SPEC, hashed, make, recipe


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return train(make(200), recipe(epochs=1), "scratch", None, 0, tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def exported(bundle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "served"
    return directory, export(bundle, make(60, seed=3), directory)


@pytest.fixture(scope="module")
def served(exported) -> ServedRanker:
    return ServedRanker.load(exported[0])


@pytest.fixture
def same_graph(exported, monkeypatch):
    """Exports of the same bundle take the graph that is already there."""
    graph = (exported[0] / GRAPH).read_bytes()
    monkeypatch.setattr(exporting, "graph_of", lambda ranker: graph)


def close(bundle: Bundle, served: ServedRanker, table: RankingTable, *, at_once: bool = True) -> None:
    """Both give the same probabilities, request by request or all together."""
    parts = [table] if at_once else [table.select(np.array([r])) for r in range(table.requests)]
    got = np.concatenate([scores for part in parts for scores in served.score([part])])
    np.testing.assert_allclose(got, score(bundle, table), atol=PARITY / 10, rtol=0)
    assert got.dtype == np.float32


def wide(requests: int, size: int, seed: int = 4) -> RankingTable:
    """Requests of up to `size` candidates."""
    return make(requests, size=size, seed=seed)


def test_parity_at_odd_shapes(bundle, served):
    for table in (make(1, size=1, seed=5), wide(3, 7), wide(40, 8, seed=6), wide(1, 300, seed=9)):
        close(bundle, served, table)
        close(bundle, served, table, at_once=False)


def test_parity_with_empty_and_full_histories(bundle, served):
    table = make(200, users=2, seed=5)
    late = table.select(np.arange(150, 200))
    assert (late.history_end - late.history_start > bundle.recipe.ranker.history).any()
    close(bundle, served, late)
    none = dataclasses.replace(late, history_end=late.history_start)
    close(bundle, served, none)
    bare = dataclasses.replace(none, **{n: getattr(none, n)[:0] for n in ("history_time", "history_item")})
    close(bundle, served, dataclasses.replace(bare, history_actions=none.history_actions[:0]))
    some = np.where(np.arange(50) % 2, late.history_start, late.history_end)
    close(bundle, served, dataclasses.replace(late, history_end=some))


def test_parity_for_users_and_items_never_seen_and_for_missing_values(bundle, served):
    table = make(30, seed=5)
    cat = table.item_cat.copy()
    cat[::2, 0] = hashed("item_id", np.arange(len(cat[::2])) + 10_000)
    cat[::3, 1:] = 0
    users = hashed("user_id", np.arange(30) + 10_000)[:, None]
    numbers = table.item_num.copy()
    for row, value in enumerate((np.nan, np.inf, -np.inf, 1e30)):
        numbers[row] = value
    requests = np.full_like(table.request_num, np.nan)
    close(
        bundle,
        served,
        dataclasses.replace(table, item_cat=cat, request_cat=users, item_num=numbers, request_num=requests),
    )


def test_a_request_scores_the_same_alone_and_among_others(served):
    tables = [make(1, size=size, seed=size) for size in (8, 2, 5)]
    for alone, among in zip([served.score([t])[0] for t in tables], served.score(tables), strict=True):
        np.testing.assert_allclose(among, alone, atol=1e-6)
    assert [len(s) for s in served.score(tables)] == [t.rows for t in tables]
    empty = make(3).select(np.array([], np.int64))
    assert [s.shape for s in served.score([empty, tables[0]])] == [(0, 3), (tables[0].rows, 3)]
    assert served.score([]) == [] and served.score([empty])[0].shape == (0, 3)


def test_reused_buffers_leak_nothing_of_earlier_requests(exported, served):
    small, large = make(2, size=2, seed=5), wide(9, 40)
    first = ServedRanker.load(exported[0]).score([small])[0]
    kept = served.score([large])[0]
    copy = kept.copy()
    broken = dataclasses.replace(large, item_num=np.full_like(large.item_num, np.nan))
    served.score([broken])
    np.testing.assert_array_equal(served.score([small])[0], first)
    np.testing.assert_array_equal(kept, copy)
    np.testing.assert_array_equal(served.score([small, large])[1].shape, kept.shape)


def test_threads_take_turns_at_the_buffers(served):
    tables = [wide(4, size, seed=size) for size in (3, 30)]
    expected, found = [served.score([t])[0] for t in tables], [[], []]
    threads = [
        threading.Thread(target=lambda i=i: found[i].extend(served.score([tables[i]])[0] for _ in range(30)))
        for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((s == e).all() for e, many in zip(expected, found, strict=True) for s in many)


def test_a_table_with_more_features_than_the_model_is_scored(bundle, served):
    table = make(12, seed=5)
    more = dataclasses.replace(
        SPEC,
        features=(
            Feature("surface", "request", "categorical"),
            *SPEC.features,
            Feature("length", "candidate", "numeric"),
        ),
    )
    close(bundle, served, widen_table(table, more))
    fewer = dataclasses.replace(SPEC, features=tuple(f for f in SPEC.features if f.name != "topics"))
    with pytest.raises(EvergreenError, match="'topics' vanished"):
        served.score([dataclasses.replace(table, spec=fewer)])


def test_one_flipped_byte_is_refused(exported, tmp_path):
    for name in (GRAPH, LOOKUPS, CARD):
        copy = shutil.copytree(exported[0], tmp_path / name)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(EvergreenError, match="damaged"):
            ServedRanker.load(copy)


def test_a_bundle_that_was_never_exported_says_what_to_do(tmp_path):
    with pytest.raises(EvergreenError, match="Register the model again"):
        ServedRanker.load(tmp_path / "served")


def test_an_export_of_another_format_is_refused(exported, tmp_path):
    copy = shutil.copytree(exported[0], tmp_path / "served")
    card = {k: v for k, v in json.loads((copy / CARD).read_text()).items() if k != "checksum"} | {"format": 99}
    (copy / CARD).write_bytes(stamped(card))
    with pytest.raises(EvergreenError, match="format 99"):
        ServedRanker.load(copy)


def test_equal_bundles_give_equal_bytes_and_the_card_says_what_they_are(bundle, exported, tmp_path):
    directory, card = exported
    export(bundle, make(60, seed=3), tmp_path / "served")
    for name in (GRAPH, LOOKUPS, CARD):
        assert (tmp_path / "served" / name).read_bytes() == (directory / name).read_bytes()
    assert card["bundle"] == bundle.digest and card["precision"] == "fp32" and card["quantisation"] is None
    assert card["parity"]["worst"] < PARITY and card["bytes"][GRAPH] == (directory / GRAPH).stat().st_size


def test_a_bundle_with_an_export_inside_still_loads(bundle, exported, tmp_path):
    bundle.save(tmp_path / "b")
    shutil.copytree(exported[0], tmp_path / "b" / "served")
    assert Bundle.load(tmp_path / "b").digest == bundle.digest


@pytest.mark.parametrize(("gap", "refused"), [(0.9 * PARITY, False), (2 * PARITY, True), (np.nan, True)])
def test_an_export_that_differs_from_pytorch_is_refused(bundle, tmp_path, monkeypatch, same_graph, gap, refused):
    monkeypatch.setattr(exporting, "score", lambda bundle, table: score(bundle, table) + np.float32(gap))
    if refused:
        with pytest.raises(EvergreenError, match="differs from PyTorch"):
            export(bundle, make(5, seed=3), tmp_path / "served")
        assert not (tmp_path / "served").exists()
    else:
        export(bundle, make(5, seed=3), tmp_path / "served")


def test_a_model_that_gives_no_numbers_is_exported_as_it_is(bundle, tmp_path):
    weights = bundle.weights | {"heads.bias": torch.full_like(bundle.weights["heads.bias"], float("nan"))}
    export(dataclasses.replace(bundle, weights=weights), make(5, seed=3), tmp_path / "served")
    assert np.isnan(ServedRanker.load(tmp_path / "served").score([make(2, seed=5)])[0]).all()


def test_an_empty_table_is_refused(bundle, tmp_path):
    with pytest.raises(EvergreenError, match="needs requests"):
        export(bundle, make(5).select(np.array([], np.int64)), tmp_path / "served")


def test_popularity_counts_actions_by_item_and_smooths_them(served):
    table = make(60, seed=3)
    item = table.item_cat[0, 0]
    rows = table.item_cat[:, 0] == item
    mean = table.labels.mean(0)
    expected = (table.labels[rows].sum(0) + POPULARITY_PRIOR * mean) / (rows.sum() + POPULARITY_PRIOR)
    name = table.item_id[0].decode().removeprefix("i")  # what the synthetic hashes are of
    np.testing.assert_allclose(served.popular([name, "nobody saw it"]), [expected, mean], rtol=1e-6)
    assert served.popular([]).shape == (0, 3)


def test_rows_of_the_table_are_those_of_training():
    buckets, seen = 64, np.array([1, 5, 9, 30, 63])
    ids = np.array([[hash_id("item_id", f"i{i}") for i in range(300)], np.arange(300)])
    rows = rows_of(torch.from_numpy(ids), buckets).numpy()
    out = np.empty((*ids.shape, 2), np.int64)
    TableRows(seen, buckets).find(ids, out)
    known = np.isin(rows, seen).all(-1)
    expected = np.where(known[..., None], np.searchsorted(seen, rows) + UNKNOWN + 1, UNKNOWN)
    assert known.sum() > 2
    np.testing.assert_array_equal(out, np.where((ids == 0)[..., None], NO_VALUE, expected))


def test_ids_are_found_among_the_keys_and_no_others():
    keys = np.array([3, 8, 20])
    np.testing.assert_array_equal(find(keys, np.array([[3, 4], [20, 21]])), [[0, 3], [2, 3]])
    np.testing.assert_array_equal(find(keys[:0], np.array([3])), [0])


def test_scoring_imports_neither_torch_nor_pandas_nor_mlflow(exported):
    code = (
        "import sys; from pathlib import Path; from model.served import ServedRanker\n"
        f"r = ServedRanker.load(Path({str(exported[0])!r})); r.popular(['i1'])\n"
        "print([m for m in ('torch', 'pandas', 'mlflow', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overlap", "lost", "taken"),
    [
        (OVERLAP, 0.0, True),
        (np.nextafter(OVERLAP, 0), 0.0, False),
        (1.0, HIT_LOSS, True),
        (1.0, np.nextafter(HIT_LOSS, 1), False),
        (1.0, -1.0, True),
        (1.0, np.nan, False),
    ],
)
def test_the_budget_of_int8_holds_at_its_edges(overlap, lost, taken):
    assert within_budget(overlap, lost, 0.0) is taken


def test_int8_is_taken_within_the_budget_only_and_told_either_way(bundle, tmp_path, monkeypatch, same_graph):
    table = make(40, size=20, seed=3)
    for taken in (True, False):
        monkeypatch.setattr(exporting, "within_budget", lambda *told, taken=taken: taken)
        card = export(bundle, table, tmp_path / "served", int8=True)
        told, small = card["quantisation"], ServedRanker.load(tmp_path / "served")
        assert told["taken"] is taken and told["bytes_int8"] < told["bytes_fp32"] and told["speed"] > 0
        assert small.precision == card["precision"] == ("int8" if taken else "fp32")
        assert card["bytes"][GRAPH] == told["bytes_int8" if taken else "bytes_fp32"]
        assert np.abs(small.score([table])[0] - score(bundle, table)).max() < 0.1
        assert 0.8 < told["overlap"] <= 1


def test_overlap_is_of_the_ten_best_by_the_primary_action(served):
    table = make(30, size=20, seed=3)

    class Reversed:
        def score(self, tables):
            return [1 - s for s in served.score(tables)]

    same, turned = compared(table, served, served), compared(table, served, Reversed())
    assert same["overlap"] == 1 and same["hit3"] == same["hit3_int8"] and same["worst"] == 0
    assert turned["overlap"] < 0.7 and turned["hit3_int8"] < turned["hit3"]
