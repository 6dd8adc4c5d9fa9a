"""The pull to the champion: its formula, the same strength for any size of batch, and only where a batch looks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import Bundle
from model.data import Batcher, hide
from model.distributed import Ranks
from model.fisher import Importance
from model.hashing import rows_of
from model.optim import dense_parameters
from model.penalty import penalty
from model.train import train
from tests.unit.model_synth import make, recipe
from tests.unit.together import together

CPU = torch.device("cpu")
RECIPE = recipe(epochs=1, id_dropout=0.5, time_window_hours=50.0, attended=4)
WINDOW = make(60, seed=9, start_hour=500)


def equal(champion):
    """Importance 1 of every dense weight and of every row that the champion has trained."""
    ranker = champion.ranker()
    rows = ranker.seen.nonzero()[:, 0]
    dense = {k: torch.ones_like(p) for k, p in dense_parameters(ranker).items()}
    return Importance(dense, rows, torch.ones_like(ranker.table.weight[rows]))


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    return train(make(60), RECIPE, "scratch", None, 0, tmp_path_factory.mktemp("c"))


def moved(champion, seed=1):
    """The champion's ranker, every weight a little elsewhere."""
    ranker, generator = copy.deepcopy(champion.ranker()).requires_grad_(True), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ranker.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return ranker


def cut(requests):
    return Batcher(WINDOW, RECIPE.ranker).of_requests(requests)


def referred(request):
    """The rows that one request of the window refers to."""
    batch = cut(np.array([request]))
    ids = torch.cat([batch.request_ids_BW.flatten(), batch.item_ids_NW.flatten(), batch.history_ids_BL.flatten()])
    return set(rows_of(ids, RECIPE.ranker.buckets).flatten().tolist()) - {0}


@torch.no_grad()
def squares(champion, importance, ranker):
    """F (theta - champion)^2, summed over the dense weights; and by row of the table."""
    old = champion.ranker()
    dense = dense_parameters(old)
    total = sum(
        float((importance.dense[k] * (p - dense[k]).square()).sum()) for k, p in dense_parameters(ranker).items()
    )
    by_row = (importance.table_UD * (ranker.table.weight - old.table.weight)[importance.rows].square()).sum(1)
    return total, dict(zip(importance.rows.tolist(), by_row.tolist(), strict=True))


def kinds(champion):
    return {"fisher": Importance.from_tensors(champion.memory), "equal": equal(champion)}


@pytest.mark.parametrize("kind", ["fisher", "equal"])
def test_penalty_equals_its_formula(champion, kind):
    importance, ranker, requests = kinds(champion)[kind], moved(champion), np.array([3, 8, 40])
    expected, by_row = squares(champion, importance, ranker)
    each = [referred(r) for r in range(WINDOW.requests)]
    for row, square in by_row.items():
        share = sum(row in rows for rows in each) / WINDOW.requests
        expected += square * sum(row in each[r] for r in requests) / len(requests) / share if share else 0.0
    found = penalty(champion, importance, WINDOW, CPU)(ranker, cut(requests))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [5, 20, 60])
def test_mean_over_an_epoch_is_the_whole_penalty_for_any_size_of_batch(champion, size):
    importance, ranker = equal(champion), moved(champion)
    dense, by_row = squares(champion, importance, ranker)
    window = set().union(*(referred(r) for r in range(WINDOW.requests)))
    held, order = penalty(champion, importance, WINDOW, CPU), np.random.default_rng(0).permutation(WINDOW.requests)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # hidden ids and actions change nothing
        values = [float(held(ranker, hide(cut(part), RECIPE.train, generator))) for part in order.reshape(-1, size)]
    assert np.mean(values) == pytest.approx(dense + sum(v for r, v in by_row.items() if r in window), rel=1e-5)


def test_gradient_is_at_rows_that_the_batch_refers_to_alone(champion):
    ranker = moved(champion)
    penalty(champion, equal(champion), WINDOW, CPU)(ranker, cut(np.array([5]))).backward()
    touched = set(ranker.table.weight.grad.coalesce().indices()[0].tolist())
    assert touched == referred(5) & set(equal(champion).rows.tolist()) and touched
    assert all(p.grad is not None and p.grad.any() for p in dense_parameters(ranker).values())


def test_champion_itself_is_not_pulled(champion):
    held = penalty(champion, equal(champion), WINDOW, CPU)
    assert held(champion.ranker(), cut(np.arange(9))).item() == 0.0


def test_champion_without_important_rows_holds_its_dense_weights(champion):
    importance = Importance(equal(champion).dense, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    found = penalty(champion, importance, WINDOW, CPU)(moved(champion), cut(np.arange(3)))
    assert found.item() == pytest.approx(squares(champion, importance, moved(champion))[0], rel=1e-5)


def test_plain_pull_is_on_every_dense_weight_and_every_trained_row(champion):
    importance = equal(champion)
    assert torch.equal(importance.rows, champion.weights["table.rows"])
    assert all(bool((f == 1).all()) for f in (*importance.dense.values(), importance.table_UD))


@torch.no_grad()
def value_of_parts(out: Path) -> None:
    """What each process finds for its part of two batches; of the second, one process has none."""
    champion = Bundle.load(out / "champion")
    held, ranker, ranks = penalty(champion, equal(champion), WINDOW, CPU), moved(champion), Ranks.current()
    values = []
    for requests in (np.array([1, 7, 30]), np.array([12])):
        first, last, _ = ranks.span(len(requests))
        values.append(float(held(ranker, cut(requests[first:last]))))
    (out / str(ranks.rank)).write_text(repr(values))


def test_every_process_finds_the_penalty_of_the_whole_batch(champion, tmp_path):
    champion.save(tmp_path / "champion")
    assert together(2, value_of_parts, tmp_path) == [0, 0]
    both = [(tmp_path / rank).read_text() for rank in "01"]
    (tmp_path / "0").unlink()
    value_of_parts(tmp_path)
    assert both == [(tmp_path / "0").read_text()] * 2
