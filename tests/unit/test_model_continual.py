"""Continual learning: the Fisher against a loop, what EWC and distillation keep, what an update carries over."""

import dataclasses

import numpy as np
import pytest
import torch

from model.continual import STRATEGIES, Step, Window, distillation, ewc
from model.data import Batcher
from model.exam import exam_of
from model.fisher import Importance
from model.hashing import rows_of
from model.metrics import hit3, hits
from model.penalty import penalty
from model.predict import score
from model.reservoir import RESERVOIR, Reservoir
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


def step_of(ranker, batch, logits=None):
    return Step(0, ranker, batch, torch.zeros(1) if logits is None else logits, 1.0)


def test_ewc_is_half_lambda_times_the_pull_and_nothing_at_the_champion(champion):
    config, table = recipe(ewc_lambda=6.0), make(30, seed=9)
    ranker, importance = fresh_ranker(champion), Importance.from_tensors(champion.memory)
    step = step_of(ranker, batcher_of(table, config).of_requests(np.arange(5)))
    loss = ewc(Window(champion, table, config.train, CPU, 0))
    assert loss(step).item() == 0.0
    with torch.no_grad():
        for p in ranker.parameters():
            p.add_(0.1)
    assert loss(step).item() == pytest.approx(3 * penalty(champion, importance, table, CPU)(ranker, step.batch).item())


def test_l2_pulls_as_much_in_all_and_the_same_on_every_weight(champion):
    importance = Importance.from_tensors(champion.memory)
    even = importance.even(champion.weights["table.rows"])
    totals = [[sum(float(v.sum()) for v in i.dense.values()), float(i.table_UD.sum())] for i in (importance, even)]
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)
    assert len({float(x) for v in even.dense.values() for x in (v.min(), v.max())}) == 1
    assert torch.equal(even.rows, champion.weights["table.rows"]) and len(even.rows) >= len(importance.rows)


def test_distillation_is_lowest_where_the_student_is_the_champion(champion):
    config, table = recipe(), make(30, seed=9)
    loss = distillation(Window(champion, table, config.train, CPU, 0))
    batch = batcher_of(table, config).of_requests(np.arange(10, 20))
    ranker = fresh_ranker(champion)
    logits = ranker(batch)
    at = float(loss(step_of(ranker, batch, logits)).detach())
    assert all(float(loss(step_of(ranker, batch, logits + shift)).detach()) > at for shift in (-0.3, 0.3))


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
    held = recipe(epochs=3, update_epochs=3, ewc_lambda=10_000.0, fisher_rows=512)
    runs = {"champion": first, "ewc": train(new, held, "ewc", first, 0, directory)}
    names = ("finetune", "distill", "replay", "ewc+distill+replay")
    return runs | {s: train(new, base, s, first, 0, directory) for s in names}


def quality(bundle, table):
    return hit3(hits(table, score(bundle, table)))["save"]


def test_update_learns_the_new_world_and_forgets_less_than_finetuning(worlds, updates):
    _, _, old_later, new_later = worlds
    old = {n: quality(updates[n], old_later) for n in updates}
    new = {n: quality(updates[n], new_later) for n in updates}
    assert old["champion"] - old["finetune"] > 0.1  # fine-tuning does forget here
    for name in ("distill", "replay", "ewc+distill+replay"):
        assert old["champion"] - old[name] < 0.8 * (old["champion"] - old["finetune"]), (name, old)
        assert new[name] > new["champion"] + 0.05, (name, new)


def test_ewc_moves_important_weights_less_than_finetuning(updates):
    importance = Importance.from_tensors(updates["champion"].memory)

    def moved(name):
        return sum(
            float((f * (updates[name].weights[k] - updates["champion"].weights[k]).square()).sum())
            for k, f in importance.dense.items()
        )

    assert 0 < moved("ewc") < 0.5 * moved("finetune")


def test_update_carries_statistics_accumulators_and_importance_over(updates):
    first, after = updates["champion"], updates["ewc+distill+replay"]
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
    first = train(window, recipe(), "ewc+distill+replay", None, 0, tmp_path)
    assert all(torch.equal(first.weights[k], alone.weights[k]) for k in alone.weights)


def test_new_users_and_items_need_no_rebuild(champion, tmp_path):
    window = make(60, users=60, items=90, seed=6)
    update = train(window, recipe(), "ewc+distill+replay", champion, 0, tmp_path)
    assert len(update.weights["table.rows"]) > len(champion.weights["table.rows"]) + 20
    assert np.isfinite(score(update, window)).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_leaves_what_any_other_can_continue_from(champion, tmp_path, name):
    update = train(make(20, seed=6), recipe(), name, champion, 0, tmp_path)
    assert Importance.from_tensors(update.memory) is not None and exam_of(update) is not None
    assert Reservoir.from_tensors(update.memory, RESERVOIR, update.spec).seen is not None
    assert (update is champion) == (name == "frozen")
    assert update.updates == (0 if name in ("frozen", "scratch") else 1)
