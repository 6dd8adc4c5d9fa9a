"""Sketches of windows: the same whether a window is taken at once, in chunks, or in parts put together."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_synth import ACTIONS, SPEC, make

from engagement.errors import EvergreenError
from engagement.table import MISSING, Feature, RankingTable, TableSpec
from monitoring import sketch as sketching
from monitoring.cells import CELL_CATEGORIES, CELL_VECTORS, load_cells, save_cells
from monitoring.counts import NO_NUMBER, OTHER, Counts, categories, numbers
from monitoring.sketch import (
    VOCABULARY,
    Sketch,
    Vocabulary,
    centres_of,
    feature_blocks,
    joined,
    sketch,
    together,
    unseen,
    vocabulary,
)

ALL = 2**63 - 1


@pytest.fixture
def few(monkeypatch):
    """Vocabularies of 16 hashes at most, so that small ones are cut too."""
    monkeypatch.setattr(sketching, "VOCABULARY", 16)


def same_counts(a, b):
    return np.array_equal(a.keys, b.keys) and np.allclose(a.counts, b.counts)


def same_sketch(a, b, sample=True):
    assert (a.requests, a.rows) == (b.requests, b.rows)
    assert list(a.columns) == list(b.columns)
    assert all(same_counts(a.columns[n], b.columns[n]) for n in a.columns)
    assert {n: (v.hashes.tolist(), v.bound) for n, v in a.vocabularies.items()} == {
        n: (v.hashes.tolist(), v.bound) for n, v in b.vocabularies.items()
    }
    for x, y in zip(a.vectors.values(), b.vectors.values(), strict=True):
        assert (x.count, x.missing) == (y.count, y.missing)
        assert same_counts(x.norms, y.norms) and np.allclose(x.total, y.total)
        assert not sample or np.array_equal(x.sample, y.sample)
    return True


def test_each_feature_is_counted_by_its_kind():
    table = make(requests=200)
    centres = centres_of(table)
    seen = sketch(table, centres)
    assert (seen.requests, seen.rows) == (200, table.rows)
    assert set(seen.columns) == {"user_saves", "topics", "item_rate"}
    assert set(seen.vocabularies) == {"user_id", "item_id", "topics"}
    assert set(seen.vectors) == {"content"}
    assert seen.columns["user_saves"].total == 200  # a request's feature counts once a request
    rate = table.item_num[:, 0]
    assert same_counts(seen.columns["item_rate"], numbers(rate, centres["item_rate"]))
    assert seen.columns["item_rate"].at(NO_NUMBER) == np.isnan(rate).sum() > 0
    assert seen.vocabularies["item_id"].hashes.tolist() == np.unique(table.item_cat[:, 0]).tolist()
    assert seen.vectors["content"].count == table.rows


def test_what_fills_up_a_list_of_categories_is_not_missing_but_an_empty_list_is():
    table = make(requests=50)
    table.item_cat[:4, 1:] = MISSING
    topics = sketch(table, {}).columns["topics"]
    assert topics.at(MISSING) == 4 and topics.total == table.rows


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_window_read_in_chunks_is_the_same_as_at_once(monkeypatch, chunk, few):
    table = make(requests=60)
    table.item_num[5:9, 3] = np.nan
    whole = sketch(table, {"item_rate": 0.3})
    monkeypatch.setattr(sketching, "CHUNK", chunk)
    assert same_sketch(sketch(table, {"item_rate": 0.3}), whole)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 60 * 3_600_000_000), max_size=3))
def test_windows_put_together_are_the_same_as_one_window(cuts):
    table = make(requests=60)
    edges = [0, *sorted(cuts), 2**62]
    parts = [sketch(table.between(a, b), {}) for a, b in zip(edges, edges[1:], strict=False)]
    assert same_sketch(together(parts), sketch(table, {}), sample=False)


@pytest.mark.parametrize("requests", [0, 1])
def test_an_empty_window_and_one_of_one_request_have_every_column(requests):
    table = make(requests=20).between(0, requests * 3_600_000_000 + 1)
    if not requests:
        table = make(requests=20).between(5, 5)
    seen = sketch(table, centres_of(table))
    assert seen.requests == requests
    assert set(seen.columns) == {"user_saves", "topics", "item_rate"}
    assert set(seen.vectors) == {"content"} and set(seen.vocabularies) == {"user_id", "item_id", "topics"}
    assert seen.columns["user_saves"].total == requests


def test_constant_and_all_missing_columns_are_counted():
    table = make(requests=30)
    table.item_num[:, 0] = np.nan
    table.request_num[:] = 4.0
    table.item_cat[:, 1:] = MISSING
    table.item_num[:, 1:] = np.inf
    centres = centres_of(table)
    assert centres == {"user_saves": 4.0, "item_rate": 0.0}
    seen = sketch(table, centres)
    assert (seen.columns["item_rate"].keys.tolist(), seen.columns["topics"].keys.tolist()) == ([NO_NUMBER], [MISSING])
    assert seen.columns["user_saves"].keys.tolist() == [0]  # at the centre
    assert seen.vocabularies["topics"] == seen.vocabularies["topics"] and not len(seen.vocabularies["topics"].hashes)
    assert (seen.vectors["content"].count, seen.vectors["content"].missing) == (0, table.rows)


def test_predictions_are_sketched_by_head():
    table = make(requests=10)
    scores = np.random.default_rng(0).random((table.rows, len(ACTIONS)))
    seen = sketch(table, {}, scores)
    assert list(seen.columns) == ["score_save", "score_click", "score_hide"]
    assert same_counts(seen.columns["score_click"], numbers(scores[:, 1], 0.0))


def test_feature_blocks_are_views_of_the_table():
    table = make(requests=10)
    blocks = {feature.name: block for feature, block in feature_blocks(table)}
    assert {n: b.shape[1] for n, b in blocks.items()} == {f.name: f.width for f in SPEC.features}
    assert all(b.base is not None for b in blocks.values())


def test_a_large_window_takes_little_memory(tmp_path):
    rows, width = 1_500_000, 20
    spec = TableSpec(tuple(Feature(f"n{i}", "candidate", "numeric") for i in range(width)), ("save",), "save")
    small = dataclasses.replace(make(requests=1), spec=spec, request_cat=np.zeros((1, 0), np.int64))
    values = np.lib.format.open_memmap(tmp_path / "item_num.npy", "w+", np.float32, (rows, width))
    values[:] = np.random.default_rng(0).standard_normal((rows, 1), np.float32)
    table = dataclasses.replace(
        small, item_num=values, item_cat=np.zeros((rows, 0), np.int64), request_num=np.zeros((1, 0), np.float32)
    )
    tracemalloc.start()
    seen = sketch(table, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.columns["n19"].total == rows
    assert peak < 60e6 < values.nbytes


# Vocabularies


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 80) | st.integers(2**62, 2**62 + 80), max_size=60), max_size=4))
def test_vocabularies_put_together_are_the_same_as_one(parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketching, "VOCABULARY", 16)
        one = vocabulary(np.array(sum(parts, []), np.int64))
        both = joined(vocabulary(np.array(p, np.int64)) for p in parts)
    assert (one.hashes.tolist(), one.bound) == (both.hashes.tolist(), both.bound)
    distinct = sorted({v for p in parts for v in p} - {MISSING})
    assert one.hashes.tolist() == distinct[:16]
    assert one.bound == (distinct[16] if len(distinct) > 16 else ALL)


def test_how_many_distinct_values_there_were_is_known_to_two_percent():
    hashes = np.random.default_rng(0).integers(1, 2**63 - 1, 300_000)
    found = vocabulary(np.concatenate([hashes, hashes]))
    assert len(found.hashes) == VOCABULARY
    assert found.distinct == pytest.approx(300_000, rel=0.02)
    assert vocabulary(hashes[:100]).distinct == 100


def test_unseen_is_the_share_of_rows_with_a_new_value():
    hashes = np.random.default_rng(0).integers(1, 2**63 - 1, 200_000)
    known = vocabulary(hashes[:100_000])
    assert unseen(known, hashes[:100_000]) == 0.0
    assert unseen(known, hashes[50_000:150_000]) == pytest.approx(0.5, abs=0.02)
    assert unseen(known, hashes[100_000:]) == 1.0
    assert np.isnan(unseen(known, np.zeros(5, np.int64))) and np.isnan(unseen(known, hashes[:0]))
    assert unseen(Vocabulary(hashes[:0], ALL), hashes[:5]) == 1.0


# Cells


def world(seed, rows=3000, many=5000):
    rng = np.random.default_rng(seed)
    table = make(requests=40, seed=seed)
    hashes = np.random.default_rng(9).integers(1, 2**62, many)[(many * rng.random(rows) ** 3).astype(int)]
    of = sketch(table, {})
    return Sketch(
        of.requests,
        of.rows,
        {**of.columns, "word": categories(hashes)},
        {**of.vocabularies, "word": vocabulary(hashes)},
        of.vectors,
    )


def cells(seeds=range(4)):
    return {(f"2026-W{10 + seed}", seed * 5): world(seed) for seed in seeds}


def test_cells_are_read_as_they_were_written_whatever_their_order(tmp_path):
    held = {key: dataclasses.replace(s, columns={**s.columns, "word": Counts.none()}) for key, s in cells().items()}
    save_cells(tmp_path / "a", held)
    save_cells(tmp_path / "b", dict(reversed(held.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = load_cells(tmp_path / "a")
    assert list(back) == sorted(held)
    for key, one in held.items():
        assert dict(one.columns).keys() == back[key].columns.keys()
        ordered = {part: dict(sorted(getattr(one, part).items())) for part in ("columns", "vocabularies", "vectors")}
        vectors = {n: dataclasses.replace(v, sample=v.sample[:1]) for n, v in ordered["vectors"].items()}
        got = dataclasses.replace(
            back[key],
            columns=dict(sorted(back[key].columns.items())),
            vectors={n: dataclasses.replace(v, sample=v.sample[:1]) for n, v in back[key].vectors.items()},
        )
        assert same_sketch(got, Sketch(one.requests, one.rows, **{**ordered, "vectors": vectors}))
    save_cells(tmp_path / "c", back)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_cells_keep_the_categories_that_are_frequent_over_all_of_them(tmp_path):
    held = cells()
    save_cells(tmp_path / "cells", held)
    back = load_cells(tmp_path / "cells")
    before, after = (together(c.values()).columns["word"] for c in (held, back))
    assert after.total == before.total == 12_000
    assert len(after.keys) == CELL_CATEGORIES + 1 and after.at(OTHER) > 0
    own = after.without(OTHER)
    assert np.array_equal(own.counts, before.counts[np.isin(before.keys, own.keys)])
    assert own.counts.min() >= np.sort(before.counts)[-CELL_CATEGORIES]


def test_what_became_frequent_gets_into_the_cells_as_they_renew(tmp_path):
    old, new = categories(np.arange(1, 3001)), categories(np.repeat(np.arange(5001, 5011), 400))
    vocabularies = {"word": vocabulary(np.arange(1, 3))}
    held = {("2026-W01", 0): Sketch(1, 1, {"word": old}, vocabularies)}
    save_cells(tmp_path / "cells", held)
    held = load_cells(tmp_path / "cells") | {("2026-W02", 0): Sketch(1, 1, {"word": new}, vocabularies)}
    save_cells(tmp_path / "cells", held)
    back = load_cells(tmp_path / "cells")
    assert back["2026-W02", 0].columns["word"].at(5001) == 400
    assert together(back.values()).columns["word"].total == 7000


def test_vocabularies_of_all_cells_are_the_same_after_as_before(tmp_path, few):
    held = cells()
    save_cells(tmp_path / "cells", held)
    back = load_cells(tmp_path / "cells")
    for name in ("word", "item_id", "user_id"):
        before, after = (joined(s.vocabularies[name] for s in c.values()) for c in (held, back))
        assert (after.hashes.tolist(), after.bound) == (before.hashes.tolist(), before.bound)
    assert all(len(s.vectors["content"].sample) <= CELL_VECTORS for s in back.values())


def test_cells_with_other_columns_and_weighed_counts_are_kept(tmp_path):
    held = cells([0, 1])
    first, second = held.values()
    odd = dataclasses.replace(second, columns={"new": first.columns["item_rate"].scaled(0.3)}, vectors={})
    save_cells(tmp_path / "cells", {("a", 0): first, ("b", 27): odd})
    back = load_cells(tmp_path / "cells")
    assert list(back["b", 27].columns) == ["new"] and back["b", 27].vectors == {}
    assert np.array_equal(back["b", 27].columns["new"].counts, odd.columns["new"].counts)
    save_cells(tmp_path / "none", {})
    assert load_cells(tmp_path / "none") == {}


def test_missing_or_damaged_cells_are_one_clear_line(tmp_path):
    with pytest.raises(EvergreenError, match="no readable sketches"):
        load_cells(tmp_path / "none")
    save_cells(tmp_path / "cells", cells([0]))
    whole = (tmp_path / "cells").read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:200] + bytes(400) + whole[600:]):
        (tmp_path / "cells").write_bytes(broken)
        with pytest.raises(EvergreenError, match="no readable sketches"):
            load_cells(tmp_path / "cells")


def test_four_weeks_of_cells_of_fifty_columns_are_a_few_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    vocabularies = np.random.default_rng(1).integers(1, 2**62, 50_000)

    def cell():
        draws = rng.normal(size=(42, 4000))
        words = vocabularies[(50_000 * rng.random((8, 4000)) ** 4).astype(int)]
        return Sketch(
            200,
            4000,
            {f"n{i}": numbers(v, 0.0) for i, v in enumerate(draws)}
            | {f"c{i}": categories(v) for i, v in enumerate(words)},
            {f"c{i}": vocabulary(v) for i, v in enumerate(words)},
        )

    save_cells(tmp_path / "cells", {("2026-W01", i): cell() for i in range(28)})
    assert (tmp_path / "cells").stat().st_size < 2e6


def test_a_table_without_any_feature_of_a_level_is_sketched():
    spec = TableSpec((Feature("user_saves", "request", "numeric"),), ACTIONS, "save")
    table = make(requests=5)
    empty = np.zeros((table.rows, 0))
    bare: RankingTable = dataclasses.replace(
        table,
        spec=spec,
        request_cat=np.zeros((5, 0), np.int64),
        item_cat=empty.astype(np.int64),
        item_num=empty.astype(np.float32),
    )
    assert list(sketch(bare, {}).columns) == ["user_saves"]
