"""MaskNet blocks, alone under crosses and inside DHEN.

Shapes: N rows, X width of the input, Y width of the output, H hidden width of a mask, K blocks.
"""

import torch
from torch import Tensor, nn

from model.gemm import Linear
from model.interactions import sizes as s
from model.interactions.base import FieldNorm, Interaction
from model.interactions.crosses import FullRank, full_rank


class MaskBlock(nn.Module):
    """relu(LN(W (mask * LN_field(x)))) with mask = W_2 relu(W_1 x + b_1) + b_2.

    Wang et al. 2021, MaskNet, arXiv 2102.07619 (its mask block on feature embedding). The mask starts around one: at
    first the block passes its normed input on.
    """

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        expand = Linear(hidden, width)
        nn.init.ones_(expand.bias)
        self.mask = nn.Sequential(Linear(width, hidden), nn.ReLU(), expand)
        self.linear = Linear(width, out, bias=False)  # the norm has a bias
        self.norm = nn.LayerNorm(out)

    def forward(self, x_NX: Tensor, normed_NX: Tensor) -> Tensor:
        """(N, X) and the same with normed fields -> (N, Y)."""
        return torch.relu(self.norm(self.linear(self.mask(x_NX) * normed_NX)))


class ParallelMaskNet(Interaction):
    """MaskNet blocks side by side on one normed input, concatenated and projected (arXiv 2102.07619).

    Args:
        widths: Of the fields; each is normed by itself.
        blocks: K.
        ratio: Hidden width of a mask, in multiples of X.
        width: Y, of each block and of the projection.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, ratio: float, width: int) -> None:
        super().__init__()
        self.norm = FieldNorm(widths)
        hidden = max(1, round(ratio * sum(widths)))
        self.blocks = nn.ModuleList(MaskBlock(sum(widths), hidden, width) for _ in range(blocks))
        self.project = Linear(blocks * width, width)
        self.out_features = width

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, Y)."""
        normed_NX = self.norm(x_NX)
        return self.project(torch.cat([block(x_NX, normed_NX) for block in self.blocks], -1))


class ParallelMaskNetDCN(Interaction):
    """Parallel MaskNet, then DCNv2 layers on its projection; neither input nor projection is concatenated."""

    def __init__(self, sizes: s.ParallelMaskNetDCN, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.masks = ParallelMaskNet(widths, sizes.blocks, sizes.ratio, sizes.width)
        self.crosses = full_rank(sizes.width, sizes.crosses)
        self.out_features = sizes.width

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, Y)."""
        return self.crosses(self.masks(x_NX))


class EnsembleLayer(nn.Module):
    """LN(W [cross(x); masknet(x)] + shortcut(x)), a DHEN layer (Zhang et al. 2022, arXiv 2203.11014).

    The shortcut is x itself, or W_s x where the layer changes the width.
    """

    def __init__(self, widths: tuple[int, ...], sizes: s.DHEN) -> None:
        super().__init__()
        width = sum(widths)
        self.cross = FullRank(width)
        self.masks = ParallelMaskNet(widths, sizes.blocks, sizes.ratio, sizes.width)
        self.project = Linear(width + sizes.width, sizes.width)
        self.shortcut = nn.Identity() if width == sizes.width else Linear(width, sizes.width, bias=False)
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, Y)."""
        crossed_NX = x_NX * self.cross(x_NX) + x_NX
        ensemble_NY = self.project(torch.cat([crossed_NX, self.masks(x_NX)], -1))
        return self.norm(ensemble_NY + self.shortcut(x_NX))


class DHEN(Interaction):
    """Stacked ensemble layers; after the first one, the whole vector is one field."""

    def __init__(self, sizes: s.DHEN, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs = [widths, *[(sizes.width,)] * (sizes.layers - 1)]
        self.layers = nn.Sequential(*(EnsembleLayer(fields, sizes) for fields in inputs))
        self.out_features = sizes.width

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, Y)."""
        return self.layers(x_NX)
