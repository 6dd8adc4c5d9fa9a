"""Completion of requests of which only the positives were logged."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement import sampling
from engagement.importers import contract_dir
from engagement.index import from_us
from engagement.sampling import CANDIDATES, draw
from engagement.store import EngagementStore
from tests.synth import START, UTC_US, dataset, write_contract_dir

END = from_us(int(START.timestamp() * 1e6) + 10**14)
MASK = (1 << 64) - 1


def stream(seed, k):
    """splitmix64 in plain integers (Steele et al. 2014): the reference."""
    z = (seed + (k + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def one_by_one(seed, wanted, alive, taken):
    if alive <= 4 * CANDIDATES:
        order = sorted(range(alive), key=lambda i: stream(seed, i))
    else:
        order = (int((stream(seed, k) >> 11) * 2.0**-53 * alive) for k in range(100_000))
    found = []
    for item in order:
        if len(found) == wanted:
            break
        if item not in found and item not in taken:
            found.append(item)
    return found


def drawn(seeds, wanted, alive, taken):
    pairs = [(r, i) for r, items in enumerate(taken) for i in items]
    table = pl.DataFrame(pairs, schema={"_request": pl.Int64, "_item": pl.Int64}, orient="row")
    result = draw(np.array(seeds, np.uint64), np.array(wanted), np.array(alive), table)
    return [result.filter(pl.col("_request") == r)["_item"].to_list() for r in range(len(seeds))]


request = st.tuples(
    st.integers(0, MASK),
    st.integers(0, CANDIDATES),
    st.sampled_from([0, 1, 5, 19, 20, 21, 79, 80, 81, 90, 1000, 10**6]),
    st.sets(st.integers(0, 100), max_size=19),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(request, min_size=1, max_size=12))
def test_drawn_as_an_array_equals_one_by_one(requests):
    seeds, wanted, alive, taken = zip(*requests, strict=True)
    wanted = [min(w, CANDIDATES - len(t)) for w, t in zip(wanted, taken, strict=True)]
    expected = [one_by_one(*r) for r in zip(seeds, wanted, alive, taken, strict=True)]
    assert [sorted(f) for f in drawn(seeds, wanted, alive, taken)] == [sorted(e) for e in expected]


def test_neither_order_nor_batches_matter(monkeypatch):
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, MASK, 500, dtype=np.uint64)
    wanted, alive = rng.integers(1, 21, 500), rng.choice([30, 80, 81, 5000], 500)
    whole = drawn(seeds, wanted, alive, [[]] * 500)
    turned = rng.permutation(500)
    assert drawn(seeds[turned], wanted[turned], alive[turned], [[]] * 500) == [whole[r] for r in turned]
    monkeypatch.setattr(sampling, "_AT_ONCE", 7)
    assert drawn(seeds, wanted, alive, [[]] * 500) == whole


@pytest.mark.parametrize("alive", [40, 120])
def test_draws_are_uniform(alive):
    requests = 6000
    seeds = np.random.default_rng(1).integers(0, MASK, requests, dtype=np.uint64)
    items = np.concatenate(drawn(seeds, np.full(requests, 10), np.full(requests, alive), [[]] * requests))
    counts = np.bincount(items, minlength=alive)
    expected = requests * 10 / alive
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == alive and chi2 < alive - 1 + 5 * np.sqrt(2 * (alive - 1))


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    directory = write_contract_dir(tmp_path_factory.mktemp("d"), users=12, items=150, days=7, exposure="positives")
    store = EngagementStore(tmp_path_factory.mktemp("s"))
    return directory, store, store.append(contract_dir.read(directory))


def test_every_request_reaches_its_candidates_with_living_items_only(completed):
    directory, store, report = completed
    rows = pl.from_arrow(store.snapshot(END).engagements())
    assert rows.group_by("request_id").len()["len"].unique().to_list() == [CANDIDATES]
    assert rows.select("request_id", "item_id").is_duplicated().sum() == 0
    assert rows["sampled"].sum() == report.sampled == rows.height - report.imported
    born = pl.from_arrow(store.snapshot(END).items()).select("item_id", pl.col("created_timestamp").alias("born"))
    late = rows.filter("sampled").join(born, on="item_id").filter(pl.col("born") > pl.col("event_timestamp"))
    assert late.height == 0 and born.filter(pl.col("born") > START).height  # some were born during the log


def test_sampled_rows_hold_no_action_and_the_time_and_context_of_their_request(completed):
    _, store, _ = completed
    rows = pl.from_arrow(store.snapshot(END).engagements())
    sampled = rows.filter("sampled")
    assert not sampled.select(pl.any_horizontal("save", "click", "hide")).to_series().any()
    assert sampled["position"].null_count() == sampled.height
    logged = rows.filter(~pl.col("sampled")).group_by("request_id")
    times = [pl.col("event_timestamp").min().alias("time"), pl.col("created_timestamp").min().alias("known")]
    real = logged.agg(*times, pl.col("user_id", "surface").first())
    joined = sampled.join(real, on="request_id", suffix="_real")
    assert joined.height == sampled.height
    for ours, theirs in (
        ("event_timestamp", "time"),
        ("created_timestamp", "known"),
        ("user_id", "user_id_real"),
        ("surface", "surface_real"),
    ):
        assert joined[ours].equals(joined[theirs], null_equal=True)


def test_importing_again_draws_nothing(completed):
    directory, store, report = completed
    again = store.append(contract_dir.read(directory))
    assert (again.sampled, again.imported, again.already_present) == (0, 0, report.imported)


def test_shuffled_delivery_draws_the_same(completed, tmp_path):
    directory, store, _ = completed
    made = contract_dir.read(directory)
    whole = pa.concat_tables(made.engagements)
    turned = whole.take(np.random.default_rng(0).permutation(whole.num_rows))
    other = EngagementStore(tmp_path)
    other.append(
        type(made)(made.manifest, [turned.slice(n, 50) for n in range(0, turned.num_rows, 50)], made.items, made.users)
    )
    assert other.snapshot(END).digest == store.snapshot(END).digest


def test_logged_impressions_are_not_completed(tmp_path):
    report = EngagementStore(tmp_path).append(dataset([{"save": True}]))
    assert report.sampled == 0


def test_request_with_enough_positives_gets_no_sample(tmp_path):
    items = [f"i{n}" for n in range(60)]
    rows = [{"request_id": "full", "item_id": i, "save": True} for i in items[:CANDIDATES]]
    rows += [{"request_id": "more", "item_id": i, "save": True} for i in items[:30]]
    rows += [{"request_id": "some", "item_id": i, "save": True} for i in items[: CANDIDATES - 1]]
    assert EngagementStore(tmp_path).append(dataset(rows, items=items, exposure="positives")).sampled == 1


def test_too_few_living_items_give_fewer_candidates(tmp_path):
    us = int(START.timestamp() * 1e6)
    born = pa.array([us, us, us, us + 1], UTC_US)
    items = pa.table({"item_id": ["i1", "i2", "i3", "unborn"], "created_timestamp": born})
    store = EngagementStore(tmp_path)
    store.append(dataset([{"save": True, "at": 0}], items=items, exposure="positives"))
    rows = store.snapshot(END).engagements().to_pylist()
    assert {r["item_id"]: r["sampled"] for r in rows} == {"i1": False, "i2": True, "i3": True}


def test_late_positive_takes_the_place_of_its_sampled_row_once_known(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(dataset([{"save": True, "at": 1}], exposure="positives"))
    report = store.append(dataset([{"save": True, "at": 1, "known": 9, "item_id": "i2"}], exposure="positives"))
    assert (report.imported, report.sampled) == (1, 0)  # a request is completed once
    us = int(START.timestamp() * 1e6)
    before, after = (store.snapshot(from_us(us + n * 3_600_000_000 + 1)).engagements().to_pylist() for n in (8, 9))
    assert {r["item_id"]: (r["sampled"], r["save"]) for r in before} == {
        "i1": (False, True), "i2": (True, False), "i3": (True, False),
    }  # fmt: skip
    assert {r["item_id"]: (r["sampled"], r["save"]) for r in after} == {
        "i1": (False, True), "i2": (False, True), "i3": (True, False),
    }  # fmt: skip
