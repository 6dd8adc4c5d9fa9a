"""Continual learning: the Fisher against a loop, what EWC and distillation keep, what an update carries over."""

import dataclasses

import numpy as np
import pytest
import torch

from model import fisher
from model.continual import STRATEGIES, Window, distillation, ewc_penalty
from model.data import Batcher
from model.fisher import Importance, measure, sample_rows
from model.hashing import rows_of
from model.loss import label_weights, task_loss
from model.metrics import hit3, hits
from model.optim import dense_parameters
from model.predict import score
from model.train import train
from model.weights import row_weights
from tests.unit.model_synth import make, recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    return train(make(200), recipe(), "scratch", None, 0, tmp_path_factory.mktemp("c"))


def fresh_ranker(bundle):
    """A ranker of its own with the bundle's weights."""
    return dataclasses.replace(bundle).ranker().requires_grad_(True)


def batcher_of(table, config):
    return Batcher(table, config.ranker, row_weights(table, config.train))


def loop_fisher(ranker, batcher, rows, config):
    """One backward pass a sample, through the sparse table itself."""
    matrix = label_weights(ranker.spec, config)
    dense = {k: torch.zeros_like(p) for k, p in dense_parameters(ranker).items()}
    table = torch.zeros_like(ranker.table.weight)
    for row in rows:
        batch = batcher.of_rows(np.array([row]))
        ranker.zero_grad(set_to_none=True)
        task_loss(ranker(batch), batch.labels_NA, batch.weight_N, matrix).backward()
        for name, p in dense_parameters(ranker).items():
            dense[name] += 0 if p.grad is None else p.grad.square()
        table += ranker.table.weight.grad.coalesce().to_dense().square()
    return {k: v / len(rows) for k, v in dense.items()}, table / len(rows)


def test_fisher_equals_a_loop_over_single_samples(champion):
    config, table = recipe(user_weight_power=0.5), make(60, seed=7)
    ranker, batcher, rows = fresh_ranker(champion), batcher_of(table, config), np.arange(0, 200, 3)
    found = measure(ranker, batcher, rows, config.train)
    dense, rows_RD = loop_fisher(ranker, batcher, rows, config.train)
    for name, expected in dense.items():
        torch.testing.assert_close(found.dense[name], expected, rtol=1e-4, atol=1e-9)
    everywhere = torch.zeros_like(rows_RD).index_copy(0, found.rows, found.table_UD)
    torch.testing.assert_close(everywhere, rows_RD, rtol=1e-4, atol=1e-9)
    assert float(rows_RD.sum()) > 0 and set(rows_RD.sum(1).nonzero()[:, 0].tolist()) <= set(found.rows.tolist())


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_fisher_does_not_depend_on_how_many_samples_are_taken_at_once(champion, monkeypatch, chunk):
    config, table = recipe(), make(30, seed=7)
    ranker, batcher, rows = fresh_ranker(champion), batcher_of(table, config), np.arange(40)
    reference = measure(ranker, batcher, rows, config.train)
    monkeypatch.setattr(fisher, "_CHUNK", chunk)
    other = measure(ranker, batcher, rows, config.train)
    assert torch.equal(reference.rows, other.rows)
    torch.testing.assert_close(reference.table_UD, other.table_UD, rtol=1e-4, atol=1e-10)
    for name, value in reference.dense.items():
        torch.testing.assert_close(value, other.dense[name], rtol=1e-4, atol=1e-10)


def test_fisher_is_not_the_square_of_the_mean_gradient(champion):
    """The common shortcut, an order of magnitude too small."""
    config, table = recipe(), make(30, seed=7)
    ranker, batcher = fresh_ranker(champion), batcher_of(table, config)
    found = measure(ranker, batcher, np.arange(40), config.train)
    batch = batcher.of_rows(np.arange(40))
    task_loss(ranker(batch), batch.labels_NA, batch.weight_N, label_weights(ranker.spec, config.train)).backward()
    shortcut = ranker.heads.weight.grad.square().sum()
    assert found.dense["heads.weight"].sum() > 3 * shortcut


