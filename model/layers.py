"""Small layers that the ranker is made of.

Shapes: N rows, F features, D embedding width, X width of the crossed vector, ... any leading dimensions.
"""

import torch
from torch import Tensor, nn


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension to length one; a zero vector stays zero and has a finite gradient.

    (`torch.nn.functional.normalize` divides the gradient of a near-zero vector by 1e-12.) A vector much shorter than
    `eps ** 0.5` stays short: see `LEARNED_EPS`.
    """
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


LEARNED_EPS = 0.1
"""`eps` for rows of the embedding table. A row starts with length 0.08 and grows as it is trained, so an id with little
data stays near zero; with a hard normalisation its random start would count as much as a well-known id."""


def pool_values(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the second last dimension of the values that are present; zero where none is.

    Args:
        values: (..., W, D), zero where a value is missing.
        present: (..., W) bool.
    """
    count = present.sum(-1, keepdim=True).clamp(min=1)
    return values.sum(-2) / count


class NumericNorm(nn.Module):
    """Standardises numeric columns with statistics that travel with the model.

    A missing value (NaN) becomes 0, the mean, and raises an indicator. The indicator of a column that was always
    present in training stays 0: its weights were never trained, so it must not speak when a value goes missing later.
    """

    mean: Tensor
    std: Tensor
    sometimes_missing: Tensor
    LIMIT = 5.0  # standard deviations beyond which a value is cut: one broken upstream number must not rule a score

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("sometimes_missing", torch.zeros(width))

    @property
    def out_features(self) -> int:
        """Width of the output: every column and its indicator."""
        return 2 * len(self.mean)

    def fit(self, mean: Tensor, std: Tensor, sometimes_missing: Tensor) -> None:
        """Set the statistics, each of shape (F,). A column that is constant keeps scale 1."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
        self.sometimes_missing.copy_(sometimes_missing)

    def forward(self, x_F: Tensor) -> Tensor:
        """(..., F) with NaN for missing -> (..., 2F)."""
        missing = ~torch.isfinite(x_F)
        z = ((x_F - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)
        z = torch.where(missing, torch.zeros_like(z), z)
        return torch.cat([z, missing * self.sometimes_missing], -1)


class CrossStack(nn.Module):
    """Stacked full-rank DCNv2 crosses: x_{i+1} = x_0 * (W_i x_i + b_i) + x_i (Wang et al. 2021, arXiv 2008.13535)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.out_features = width
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x0_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        x_NX = x0_NX
        for layer in self.layers:
            x_NX = x0_NX * layer(x_NX) + x_NX
        return x_NX


def mlp(width: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Linear, ReLU and dropout for every hidden width."""
    parts: list[nn.Module] = []
    for size in hidden:
        parts += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*parts)
