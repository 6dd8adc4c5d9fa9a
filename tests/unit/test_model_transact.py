"""TransAct and the layers against naive computations; padding, empty histories, action bits."""

import numpy as np
import pytest
import torch

from model.data import Batcher, quantiles
from model.layers import NumericNorm, l2_normalise, pool_values
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


def naive_attention(layer, tokens, mask):
    """Textbook attention of one sequence over its real tokens."""
    query, key, value = layer.query(tokens), layer.key(tokens), layer.value(tokens)
    logits = query @ key.T / tokens.shape[-1] ** 0.5
    weights = torch.zeros_like(logits)
    weights[:, mask] = torch.softmax(logits[:, mask], -1)
    return tokens + layer.out(weights @ value)


def naive(model, history, candidates, mask, request_of_row):
    """Candidate by candidate, over [action ; candidate] tokens of the real actions alone."""
    outputs = []
    for n, r in enumerate(request_of_row.tolist()):
        actions = history[r][mask[r]]
        tokens = torch.cat([actions, candidates[n].expand(len(actions), -1)], -1)
        for layer, feed in zip((model.fuse, *model.attend), model.feed, strict=True):
            x = feed.norm1(naive_attention(layer, tokens, torch.ones(len(actions), dtype=torch.bool)))
            tokens = feed.norm2(x + feed.down(torch.relu(feed.up(x))))
        first = torch.nn.functional.pad(tokens, (0, 0, 0, 100))[: model.first]
        pooled = tokens.amax(0) if len(actions) else model.no_history
        outputs.append(model.summary(torch.cat([first.flatten(), pooled])))
    return torch.stack(outputs)


def fused(layer, history, candidates, mask, request_of_row):
    return layer.fused(layer.halves(history, candidates, mask, layer.folded()), request_of_row)


def naive_fused(layer, history, candidates, mask, request_of_row):
    rows = enumerate(request_of_row.tolist())
    pairs = [(torch.cat([history[r], candidates[n].expand(LENGTH, -1)], -1), mask[r]) for n, r in rows]
    return torch.stack([naive_attention(layer, tokens, real) for tokens, real in pairs])


def test_split_projections_equal_attention_over_concatenated_tokens(inputs):
    layer, real = transact().fuse, inputs[2][inputs[3]]
    assert real.any(1).sum() > 5
    torch.testing.assert_close(fused(layer, *inputs)[real], naive_fused(layer, *inputs)[real], atol=1e-5, rtol=0)