def test_importance_decays_and_rows_join():
    old = Importance({"w": torch.tensor([2.0])}, torch.tensor([1, 4]), torch.tensor([[1.0], [2.0]]))
    new = Importance({"w": torch.tensor([3.0])}, torch.tensor([4, 9]), torch.tensor([[5.0], [7.0]]))
    both = new.after(old, 0.5)
    assert both.dense["w"].tolist() == [4.0] and both.rows.tolist() == [1, 4, 9]
    assert both.table_UD.flatten().tolist() == [0.5, 6.0, 7.0] and new.after(None, 0.5) is new
    assert Importance.from_tensors(both.to_tensors()).rows.tolist() == [1, 4, 9]
    assert Importance.from_tensors({}) is None


def test_rows_to_measure_on_are_drawn_by_seed_and_bounded():
    table = make(60)
    assert sample_rows(table, 10**6, 0).tolist() == list(range(table.rows))
    drawn = sample_rows(table, 20, 0)
    assert len(set(drawn.tolist())) == 20 and (drawn == sample_rows(table, 20, 0)).all()
    assert (drawn != sample_rows(table, 20, 1)).any()


def test_ewc_penalty_equals_its_formula_on_the_rows_of_the_batch(champion):
    config, table = recipe(ewc_lambda=6.0), make(30, seed=9)
    ranker, importance = fresh_ranker(champion), Importance.from_tensors(champion.memory)
    batch = batcher_of(table, config).of_requests(np.arange(5))
    penalty = ewc_penalty(Window(champion, table, config.train, CPU))
    assert penalty(ranker, batch, torch.zeros(1)).item() == 0.0
    with torch.no_grad():
        for p in ranker.parameters():
            p.add_(0.1)
    expected = sum(float(f.sum()) for f in importance.dense.values())
    ids = torch.cat([batch.request_ids_BW.flatten(), batch.item_ids_NW.flatten(), batch.history_ids_BL.flatten()])
    touched = rows_of(ids, config.ranker.buckets)
    expected += float(importance.table_UD[torch.isin(importance.rows, touched)].sum())
    assert penalty(ranker, batch, torch.zeros(1)).item() == pytest.approx(3.0 * expected * 0.01, rel=1e-3)


def test_ewc_gradient_touches_only_rows_of_the_batch(champion):
    config, table = recipe(), make(30, seed=9)
    ranker = fresh_ranker(champion)
    batch = batcher_of(table, config).of_requests(np.arange(2))
    ewc_penalty(Window(champion, table, config.train, CPU))(ranker, batch, torch.zeros(1)).backward()
    touched = ranker.table.weight.grad.coalesce().indices()[0]
    ids = torch.cat([batch.request_ids_BW.flatten(), batch.item_ids_NW.flatten(), batch.history_ids_BL.flatten()])
    assert len(touched) and torch.isin(touched, rows_of(ids, config.ranker.buckets)).all()


def test_distillation_is_lowest_where_the_student_is_the_champion(champion):
    config, table = recipe(), make(30, seed=9)
    loss = distillation(Window(champion, table, config.train, CPU))
    batch = batcher_of(table, config).of_requests(np.arange(10, 20))
    ranker = fresh_ranker(champion)
    logits = ranker(batch)
    at = float(loss(ranker, batch, logits))
    assert all(float(loss(ranker, batch, logits + shift)) > at for shift in (-0.3, 0.3))


@pytest.fixture(scope="module")
def worlds():
    """An old taste with much data; a new taste, of the same users, with little; later requests of both."""
    old, new = make(1500, size=10, seed=1), make(200, size=10, seed=3, taste=1, start_hour=4000)
    return old, new, make(400, size=10, seed=2, start_hour=5000), make(400, size=10, seed=4, taste=1, start_hour=5000)


