"""Row-wise Adagrad against its formula, the schedule, the loss, configurations."""

import dataclasses

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.table import TableSpec
from model import config
from model.continual import STRATEGIES
from model.loss import head_weights, label_weights, row_losses, task_loss
from model.optim import RowAdagrad, rate
from tests.unit.model_synth import SPEC, recipe


def test_row_adagrad_equals_its_formula_and_moves_touched_rows_only():
    torch.manual_seed(0)
    table = torch.nn.Embedding(10, 4, padding_idx=0, sparse=True)
    weight, sums = table.weight.detach().clone(), torch.zeros(10)
    optimizer = RowAdagrad(table.weight)
    for ids in ([2, 5, 2, 0], [5, 7, 0, 0]):
        factor = torch.randn(4, 4)
        (table(torch.tensor(ids)) * factor).sum().backward()
        optimizer.step(0.1)
        for row in set(ids) - {0}:
            gradient = sum(factor[i] for i, r in enumerate(ids) if r == row)
            sums[row] += gradient.square().mean()
            weight[row] -= 0.1 * gradient / sums[row].sqrt()
    torch.testing.assert_close(table.weight.detach(), weight)
    torch.testing.assert_close(optimizer.sums, sums)
    assert (sums[[0, 1, 3, 4, 6, 8, 9]] == 0).all() and table.weight.grad is None


def test_rate_rises_to_one_then_falls_to_zero():
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates.index(1.0) == 9
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 0.01
    assert rate(0, 1, 0.1) == 1.0


def test_loss_equals_the_formula_row_by_row():
    torch.manual_seed(0)
    logits, weight, matrix = torch.randn(6, 3), torch.rand(6), torch.rand(3, 4)
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.float32)
    total = 0.0
    for n in range(6):
        actions = [a for a in range(3) if labels[n, a]] or [3]
        for h in range(3):
            p = 1 / (1 + np.exp(-float(logits[n, h])))
            entropy = -np.log(p if labels[n, h] else 1 - p)
            total += float(weight[n]) * np.mean([float(matrix[h, a]) for a in actions]) * entropy
    assert float(task_loss(logits, labels, weight, matrix)) == pytest.approx(total / 6, rel=1e-5)


def test_default_weights_put_the_primary_head_first_for_any_actions():
    train = recipe(primary_weight=2.0, negative_weight=3.0).train
    for actions, primary, negative in ((("save", "click", "hide"), "save", ("hide",)), (("buy",), "buy", ())):
        matrix = label_weights(TableSpec((), actions, primary, negative), train)
        assert matrix.shape == (len(actions), len(actions) + 1)
        assert (matrix[actions.index(primary)] >= matrix).all()
    hide = torch.tensor([[0.0, 0.0, 1.0]])
    assert head_weights(hide, label_weights(SPEC, train)).tolist() == [[5.0, 1.0, 1.0]]


def test_soft_targets_are_lowest_at_the_target():
    target = torch.tensor([[0.3]])
    at = [float(row_losses(torch.logit(torch.tensor([[p]])), target, torch.ones(1, 1))) for p in (0.2, 0.3, 0.4)]
    assert at[1] < min(at[0], at[2])


@pytest.mark.parametrize("name", config.RECIPES)
def test_recipe_survives_json_and_its_digest_tells_recipes_apart(name):
    one = config.RECIPES[name]()
    assert config.Recipe.from_json(one.to_json()) == one and one.digest() == config.RECIPES[name]().digest()
    assert one.digest() != dataclasses.replace(one, train=dataclasses.replace(one.train, lr=0.9)).digest()


@pytest.mark.parametrize("first", [0, 11])
def test_kept_outputs_outside_one_to_ten_are_refused(first):
    with pytest.raises(EvergreenError, match="first"):
        dataclasses.replace(config.laptop().ranker, first=first)
    assert dataclasses.replace(config.laptop().ranker, first=10).first == 10


def test_named_strategies_are_the_ones_that_exist():
    assert tuple(STRATEGIES) == config.STRATEGY_NAMES and config.DEFAULT_STRATEGY in STRATEGIES
