"""TransAct and the layers against naive computations; padding, empty histories, action bits."""

import numpy as np
import pytest
import torch

from model.data import Batcher
from model.layers import CrossStack, NumericNorm, l2_normalise, pool_values
from model.ranker import Ranker
from model.transact import FusedAttention, TransAct
from tests.unit.model_synth import SPEC, make, recipe

REQUESTS, ROWS, LENGTH, ACTION, ITEM = 4, 11, 7, 5, 3


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    history = torch.randn(REQUESTS, LENGTH, ACTION, generator=g)
    candidates = torch.randn(ROWS, ITEM, generator=g)
    lengths = torch.tensor([LENGTH, 3, 1, 0])
    mask = torch.arange(LENGTH) < lengths[:, None]
    return history * mask[..., None], candidates, mask, torch.arange(ROWS) % REQUESTS


def transact(layers=2):
    torch.manual_seed(1)
    model = TransAct(ACTION, ITEM, layers, ffn=8, first=3, summary=6, dropout=0.0).eval()
    torch.nn.init.normal_(model.no_history)
    return model


def naive_attention(layer: FusedAttention, history, candidates, mask, request_of_row):
    """Candidate by candidate: build the [action ; candidate] tokens, then textbook attention on the real ones."""
    out = []
    for n, r in enumerate(request_of_row.tolist()):
        tokens = torch.cat([history[r], candidates[n].expand(LENGTH, -1)], -1)
        query, key, value = layer.query(tokens), layer.key(tokens), layer.value(tokens)
        logits = query @ key.T / tokens.shape[-1] ** 0.5
        weights = torch.zeros_like(logits)
        weights[:, mask[r]] = torch.softmax(logits[:, mask[r]], -1)
        out.append(tokens + layer.out(weights @ value))
    return torch.stack(out)


def test_split_projections_equal_attention_over_concatenated_tokens(inputs):
    history, candidates, mask, request_of_row = inputs
    layer = transact().fuse
    fused = layer.fused(history, candidates, mask, request_of_row)
    naive = naive_attention(layer, history, candidates, mask, request_of_row)
    real = mask[request_of_row]
    assert real.any(1).sum() > 5
    torch.testing.assert_close(fused[real], naive[real], atol=1e-5, rtol=0)


def test_split_projections_have_the_gradients_of_the_naive_form(inputs):
    history, candidates, mask, request_of_row = inputs
    layer, gradients = transact().fuse, []
    for form in (layer.fused, lambda *a: naive_attention(layer, *a)):
        layer.zero_grad()
        form(history, candidates, mask, request_of_row)[mask[request_of_row]].square().sum().backward()
        gradients.append({k: p.grad.clone() for k, p in layer.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-3, rtol=1e-4)


def test_content_of_padding_never_changes_the_output(inputs):
    history, candidates, mask, request_of_row = inputs
    model, garbage = transact(), 100 * torch.randn(history.shape)
    dirty = torch.where(mask[..., None], history, garbage)
    clean_out, dirty_out = (model(h, candidates, mask, request_of_row) for h in (history, dirty))
    torch.testing.assert_close(clean_out, dirty_out, atol=1e-6, rtol=0)


def test_more_padding_never_changes_the_output(inputs):
    history, candidates, mask, request_of_row = inputs
    longer = torch.nn.functional.pad(history, (0, 0, 0, 9))
    wider = torch.nn.functional.pad(mask, (0, 9))
    model = transact()
    short, long = model(history, candidates, mask, request_of_row), model(longer, candidates, wider, request_of_row)
    torch.testing.assert_close(short, long, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [1, 2])
def test_user_without_actions_gets_the_learned_vector_and_no_nan(inputs, layers):
    history, candidates, mask, request_of_row = inputs
    model = transact(layers)
    out = model(history, candidates, torch.zeros_like(mask), request_of_row)
    kept = torch.cat([torch.zeros(3 * (ACTION + ITEM)), model.no_history])
    torch.testing.assert_close(out, model.summary(kept).expand(ROWS, -1))
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.no_history.grad.abs().sum() > 0


def test_fully_padded_row_among_others_has_finite_gradients(inputs):
    history, candidates, mask, request_of_row = inputs
    history.requires_grad_()
    model = transact()
    model(history, candidates, mask, request_of_row).square().sum().backward()
    assert torch.isfinite(history.grad).all() and (history.grad[3] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_each_action_bit_is_an_action_of_its_own_the_first_included():
    torch.manual_seed(0)
    table, ranker = make(40, seed=3), Ranker(recipe().ranker, SPEC).eval()
    ranker.seen[:] = True
    batcher = Batcher(table, ranker.config)
    batch = batcher.of_requests(np.arange(40))
    assert batch.history_mask_BL.any()

    def scores(bits):
        return ranker(torch_replace(batch, history_bits_BL=torch.where(batch.history_mask_BL, bits, 0)))

    outputs = [scores(torch.tensor(b)) for b in (0, 1, 2, 4, 5)]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-5


def torch_replace(batch, **changes):
    import dataclasses

    return dataclasses.replace(batch, **changes)


def test_crosses_equal_the_formula_of_dcn_v2():
    torch.manual_seed(0)
    crosses, x0 = CrossStack(6, 3), torch.randn(4, 6)
    expected = []
    for row in x0.double():
        x = row
        for layer in crosses.layers:
            w, b = layer.weight.double(), layer.bias.double()
            x = torch.stack([row[i] * (sum(w[i, j] * x[j] for j in range(6)) + b[i]) + x[i] for i in range(6)])
        expected.append(x)
    torch.testing.assert_close(crosses(x0).double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_missing_number_is_the_mean_and_speaks_only_where_training_knew_gaps():
    norm = NumericNorm(2)
    norm.fit(torch.tensor([10.0, 5.0]), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    out = norm(torch.tensor([[14.0, 6.0], [float("nan"), float("inf")], [1e9, 5.0]]))
    expected = [[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [NumericNorm.LIMIT, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_zero_vector_survives_normalisation_with_a_finite_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    out = l2_normalise(x)
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert torch.isfinite(x.grad).all()


def test_pooling_counts_only_values_that_are_there():
    values = torch.tensor([[[2.0], [4.0], [0.0]], [[0.0], [0.0], [0.0]]])
    present = torch.tensor([[True, True, False], [False, False, False]])
    assert pool_values(values, present).tolist() == [[3.0], [0.0]]