@pytest.fixture(scope="module")
def updates(worlds, tmp_path_factory):
    old, new, _, _ = worlds
    directory, base = tmp_path_factory.mktemp("u"), recipe(epochs=3, update_epochs=3, fisher_rows=512)
    first = train(old, base, "scratch", None, 0, directory)
    held = recipe(epochs=3, update_epochs=3, ewc_lambda=10_000.0, distill_weight=0.0, fisher_rows=512)
    runs = {"champion": first, "ewc": train(new, held, "ewc+distill", first, 0, directory)}
    return runs | {s: train(new, base, s, first, 0, directory) for s in ("finetune", "ewc+distill")}


def quality(bundle, table):
    return hit3(hits(table, score(bundle, table)))["save"]


def test_update_learns_the_new_world_and_forgets_less_than_finetuning(worlds, updates):
    _, _, old_later, new_later = worlds
    old = {n: quality(updates[n], old_later) for n in updates}
    new = {n: quality(updates[n], new_later) for n in updates}
    assert old["champion"] - old["finetune"] > 0.1  # fine-tuning does forget here
    assert old["champion"] - old["ewc+distill"] < 0.8 * (old["champion"] - old["finetune"])
    assert new["ewc+distill"] > new["champion"] + 0.1


def test_ewc_moves_important_weights_less_than_finetuning(updates):
    importance = Importance.from_tensors(updates["champion"].memory)

    def moved(name):
        return sum(
            float((f * (updates[name].weights[k] - updates["champion"].weights[k]).square()).sum())
            for k, f in importance.dense.items()
        )

    assert 0 < moved("ewc") < 0.5 * moved("finetune")


def test_update_carries_statistics_accumulators_and_importance_over(updates):
    first, after = updates["champion"], updates["ewc+distill"]
    assert after.parent == first.digest and first.parent == ""
    for name in (n for n in first.weights if "norm.mean" in n or "norm.std" in n):
        assert torch.equal(first.weights[name], after.weights[name])
    rows = torch.isin(after.memory["table.rows"], first.memory["table.rows"])
    assert (after.memory["table.sums"][rows] >= first.memory["table.sums"]).all()
    old, new = (Importance.from_tensors(b.memory) for b in (first, after))
    assert (new.dense["heads.weight"] >= 0.9 * old.dense["heads.weight"] - 1e-9).all()
    assert torch.isin(old.rows, new.rows).all()


def test_rows_that_an_update_does_not_look_up_keep_their_bits(worlds, updates, tmp_path):
    first, few = updates["champion"], worlds[1].select(np.arange(3))
    few = dataclasses.replace(few, history_end=few.history_start)
    update = train(few, first.recipe, "ewc+distill", first, 0, tmp_path)
    used = rows_of(torch.from_numpy(np.concatenate([few.request_cat.ravel(), few.item_cat.ravel()])), 4096)
    outside = ~np.isin(first.weights["table.rows"].numpy(), used)
    values = dict(zip(update.weights["table.rows"].tolist(), update.weights["table.values"], strict=True))
    assert outside.any()
    for row, value in zip(
        first.weights["table.rows"][outside].tolist(), first.weights["table.values"][outside], strict=True
    ):
        assert torch.equal(values[row], value)


def test_scratch_ignores_the_champion_and_continuing_without_one_starts_from_scratch(champion, tmp_path):
    window = make(40, seed=6)
    alone, beside = (train(window, recipe(), "scratch", parent, 0, tmp_path) for parent in (None, champion))
    assert alone.digest == beside.digest and beside.parent == ""
    first = train(window, recipe(), "ewc+distill", None, 0, tmp_path)
    assert all(torch.equal(first.weights[k], alone.weights[k]) for k in alone.weights)


def test_new_users_and_items_need_no_rebuild(champion, tmp_path):
    window = make(60, users=60, items=90, seed=6)
    update = train(window, recipe(), "ewc+distill", champion, 0, tmp_path)
    assert len(update.weights["table.rows"]) > len(champion.weights["table.rows"]) + 20
    assert np.isfinite(score(update, window)).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_leaves_an_importance_for_the_next(champion, tmp_path, name):
    update = train(make(20, seed=6), recipe(), name, champion, 0, tmp_path)
    assert Importance.from_tensors(update.memory) is not None and update.strategy == name
