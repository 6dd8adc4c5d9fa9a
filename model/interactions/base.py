"""What every interaction is, and parts that several of them use.

Shapes: N rows, X width of the input.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

FIELD_EPS = 0.01
"""Added to the variance of a field. Ids with little data have short embeddings on purpose (`layers.LEARNED_EPS`); with
the usual 1e-5 a field norm would blow them up to the size of a well-known id's."""


class Interaction(nn.Module):
    """(N, X) -> (N, out_features)."""

    out_features: int

    def __call__(self, x_NX: Tensor) -> Tensor:
        """`nn.Module.__call__`, with its type."""
        return super().__call__(x_NX)


class FieldNorm(nn.Module):
    """LayerNorm of every field by itself, with one gain and bias an element.

    Neighbouring fields of one width are normalised in one call.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.runs = [(len(list(same)), width) for width, same in itertools.groupby(widths)]
        self.weight = nn.Parameter(torch.ones(sum(widths)))
        self.bias = nn.Parameter(torch.zeros(sum(widths)))

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        parts = x_NX.split([count * width for count, width in self.runs], -1)
        normed = [
            functional.layer_norm(part.unflatten(-1, run), run[-1:], eps=FIELD_EPS).flatten(-2)
            for part, run in zip(parts, self.runs, strict=True)
        ]
        return torch.cat(normed, -1) * self.weight + self.bias
