"""Linear layers through oneDNN, for float32 on a CPU.

PyTorch's own float32 `linear` calls MKL, which on CPUs other than Intel's stays on its AVX2 kernels; oneDNN, which is
part of the same wheel, picks kernels by what the CPU can do. Measured on a Zen 5 core: 90 against 200 GFLOP/s.
"""

import ctypes
import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SMALLEST = 1 << 22
"""Multiplications from which oneDNN pays in inference: it costs some 12 microseconds a call."""
SMALLEST_TRAINED = 1 << 25
"""And in training: it makes a kernel for every new shape, and every batch has another number of rows."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, to rounding; there is no second derivative.

    What oneDNN's operator cannot do (autocast, other devices and types, torch.func, compilation) PyTorch does.
    """
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return cast(Tensor, _Linear.apply(x, weight, bias))
    return _product(x, weight, bias)


def keep_memory() -> None:
    """Let glibc keep up to 256 MiB of freed memory for the next tensor; call once a process, before the work.

    By default it hands activations back to the kernel at every step, which zeroes and maps them again: on small batches
    that is a third of the time of inference.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest


def eager(x: Tensor) -> bool:
    """Whether `x` is float32 on a CPU, computed as it is written: no autocast, no torch.func, no compilation."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    # The size last: an export with any number of rows must not see a condition on it.
    fits = eager(x) and weight.dtype == x.dtype and torch.backends.mkldnn.is_available()
    return fits and x.numel() * weight.shape[0] >= (SMALLEST_TRAINED if torch.is_grad_enabled() else SMALLEST)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # for a slice of a matrix oneDNN falls back to a loop, ten thousand times slower
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], ""))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        out = gradients[0].reshape(-1, weight.shape[0])
        return (
            _product(out, weight.t()).view_as(x) if need_x else None,
            _product(out.t(), x.reshape(-1, x.shape[-1]).t()) if need_weight else None,
            out.sum(0) if need_bias else None,
        )


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)
