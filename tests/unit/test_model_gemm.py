"""oneDNN's linear against PyTorch's own, forward and backward, and where it must not be used."""

import pytest
import torch
from torch.nn import functional as F

from model.gemm import Linear, eager, keep_memory, linear

SMALLEST = 1 << 20


@pytest.fixture(autouse=True)
def small_products_count(monkeypatch):
    monkeypatch.setattr("model.gemm.SMALLEST", SMALLEST)
    monkeypatch.setattr("model.gemm.SMALLEST_TRAINED", SMALLEST)


def case(rows=2048, bias=True):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, rows // 4, 24, generator=g), torch.randn(48, 24, generator=g)
    assert x.numel() * 48 >= SMALLEST
    return [t.requires_grad_() for t in (x, weight)] + [torch.randn(48, generator=g).requires_grad_() if bias else None]


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_torch(bias):
    inputs = case(bias=bias)
    given, results = [t for t in inputs if t is not None], []
    for form in (linear, F.linear):
        out = form(*inputs)
        results.append((out, *torch.autograd.grad(out.sin().sum(), given)))
    assert "_Linear" in type(linear(*inputs).grad_fn).__name__
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_slice_of_a_matrix_as_weight():
    x, weight, bias = (t.detach() for t in case())
    wide = torch.randn(48, 60)
    wide[:, 7:31] = weight
    torch.testing.assert_close(linear(x, wide[:, 7:31], bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_only_gradients_that_are_asked_for():
    x, weight, bias = case()
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_autocast_and_transforms_stay_with_torch():
    x, weight, bias = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert not eager(x) and linear(x, weight, bias).dtype == torch.bfloat16
    each = torch.func.vmap(torch.func.grad(lambda w, x: linear(x, w).sin().sum()), in_dims=(None, 0))(weight, x)
    for i, one in enumerate(x):
        alone = torch.autograd.grad(F.linear(one, weight).sin().sum(), weight)[0]
        torch.testing.assert_close(each[i], alone, atol=1e-3, rtol=1e-4)
    assert not eager(x.double()) and eager(x)


def test_kept_memory_still_computes():
    keep_memory()
    assert torch.ones(1_000_000).sum() == 1_000_000


def test_an_export_takes_any_number_of_rows():
    layer, rows = Linear(24, 48), torch.export.Dim("rows", min=2)
    exported = torch.export.export(layer, (torch.randn(3, 24),), dynamic_shapes={"input": {0: rows}}).module()
    x = torch.randn(2048, 24)
    torch.testing.assert_close(exported(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
