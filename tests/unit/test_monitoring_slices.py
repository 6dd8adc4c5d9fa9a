"""Where a window moved: the slices that explain it, and none where everything moved."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engagement.table import Feature, RankingTable, TableSpec, hash_id, micros
from monitoring.compare import Comparison, Pair, Window
from monitoring.counts import categories, numbers
from monitoring.reference import Reference
from monitoring.sketch import vocabulary
from monitoring.slices import LEAST_REQUESTS, slices
from monitoring.verdict import ColumnDrift

START = datetime(2026, 3, 2, tzinfo=UTC)
SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("country", "request", "categorical"),
        Feature("age", "request", "numeric"),
        Feature("item_id", "candidate", "categorical"),
        Feature("lens", "candidate", "categorical"),
        Feature("views", "candidate", "numeric"),
    ),
    ("click",),
    "click",
)
COUNTRIES = [hash_id("country", c) for c in ("de", "fr", "nl")]
LENSES = [hash_id("lens", c) for c in ("food", "art")]
NAMES = {
    "country": dict(zip(COUNTRIES, ("de", "fr", "nl"), strict=True)),
    "lens": dict(zip(LENSES, ("food", "art"), strict=True)),
}


def make(requests: int, seed: int = 0) -> RankingTable:
    rng = np.random.default_rng(seed)
    rows = requests * 4
    users, items = rng.integers(1, 200, requests), rng.integers(1, 300, rows)
    nothing = np.zeros(0, np.int64)
    return RankingTable(
        SPEC,
        np.array([b"r%d" % i for i in range(requests)]),
        np.array([b"u%d" % u for u in users]),
        micros(START) + np.arange(requests, dtype=np.int64) * 1_000_000,
        np.arange(requests + 1, dtype=np.int64) * 4,
        np.zeros(requests, np.int64),
        np.zeros(requests, np.int64),
        np.column_stack([users * 7, rng.choice(COUNTRIES, requests)]),
        rng.normal(35, 8, (requests, 1)).astype(np.float32),
        np.array([b"i%d" % i for i in items]),
        np.column_stack([items * 11, rng.choice(LENSES, rows)]),
        rng.normal(3, 1, (rows, 1)).astype(np.float32),
        np.zeros((rows, 1), np.uint8),
        np.zeros(rows, bool),
        nothing,
        nothing,
        nothing,
    )


OLD = make(4_000, seed=1)


def reference() -> Reference:
    known = {"user_id": vocabulary(OLD.request_cat[:, 0]), "item_id": vocabulary(OLD.item_cat[:, 0])}
    end = START + timedelta(days=1)
    return Reference(SPEC, START, end, 6, {"age": 35, "views": 3}, {}, {}, {}, frozenset(), vocabularies=known)


def compared(now: RankingTable, drifted: str, scores: np.ndarray | None = None) -> Comparison:
    def pair(name: str, kind: str, before: np.ndarray, after: np.ndarray) -> Pair:
        if kind == "categorical":
            return Pair(name, kind, 0, categories(before), categories(after), {})
        centre = float(np.median(before))
        return Pair(name, kind, centre, numbers(before, centre), numbers(after, centre), {})

    pairs = [
        pair("age", "numeric", OLD.request_num[:, 0], now.request_num[:, 0]),
        pair("views", "numeric", OLD.item_num[:, 0], now.item_num[:, 0]),
        pair("lens", "categorical", OLD.item_cat[:, 1], now.item_cat[:, 1]),
    ]
    if scores is not None:
        pairs.append(pair("score_click", "numeric", np.full(100, 0.1), scores[:, 0]))
    columns = tuple(ColumnDrift(p.name, p.kind, "item", 0.5, 0.1, 0.2, p.name == drifted, (0, 0)) for p in pairs)
    return Comparison(columns, {}, {}, tuple(pairs))


def window(table: RankingTable, scores: np.ndarray | None = None) -> Window:
    held = np.zeros((0, 1)) if scores is None else scores
    return Window(START, START + timedelta(hours=6), table, table, held, NAMES)


@pytest.fixture
def now() -> RankingTable:
    return make(1_000, seed=2)


def test_a_shift_in_one_country_is_found_in_that_country_only(now: RankingTable) -> None:
    num = now.request_num + 20 * (now.request_cat[:, 1:] == COUNTRIES[2])
    found = slices(reference(), window(replace(now, request_num=num)), compared(replace(now, request_num=num), "age"))
    assert [s.slice for s in found] == ["country=nl"]
    assert found[0].column == "age"
    assert found[0].score > 1
    assert found[0].share == pytest.approx(1 / 3, abs=0.05)


def test_a_shift_everywhere_is_in_no_slice(now: RankingTable) -> None:
    moved = replace(now, request_num=now.request_num + 10)
    assert slices(reference(), window(moved), compared(moved, "age")) == ()


def test_new_users_explain_what_they_bring(now: RankingTable) -> None:
    new = np.arange(now.requests) % 3 == 0
    cat, num = now.request_cat.copy(), now.request_num.copy()
    cat[new, 0] += 1_000_003
    num[new] += 20
    moved = replace(now, request_cat=cat, request_num=num)
    assert [s.slice for s in slices(reference(), window(moved), compared(moved, "age"))] == ["new users"]


def test_new_users_are_found_by_a_column_of_candidates_too(now: RankingTable) -> None:
    new = np.arange(now.requests) % 3 == 0
    cat, num = now.request_cat.copy(), now.item_num.copy()
    cat[new, 0] += 1_000_003
    num[np.repeat(new, 4)] += 3
    moved = replace(now, request_cat=cat, item_num=num)
    assert slices(reference(), window(moved), compared(moved, "views"))[0].slice == "new users"


def test_predictions_are_sliced_by_the_requests_that_were_scored(now: RankingTable) -> None:
    scores = np.full((now.rows, 1), 0.1) + 0.5 * (now.item_cat[:, 1:] == LENSES[0])
    found = slices(reference(), window(now, scores), compared(now, "score_click", scores))
    assert found[0].slice == "lens=food"
    assert found[0].column == "score_click"


def test_a_slice_of_few_rows_is_not_told_of() -> None:
    few = make(LEAST_REQUESTS, seed=3)
    moved = replace(few, request_num=few.request_num + 60 * (few.request_cat[:, 1:] == COUNTRIES[2]))
    assert slices(reference(), window(moved), compared(moved, "age")) == ()


def test_new_users_of_a_short_window_of_two_hundred_requests_are_told_of() -> None:
    short = make(200, seed=4)
    cat, new = short.request_cat.copy(), np.arange(200) % 3 == 0
    cat[new, 0] += 1_000_003
    num = short.request_num + 60 * new[:, None].astype(np.float32)
    moved = replace(short, request_cat=cat, request_num=num)
    assert "new users" in [s.slice for s in slices(reference(), window(moved), compared(moved, "age"))]


def test_nothing_is_sliced_where_nothing_drifted(now: RankingTable) -> None:
    assert slices(reference(), window(now), compared(now, "none")) == ()


def test_an_empty_window_has_no_slices(now: RankingTable) -> None:
    nothing = now.between(0, 1)
    assert slices(reference(), window(nothing), compared(now, "age")) == ()


def test_a_column_without_any_value_has_no_slices(now: RankingTable) -> None:
    gone = replace(now, request_num=np.full_like(now.request_num, np.nan))
    assert slices(reference(), window(gone), compared(gone, "age")) == ()
