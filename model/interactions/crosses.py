"""Cross networks: every layer multiplies its input with the first one, element by element.

Shapes: N rows, X width of the input, H half of X (rounded up).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.interactions import sizes as s
from model.interactions.base import Interaction


class FullRank(nn.Module):
    """W x + b, the inner part of a DCNv2 layer (Wang et al. 2021, arXiv 2008.13535)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        return self.linear(x_NX)


class LowRank(nn.Module):
    """U relu(V x) + b, with U and V of a low rank (arXiv 2008.13535: its low-rank experts, here one, with ReLU)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.v = nn.Linear(width, rank, bias=False)
        self.u = nn.Linear(rank, width)
        nn.init.zeros_(self.u.bias)

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        return self.u(torch.relu(self.v(x_NX)))


class Gated(nn.Module):
    """(W x + b) * sigmoid(G x), the inner part of a gated cross (Wang et al. 2023, arXiv 2311.04635)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross = FullRank(width)
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        return self.cross(x_NX) * torch.sigmoid(self.gate(x_NX))


class Crosses(Interaction):
    """x_{i+1} = x_0 * f_i(x_i) + x_i, where the f_i are modules of this file."""

    def __init__(self, width: int, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.out_features = width
        self.layers = nn.ModuleList(layers)

    def forward(self, x0_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        x_NX = x0_NX
        for layer in self.layers:
            x_NX = x0_NX * layer(x_NX) + x_NX
        return x_NX


def full_rank(width: int, crosses: int) -> Crosses:
    """Stacked full-rank DCNv2 layers."""
    return Crosses(width, (FullRank(width) for _ in range(crosses)))


class StackedDCN(Interaction):
    """DCNv2 layers; with `concat`, the input goes beside their result to what follows."""

    def __init__(self, sizes: s.StackedDCN, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.crosses = full_rank(sum(widths), sizes.crosses)
        self.concat = sizes.concat
        self.out_features = sum(widths) * (2 if sizes.concat else 1)

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X), or (N, 2X) with `concat`."""
        crossed_NX = self.crosses(x_NX)
        return torch.cat([x_NX, crossed_NX], -1) if self.concat else crossed_NX


class ParallelDCN(Interaction):
    """DCNv2 stacks side by side: each can learn other interactions of the same order."""

    def __init__(self, sizes: s.ParallelDCN, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(full_rank(sum(widths), sizes.crosses) for _ in range(sizes.stacks))
        self.out_features = sum(widths) * sizes.stacks

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, stacks * X)."""
        return torch.cat([stack(x_NX) for stack in self.stacks], -1)


class LowRankDCN(Crosses):
    """Low-rank DCNv2 layers."""

    def __init__(self, sizes: s.LowRankDCN, widths: tuple[int, ...]) -> None:
        width = sum(widths)
        super().__init__(width, (LowRank(width, sizes.rank) for _ in range(sizes.crosses)))


class GDCN(Crosses):
    """Gated crosses."""

    def __init__(self, sizes: s.GDCN, widths: tuple[int, ...]) -> None:
        width = sum(widths)
        super().__init__(width, (Gated(width) for _ in range(sizes.crosses)))


class SelfMask(nn.Module):
    """a * [c; mask(c)] + b + x, where c = W x has half the width and mask(c) = c * relu(LN(c)).

    Li et al. 2024, arXiv 2407.13349: with a = x_0 the layer of the linear network, with a = x that of the exponential
    one. W starts at a tenth of its usual scale, so that a deep stack, whose order is 2 ** layers, starts tame.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = (width + 1) // 2  # an odd width drops the last element of the mask
        self.linear = nn.Linear(width, half, bias=False)
        self.norm = nn.LayerNorm(half)
        self.bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.linear.weight.mul_(0.1)

    def forward(self, a_NX: Tensor, x_NX: Tensor) -> Tensor:
        """(N, X) and (N, X) -> (N, X)."""
        c_NH = self.linear(x_NX)
        masked_NH = c_NH * torch.relu(self.norm(c_NH))
        return a_NX * torch.cat([c_NH, masked_NH], -1)[..., : x_NX.shape[-1]] + self.bias + x_NX


class SDCNv3(Interaction):
    """The linear and the exponential cross network side by side.

    The paper averages a logit of each and adds a loss on each (Tri-BCE). Here both vectors go to the shared heads.
    """

    def __init__(self, sizes: s.SDCNv3, widths: tuple[int, ...]) -> None:
        super().__init__()
        width = sum(widths)
        self.shallow = nn.ModuleList(SelfMask(width) for _ in range(sizes.shallow))
        self.deep = nn.ModuleList(SelfMask(width) for _ in range(sizes.deep))
        self.out_features = 2 * width

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, 2X)."""
        shallow_NX = deep_NX = x_NX
        for layer in self.shallow:
            shallow_NX = layer(x_NX, shallow_NX)
        for layer in self.deep:
            deep_NX = layer(deep_NX, deep_NX)
        return torch.cat([shallow_NX, deep_NX], -1)
