"""Every feature interaction against a second computation of its formula, row by row in numpy."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from engagement.errors import EvergreenError
from model.interactions import build
from model.interactions.base import FIELD_EPS
from model.interactions.cost import flops, parameters
from model.interactions.sizes import (
    DHEN,
    GDCN,
    SIZES,
    DeepLight,
    FinalMLP,
    LowRankDCN,
    ParallelDCN,
    ParallelMaskNetDCN,
    SDCNv3,
    StackedDCN,
    Transformer,
    from_json,
    to_json,
)

WIDTHS = (3, 3, 5, 2)
X = sum(WIDTHS)
SMALL = {
    sizes.name: sizes
    for sizes in (
        ParallelMaskNetDCN(blocks=3, ratio=1.5, width=6, crosses=2),
        StackedDCN(crosses=3),
        ParallelDCN(stacks=2, crosses=2),
        LowRankDCN(crosses=2, rank=4),
        Transformer(tokens=3, width=4, multiplier=2, layers=2, heads=2),
        FinalMLP(hidden=(8, 6), gate=5, heads=3, outputs=4),
        GDCN(crosses=2),
        SDCNv3(shallow=2, deep=3),
        DeepLight(width=3, maps=2, hidden=(7, 5)),
        DHEN(layers=2, blocks=2, ratio=1.0, width=6),
    )
}


def made(sizes, widths=WIDTHS, seed=0):
    """The module with every parameter drawn: nothing that starts at zero or one can hide."""
    torch.manual_seed(seed)
    module = build(sizes, widths)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return module


# The naive forms. `p` holds the parameters by name as float64 arrays, `at` is the prefix of the part at hand.


def weights(module):
    return {k: v.detach().double().numpy() for k, v in module.named_parameters()}


def linear(p, at, x):
    w = p[at + ".weight"]
    out = [sum(w[o, i] * x[i] for i in range(len(x))) for o in range(len(w))]
    return np.array(out) + p.get(at + ".bias", 0.0)


def relu(x):
    return np.array([max(v, 0.0) for v in x])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def standardised(x, eps):
    mean = sum(x) / len(x)
    return (x - mean) / np.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + eps)


def layer_norm(p, at, x):
    return standardised(x, 1e-5) * p[at + ".weight"] + p[at + ".bias"]


def fields_of(x, widths):
    ends = np.cumsum(widths)
    return [x[e - w : e] for w, e in zip(widths, ends, strict=True)]


def crosses(p, at, x, inner):
    first, i = x, 0
    while any(k.startswith(f"{at}layers.{i}.") for k in p):
        f = inner(f"{at}layers.{i}", x)
        x = np.array([first[j] * f[j] + x[j] for j in range(len(x))])
        i += 1
    assert i > 0
    return x


def dcn(p, at, x):
    return crosses(p, at, x, lambda layer, x: linear(p, layer + ".linear", x))


def masknet(p, at, x, widths, blocks):
    normed = np.concatenate([standardised(f, FIELD_EPS) for f in fields_of(x, widths)])
    normed = normed * p[at + "norm.weight"] + p[at + "norm.bias"]
    outputs = []
    for b in range(blocks):
        block = f"{at}blocks.{b}."
        mask = linear(p, block + "mask.2", relu(linear(p, block + "mask.0", x)))
        outputs.append(relu(layer_norm(p, block + "norm", linear(p, block + "linear", mask * normed))))
    return linear(p, at + "project", np.concatenate(outputs))


def parallel_masknet_dcn(p, x, sizes):
    return dcn(p, "crosses.", masknet(p, "masks.", x, WIDTHS, sizes.blocks))


def stacked_dcn(p, x, sizes):
    return np.concatenate([x, dcn(p, "crosses.", x)])


def parallel_dcn(p, x, sizes):
    return np.concatenate([dcn(p, f"stacks.{i}.", x) for i in range(sizes.stacks)])


def lowrank_dcn(p, x, sizes):
    return crosses(p, "", x, lambda at, x: linear(p, at + ".u", relu(linear(p, at + ".v", x))))


def gdcn(p, x, sizes):
    return crosses(p, "", x, lambda at, x: linear(p, at + ".cross.linear", x) * sigmoid(linear(p, at + ".gate", x)))


def sdcn_v3(p, x, sizes):
    def layer(at, first, x):
        c = linear(p, at + ".linear", x)
        mask = c * relu(layer_norm(p, at + ".norm", c))
        gate = np.concatenate([c, mask])
        return np.array([first[j] * gate[j] + p[at + ".bias"][j] + x[j] for j in range(len(x))])

    shallow = deep = x
    for i in range(sizes.shallow):
        shallow = layer(f"shallow.{i}", x, shallow)
    for i in range(sizes.deep):
        deep = layer(f"deep.{i}", deep, deep)
    return np.concatenate([shallow, deep])


def transformer(p, x, sizes):
    e = sizes.width // sizes.heads
    tokens = [linear(p, "tokens", x)[i * sizes.width : (i + 1) * sizes.width] for i in range(sizes.tokens)]
    for n in range(sizes.layers):
        at = f"layers.{n}."
        qkv = [linear(p, at + "qkv", layer_norm(p, at + "norms.0", t)) for t in tokens]
        attended = []
        for mine in qkv:
            heads = []
            for h in range(sizes.heads):
                q, k, v = (slice(part * sizes.width + h * e, part * sizes.width + (h + 1) * e) for part in range(3))
                score = np.exp([mine[q] @ other[k] / np.sqrt(e) for other in qkv])
                heads.append(sum(s * other[v] for s, other in zip(score / score.sum(), qkv, strict=True)))
            attended.append(linear(p, at + "out", np.concatenate(heads)))
        tokens = [t + a for t, a in zip(tokens, attended, strict=True)]
        hidden = [relu(linear(p, at + "ffn.0", layer_norm(p, at + "norms.1", t))) for t in tokens]
        tokens = [t + linear(p, at + "ffn.2", h) for t, h in zip(tokens, hidden, strict=True)]
    return np.concatenate([layer_norm(p, "norm", t) for t in tokens])


def final_mlp(p, x, sizes):
    streams = []
    for i in range(2):
        gate = linear(p, f"streams.{i}.gate.2", relu(linear(p, f"streams.{i}.gate.0", x)))
        h = 2 * sigmoid(gate) * x
        for layer in range(len(sizes.hidden)):
            h = relu(linear(p, f"streams.{i}.mlp.{2 * layer}", h))
        streams.append(h)
    first, second = streams
    out, chunk = linear(p, "linear", np.concatenate(streams)), len(first) // sizes.heads
    for k in range(sizes.heads):
        for o in range(sizes.outputs):
            for i in range(chunk):
                for j in range(chunk):
                    out[o] += first[k * chunk + i] * p["bilinear"][k, i, o, j] * second[k * chunk + j]
    return out


def deeplight(p, x, sizes):
    v = [linear(p, f"vectors.{i}", part) for i, part in enumerate(fields_of(x, WIDTHS))]
    wide = linear(p, "linear", x)
    for m in range(sizes.maps):
        for i in range(len(v)):
            for j in range(i + 1, len(v)):
                wide[m] += p["pairs"][m, i, j] * sum(v[i] * v[j])
    h = np.concatenate(v)
    for layer in range(len(sizes.hidden)):
        h = relu(linear(p, f"mlp.{2 * layer}", h))
    return np.concatenate([wide, h])


def dhen(p, x, sizes):
    for n in range(sizes.layers):
        at = f"layers.{n}."
        crossed = x * linear(p, at + "cross.linear", x) + x
        masks = masknet(p, at + "masks.", x, WIDTHS if n == 0 else (sizes.width,), sizes.blocks)
        shortcut = linear(p, at + "shortcut", x) if n == 0 else x
        x = layer_norm(p, at + "norm", linear(p, at + "project", np.concatenate([crossed, masks])) + shortcut)
    return x


NAIVE = {
    f.__name__: f
    for f in (
        parallel_masknet_dcn,
        stacked_dcn,
        parallel_dcn,
        lowrank_dcn,
        transformer,
        final_mlp,
        gdcn,
        sdcn_v3,
        deeplight,
        dhen,
    )
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every = pytest.mark.parametrize("name", SIZES)


@every
def test_the_module_computes_the_formula_of_its_paper(name):
    sizes = SMALL[name]
    module = made(sizes).double()
    x = torch.randn(5, X, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    expected = np.stack([NAIVE[name](weights(module), row, sizes) for row in x.numpy()])
    assert expected.shape == (5, module.out_features)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@every
def test_every_parameter_has_a_part_in_the_output(name):
    module = made(SMALL[name])
    module(torch.randn(64, X)).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


@every
def test_gradients_per_sample_are_those_of_each_row_alone(name):
    module = made(SMALL[name])
    parameters_ = dict(module.named_parameters())
    x = torch.randn(3, X)

    def loss(p, row):
        return functional_call(module, p, (row[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters_, x)
    for n in range(len(x)):
        alone = torch.autograd.grad(module(x[n : n + 1]).square().sum(), list(parameters_.values()))
        for key, expected in zip(parameters_, alone, strict=True):
            torch.testing.assert_close(per_sample[key][n], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@every
def test_an_export_takes_any_number_of_rows(name):
    module = made(SMALL[name]).eval()
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(module, (torch.randn(4, X),), dynamic_shapes=({0: rows},)).module()
    x = torch.randn(9, X)
    torch.testing.assert_close(exported(x), module(x))


@every
def test_bfloat16_autocast_stays_near_float32(name):
    torch.manual_seed(0)
    module = build(SMALL[name], WIDTHS)
    x = torch.randn(32, X)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(x)
    rough.float().square().sum().backward()
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


@every
def test_training_on_inputs_up_to_five_stays_finite_and_learns(name):
    torch.manual_seed(0)
    widths = (8,) * 6 + (30,)
    module = build(SMALL[name], widths)
    head = torch.nn.Linear(module.out_features, 1)
    everything = [*module.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(everything, lr=5e-3)
    x = torch.rand(256, sum(widths)) * 10 - 5
    y = (x[:, :1] * x[:, 20:21] > 0).float()
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(module(x)), y)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@every
def test_the_sizes_survive_json(name):
    for sizes in (SMALL[name], SIZES[name]()):
        data = json.loads(json.dumps(to_json(sizes)))
        assert data["name"] == name and from_json(data) == sizes


def test_without_the_concatenation_the_stack_gives_its_last_layer_alone():
    both, alone = (made(StackedDCN(crosses=3, concat=c)) for c in (True, False))
    x = torch.randn(4, X)
    assert both.out_features == 2 * alone.out_features
    torch.testing.assert_close(both(x)[:, X:], alone(x))


def test_a_short_embedding_stays_shorter_than_a_long_one_through_the_field_norm():
    norm = build(ParallelMaskNetDCN(width=4), (8, 8)).masks.norm
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    direction = direction / direction.norm()
    short, long = norm(torch.cat([0.05 * direction, direction])[None])[0].split(8)
    assert short.norm() < 0.5 * long.norm()


def test_a_field_of_zeros_has_a_finite_gradient():
    module = build(SMALL["parallel_masknet_dcn"], WIDTHS)
    x = torch.zeros(2, X, requires_grad=True)
    module(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("data", [{"name": "nothing"}, {"name": "gdcn", "rank": 3}, {"crosses": 3}])
def test_unknown_sizes_are_refused(data):
    with pytest.raises(EvergreenError, match="no feature interaction"):
        from_json(data)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(EvergreenError, match="do not split"):
        Transformer(width=10, heads=4)
    with pytest.raises(EvergreenError, match="do not split"):
        FinalMLP(hidden=(10,), heads=4)


def test_costs_of_a_cross_stack_are_those_counted_by_hand():
    module = build(StackedDCN(crosses=4), WIDTHS)
    assert parameters(module) == 4 * (X * X + X)
    assert flops(module, X) == 4 * 2 * X * X
    assert next(module.parameters()).device.type == "cpu"


@every
def test_the_cost_counts_every_matrix_of_the_default_sizes(name):
    module = build(SIZES[name](), (8,) * 20 + (40, 130))
    assert flops(module, 330) > 1.5 * sum(p.numel() for p in module.parameters() if p.ndim == 2)


def test_sizes_are_read_without_torch():
    code = "import sys, model.interactions.sizes as s; s.SIZES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
