"""The Fisher against a loop over single samples, for every interaction and every way in which a weight can be used."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import fisher
from model.content import learn
from model.data import Batcher
from model.fisher import Importance, measure, sample_rows
from model.fisher_layers import SquaredGradients
from model.loss import label_weights, task_loss
from model.optim import dense_parameters
from model.ranker import Ranker
from model.weights import row_weights
from tests.unit.model_synth import make, recipe
from tests.unit.test_model_interactions import SMALL


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(config):
    """A ranker with no weight at its start, ids that share rows of its small table, and a few ids never seen."""
    torch.manual_seed(3)
    ranker = Ranker(config.ranker, make(1).spec).eval()
    known = make(60, users=5)
    ranker.content.set(learn(known, config.ranker.content, 1, 0, None)[0])
    ranker.fit_statistics(known)
    with torch.no_grad():
        for name, p in ranker.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if name == "table.weight" else 0.05))
        ranker.table.weight[0] = 0.0
        ranker.seen.copy_(torch.rand(len(ranker.seen)) < 0.95)
    return ranker


class Exact(Batcher):
    """Numbers in float64: with sums that cancel, float32 would hide what is wrong, in either computation."""

    def of_rows(self, rows):
        batch = super().of_rows(rows)
        numbers = ("request_num_BF", "item_num_NF", "history_hours_BL")
        return dataclasses.replace(batch, **{name: getattr(batch, name).double() for name in numbers})


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
    return {k: v.detach() / len(rows) for k, v in dense.items()}, table / len(rows)


def far(found, expected):
    """Largest difference in units of the tensor's largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def check(config, table, rows, share=1e-5):
    ranker, batcher = drawn(config).double(), Exact(table, config.ranker, row_weights(table, config.train))
    ranker.content.float().norm.double()
    found = measure(ranker, batcher, rows, config.train)
    dense, rows_RD = loop_fisher(ranker, batcher, rows, config.train)
    assert found.dense.keys() == dense.keys()
    assert {name: far(found.dense[name], expected) for name, expected in dense.items()} == pytest.approx(
        dict.fromkeys(dense, 0.0), abs=share
    )
    everywhere = torch.zeros_like(rows_RD).index_copy(0, found.rows, found.table_UD)
    assert far(everywhere, rows_RD) < share and rows_RD.any()
    assert torch.equal(found.rows, found.rows.unique()) and not (found.rows == 0).any()
    return dense


@pytest.mark.parametrize("name", SMALL)
def test_fisher_equals_a_loop_over_single_samples_for_every_interaction(name):
    config = recipe(interaction=SMALL[name], user_weight_power=0.5, buckets=64)
    table = make(60, users=5, seed=7)  # the first request has no history, most others have one
    dense = check(config, table, np.arange(0, table.rows, 40))
    unused = {k for k, v in dense.items() if not v.any()}
    assert unused <= {"interaction.vectors.6.weight"}  # DeepLight's of the long-term interest, zero in a small world


@pytest.mark.parametrize(
    "changes",
    [{"hidden": ()}, {"hidden": (8, 8)}, {"layers": 1}, {"attended": 2, "first": 2}, {"sampled_weight": 0.25}],
    ids=str,
)
def test_fisher_equals_the_loop_for_other_sizes_and_weights(changes):
    table = make(60, users=5, seed=7)
    table = dataclasses.replace(table, sampled=np.arange(table.rows) % 3 == 0)
    check(recipe(**changes), table, np.arange(0, table.rows, 40))


def test_fisher_equals_the_loop_where_nobody_has_a_history():
    table = make(20, seed=7)
    dense = check(recipe(), dataclasses.replace(table, history_end=table.history_start), np.arange(12))
    assert dense["sequence.no_history"].any() and not dense["sequence.fuse.query.weight"].any()


@pytest.mark.parametrize("chunk", [1, 11])
def test_fisher_does_not_depend_on_how_many_samples_are_taken_at_once(monkeypatch, chunk):
    config, table = recipe(), make(30, users=5, seed=7)
    ranker, batcher, rows = drawn(config), Batcher(table, config.ranker), np.arange(25)
    reference = measure(ranker, batcher, rows, config.train)
    monkeypatch.setattr(fisher, "_CHUNK", chunk)
    other = measure(ranker, batcher, rows[::-1].copy(), config.train)
    assert torch.equal(reference.rows, other.rows)
    assert far(other.table_UD, reference.table_UD) < 1e-5
    assert all(far(other.dense[name], value) < 1e-5 for name, value in reference.dense.items())


def test_fisher_is_not_the_square_of_the_mean_gradient():
    """The common shortcut, an order of magnitude too small."""
    config, table = recipe(), make(30, users=5, seed=7)
    ranker, batcher = drawn(config), Batcher(table, config.ranker)
    found = measure(ranker, batcher, np.arange(40), config.train)
    batch = batcher.of_rows(np.arange(40))
    task_loss(ranker(batch), batch.labels_NA, batch.weight_N, label_weights(ranker.spec, config.train)).backward()
    shortcut = ranker.heads.weight.grad.square().sum()
    assert found.dense["heads.weight"].sum() > 3 * shortcut


def test_measuring_leaves_the_ranker_as_it_was():
    config, table = recipe(), make(10, seed=7)
    ranker = drawn(config).requires_grad_(False)
    before = {k: v.clone() for k, v in ranker.state_dict().items()}
    measure(ranker, Batcher(table, config.ranker), np.arange(9), config.train)
    assert all(torch.equal(v, before[k]) for k, v in ranker.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in ranker.parameters())


class Odd(nn.Module):
    """Weights used in ways of which a linear layer's formula would be wrong."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied, self.folded, self.gate = (nn.Linear(4, 4) for _ in range(4))
        self.scaled = nn.Linear(4, 4, bias=False)
        self.scale, self.never = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))

    def forward(self, x_T4):
        x_T4 = torch.tanh(self.twice(torch.tanh(self.twice(x_T4))))
        x_T4 = self.tied(x_T4) @ self.tied.weight  # in a layer, and beside it
        x_T4 = F.linear(x_T4, self.folded.weight @ self.folded.weight, self.folded(self.folded.bias))
        x_T4 = F.linear(x_T4, self.scaled.weight * self.scale) * self.scale  # by a weight that is used otherwise too
        return (self.gate(x_T4) * x_T4).square().sum()


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)], ids=["a vector a sample", "three vectors a sample"])
def test_squares_are_right_however_a_weight_is_used(shape):
    torch.manual_seed(0)
    odd, x = Odd(), torch.randn(shape)
    squares = SquaredGradients(
        lambda weights, sample: torch.func.functional_call(odd, weights, (sample["x"],)),
        dict(odd.named_parameters()),
        {"x": x},
    )
    squares.add({"x": x[:2]})
    squares.add({"x": x[2:]})
    expected = {name: torch.zeros_like(p) for name, p in odd.named_parameters()}
    for sample in x:
        odd.zero_grad()
        odd(sample).backward()
        for name, p in odd.named_parameters():
            expected[name] += 0 if p.grad is None else p.grad.square()
    assert all(far(squares.total[name], value) < 1e-5 for name, value in expected.items())
    assert sum(bool(value.any()) for value in expected.values()) == len(expected) - 1


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
