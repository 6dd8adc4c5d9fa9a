"""Squared gradients of the loss of every sample, summed over samples, from one ordinary backward pass.

A layer y = W x + b that sees one vector in a sample has the gradient g x' there, with g = d loss / d y. The square of
an outer product is the outer product of the squares, so the sum over samples of (g x')^2 is (g^2)' (x^2): one matrix
product, and no gradient of a single sample ever exists. A layer that sees several vectors in a sample (the actions of a
sequence), or whose W is computed from parameters, has its gradient made for each sample and squared after it. So has
every parameter that is used in another way: each sample gets a copy of it.

Which parameters are of which kind is found by following the graph of one sample; no layer is known by name.

Shapes: S samples, T vectors in a sample, I inputs, O outputs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Tensors = dict[str, Tensor]
Loss = Callable[..., Tensor]  # (parameters, one sample's tensors in any number of records) -> scalar

# Under `vmap`: whether a tensor has a value for each sample, the tensor of all of them, and its dimension of samples.
_differs: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor  # type: ignore[attr-defined]
_unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped  # type: ignore[attr-defined]
_sample_dimension: Callable[[Tensor], int] = torch._C._functorch.maybe_get_bdim  # type: ignore[attr-defined]


class SquaredGradients:
    """The sum over samples of (d loss / d theta)^2, for all parameters.

    Args:
        loss: Of one sample. What it does must not depend on values: it runs under `torch.func.vmap`.
        parameters: By name.
        example: Samples, as for `add`; one is enough.

    Attributes:
        total: The sums so far, by name.
    """

    def __init__(self, loss: Loss, parameters: Tensors, *example: Tensors) -> None:
        self.total = {k: torch.zeros_like(p) for k, p in parameters.items()}
        self._loss, self._parameters = loss, {k: p.detach().requires_grad_() for k, p in parameters.items()}
        self._name_of = {id(p): name for name, p in self._parameters.items()}
        self._copied = self._used_otherwise(example)
        self._leaf = torch.zeros((), requires_grad=True)  # so that a layer whose x needs no gradient hears of its own
        self._told: list[tuple[Tensor, Tensor, Tensor | None]] = []  # a weight, g, x; a bias has no x

    def add(self, *samples: Tensors) -> None:
        """Count samples in, the first dimension of all tensors; those that require a gradient get their own."""
        size = len(next(iter(samples[0].values())))
        copies = {k: self._parameters[k].detach().expand(size, *self.total[k].shape) for k in self._copied}
        for copy in copies.values():
            copy.requires_grad_()
        with _Linears(self._linear):
            losses_S = self._losses(copies, *samples)
        losses_S.sum().backward()
        for name, copy in copies.items():
            if copy.grad is not None:
                self.total[name] += copy.grad.square_().sum(0)
        self._add_layers()

    def _losses(self, copies: Tensors, *samples: Tensors) -> Tensor:
        def loss(copies: Tensors, *sample: Tensors) -> Tensor:
            return self._loss(self._parameters | copies, *sample)

        return torch.func.vmap(loss)(copies, *samples)

    def _used_otherwise(self, example: tuple[Tensors, ...]) -> set[str]:
        """The parameters that reach the loss in another way than as weights of linear layers."""

        def cut(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if not _shared(x, weight, bias):
                return F.linear(x, weight, bias)
            return F.linear(x, weight.detach(), None if bias is None else bias.detach())

        one = [{k: v[:1] for k, v in record.items()} for record in example]
        copied: set[str] = set()
        while True:  # a weight that is computed from a copy is another one in every sample: no linear layer any more
            with _Linears(cut):
                losses_S = self._losses({k: self._parameters[k][None] for k in copied}, *one)
            found = {self._name_of[leaf] for leaf in _leaves(losses_S) if leaf in self._name_of}
            if found == copied:
                return found
            copied = found

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """In place of `torch.nn.functional.linear`: the same, and remembers g and x."""
        if not _shared(x, weight, bias):
            return F.linear(x, weight, bias)
        out = F.linear(x, weight.detach(), None if bias is None else bias.detach())
        if not _unwrapped(out).requires_grad:
            out = out + self._leaf
        place, x_STI = _sample_dimension(out), _by_sample(_unwrapped(x).detach(), _sample_dimension(x))

        def tell(gradient: Tensor) -> None:
            g_STO = _by_sample(gradient, place)
            self._told.append((weight, g_STO, x_STI))
            if bias is not None:
                self._told.append((bias, g_STO, None))

        _unwrapped(out).register_hook(tell)
        return out

    def _add_layers(self) -> None:
        """Add what the linear layers told in the last backward pass."""
        told, self._told = self._told, []
        times = Counter(id(weight) for weight, _, _ in told)
        mixed = {leaf for leaf, count in times.items() if count > 1}
        mixed |= {leaf for weight, _, _ in told for leaf in _leaves(weight)}
        weights, gradients = [], []
        for weight, g_STO, x_STI in told:
            if weight.grad_fn is not None or id(weight) in mixed:
                weights.append(weight)
                gradients.append(_gradients(g_STO, x_STI))
            elif x_STI is not None and x_STI.shape[1] == 1:
                self.total[self._name_of[id(weight)]] += g_STO[:, 0].square().T @ x_STI[:, 0].square()
            else:
                self.total[self._name_of[id(weight)]] += _gradients(g_STO, x_STI).square_().sum(0)
        names = [name for name, p in self._parameters.items() if id(p) in mixed]
        if names:
            behind = [self._parameters[name] for name in names]
            each = torch.autograd.grad(weights, behind, gradients, is_grads_batched=True)
            for name, gradient in zip(names, each, strict=True):
                self.total[name] += gradient.square_().sum(0)


class _Linears(TorchFunctionMode):
    """While it is entered, `instead(x, weight, bias)` is called for `torch.nn.functional.linear`."""

    def __init__(self, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.instead if func is F.linear else func)(*args, **kwargs or {})


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a linear layer's input differs from sample to sample, and its weights do not."""
    return _differs(x) and not _differs(weight) and not (bias is not None and _differs(bias))


def _by_sample(tensor: Tensor, place: int) -> Tensor:
    """(S, T, last dimension) of a tensor whose samples are in the dimension `place`."""
    tensor = tensor.movedim(place, 0)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _gradients(g_STO: Tensor, x_STI: Tensor | None) -> Tensor:
    """(S, O, I) of a weight, (S, O) of a bias."""
    return g_STO.sum(1) if x_STI is None else g_STO.transpose(1, 2) @ x_STI


def _leaves(result: Tensor) -> set[int]:
    """The leaves that a tensor is computed from, by `id`."""
    leaves: set[int] = set()
    ahead: list[Any] = [result.grad_fn] if result.grad_fn else []
    seen = {None, *ahead}
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            elif node not in seen:
                seen.add(node)
                ahead.append(node)
    return leaves