def test_split_projections_have_the_gradients_of_the_naive_form(inputs):
    layer, real, gradients = transact().fuse, inputs[2][inputs[3]], []
    for form in (fused, naive_fused):
        layer.zero_grad()
        form(layer, *inputs)[real].square().sum().backward()
        gradients.append({k: p.grad.clone() for k, p in layer.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_every_path_equals_the_naive_transformer(monkeypatch, inputs, layers, inference):
    monkeypatch.setattr("model.transact.CHUNK", 400)
    model = transact(layers)
    with torch.inference_mode(inference):
        torch.testing.assert_close(model(*inputs), naive(model, *inputs), atol=1e-5, rtol=0)


def of_sizes(counts, lengths, scale=1.0, action=ACTION):
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    history = scale * torch.randn(len(counts), max(lengths), action, generator=g) * mask[..., None]
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    row = row[torch.randperm(len(row), generator=g)]  # the rows of a request need not be neighbours
    return history, scale * torch.randn(len(row), ITEM, generator=g), mask, row


@pytest.mark.parametrize("chunk", [1, 200, 2000, 200_000])
def test_chunks_of_any_size_and_uneven_requests_give_the_naive_output(monkeypatch, chunk):
    monkeypatch.setattr("model.transact.CHUNK", chunk)
    model, case = transact(), of_sizes([1, 0, 40, 3, 1, 2, 1], [9, 4, 7, 2, 0, 1, 9])
    with torch.inference_mode():
        torch.testing.assert_close(model(*case), naive(model, *case), atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [[30], [1, 1, 1]])
def test_logits_too_far_apart_to_factorise_give_the_naive_output(monkeypatch, counts):
    model, case = transact(), of_sizes(counts, [LENGTH] * len(counts), scale=30.0)
    fallbacks, whole = [], FusedAttention.fused
    monkeypatch.setattr("model.transact.CHUNK", 400)
    monkeypatch.setattr(FusedAttention, "fused", lambda *a: fallbacks.append(1) or whole(*a))
    with torch.inference_mode():
        fast, slow = model(*case), naive(model.double(), *(x.double() if x.is_floating_point() else x for x in case))
    assert fallbacks
    torch.testing.assert_close(fast.double(), slow, atol=1e-4, rtol=0)


def test_oneDNN_takes_the_large_products_and_its_output_is_the_naive_one(monkeypatch):
    for name in ("SMALLEST", "SMALLEST_TRAINED"):
        monkeypatch.setattr(f"model.gemm.{name}", 1 << 20)
    torch.manual_seed(3)
    model = TransAct(24, 24, 2, ffn=16, first=10, summary=8, dropout=0.0).eval()
    history, mask, candidates = torch.randn(2, 60, 24), torch.ones(2, 60, dtype=torch.bool), torch.randn(24, 24)
    case = history, candidates, mask, torch.arange(24) // 12
    assert 1 << 20 < 24 * 60 * 48 * 48
    outputs = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            outputs.append(model(*case).detach().clone())
    slow = naive(model, *case)
    for out in outputs:
        torch.testing.assert_close(out, slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2])
def test_history_shorter_than_the_kept_outputs_is_padded(monkeypatch, inputs, length):
    monkeypatch.setattr("model.transact.CHUNK", 40)
    history, candidates, mask, request_of_row = inputs
    model, short = transact(), (history[:, :length], candidates, mask[:, :length], request_of_row)
    with torch.inference_mode():
        torch.testing.assert_close(model(*short), naive(model, *short), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(*short), naive(model, *short), atol=1e-5, rtol=0)


def test_order_of_equal_actions_after_the_kept_ones_changes_nothing(inputs):
    history, candidates, mask, _ = inputs
    model, swap = transact(), torch.tensor([0, 1, 2, 6, 5, 4, 3])
    row = torch.zeros(ROWS, dtype=torch.long)
    one, other = model(history, candidates, mask, row), model(history[:, swap], candidates, mask, row)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_dropout_speaks_in_training_only(inputs):
    torch.manual_seed(1)
    model = TransAct(ACTION, ITEM, 2, ffn=8, first=3, summary=6, dropout=0.5)
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


def test_gradients_per_sample_and_export_see_no_data_dependent_path(inputs):
    history, candidates, mask, _ = inputs
    model = transact()
    parameters = dict(model.named_parameters())

    def score(parameters, *case):
        case = [x[None] for x in case]
        return torch.func.functional_call(model, parameters, (*case, torch.zeros(1, dtype=torch.long))).sum()

    case = history, candidates[:REQUESTS], mask
    each = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0, 0, 0))(parameters, *case)
    for i in range(REQUESTS):
        alone = torch.autograd.grad(
            score(parameters, *(x[i] for x in case)), list(parameters.values()), allow_unused=True
        )
        for name, expected in zip(parameters, alone, strict=True):
            expected = torch.zeros_like(each[name][i]) if expected is None else expected
            torch.testing.assert_close(each[name][i], expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), model(*inputs), atol=1e-5, rtol=0)


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


KNOTS = torch.stack([torch.linspace(6.0, 14.0, NumericNorm.KNOTS), torch.full((NumericNorm.KNOTS,), 5.0)])


def test_missing_number_is_the_mean_and_speaks_only_where_training_knew_gaps():
    norm = NumericNorm(2)
    norm.fit(torch.tensor([10.0, 5.0]), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), KNOTS)
    out = norm(torch.tensor([[14.0, 6.0], [float("nan"), float("inf")], [1e9, 5.0]]))
    expected = [[2.0, 1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], [norm.LIMIT, 0.0, 1.0, -1.0, 0.0, 0.0]]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_place_of_a_number_is_its_share_of_the_training_values():
    rng, norm = np.random.default_rng(0), NumericNorm(1)
    values = rng.lognormal(size=(5000, 1)).astype(np.float32)
    values[:7] = np.nan
    knots = quantiles(values, np.array([0]), norm.KNOTS)
    norm.fit(torch.zeros(1), torch.ones(1), torch.zeros(1), knots)
    asked = np.linspace(0, 8, 50, dtype=np.float32)[:, None]
    share = np.interp(asked[:, 0], knots[0].numpy(), np.linspace(-1, 1, norm.KNOTS))
    np.testing.assert_allclose(norm(torch.from_numpy(asked))[:, 1], share, atol=1e-5)
    below = [(values[7:, 0] < a).mean() for a in asked[:, 0]]
    np.testing.assert_allclose((share + 1) / 2, below, atol=0.05)


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
