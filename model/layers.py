"""Small layers that the ranker is made of.

Shapes: N rows, F features, D embedding width, X width of the crossed vector, A actions, ... any leading dimensions.
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
    """Standardises numeric columns, and gives their place among the training values, by statistics of the model.

    The place (a piecewise linear distribution function over `KNOTS` quantiles, from -1 to 1) tells values of a skewed
    column apart where most of them are, as the splits of a tree do (Gorishniy et al. 2022, arXiv 2203.05556).

    A missing value (NaN) becomes 0, the mean, and raises an indicator. The indicator of a column that was always
    present in training stays 0: its weights were never trained, so it must not speak when a value goes missing later.
    """

    mean: Tensor
    std: Tensor
    sometimes_missing: Tensor
    knots: Tensor
    KNOTS = 17
    LIMIT = 5.0  # standard deviations beyond which a value is cut: one broken upstream number must not rule a score

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("sometimes_missing", torch.zeros(width))
        self.register_buffer("knots", torch.zeros(width, self.KNOTS))

    @property
    def out_features(self) -> int:
        """Width of the output: every column, its place and its indicator."""
        return 3 * len(self.mean)

    def fit(self, mean: Tensor, std: Tensor, sometimes_missing: Tensor, knots_FK: Tensor) -> None:
        """Set the statistics, (F,) each, and the quantiles, ascending. A column that is constant keeps scale 1."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
        self.sometimes_missing.copy_(sometimes_missing)
        self.knots.copy_(knots_FK)

    def forward(self, x_F: Tensor) -> Tensor:
        """(..., F) with NaN for missing -> (..., 3F)."""
        missing = ~torch.isfinite(x_F)
        z = ((x_F - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)
        gap_FK = (self.knots[:, 1:] - self.knots[:, :-1]).clamp(min=1e-6)
        place = 2 * ((x_F[..., None] - self.knots[:, :-1]) / gap_FK).clamp(0, 1).mean(-1) - 1
        both = torch.cat([z, place], -1)
        both = torch.where(torch.cat([missing, missing], -1), torch.zeros_like(both), both)
        return torch.cat([both, missing * self.sometimes_missing], -1)


class Calibrated(nn.Module):
    """Probabilities of the heads, Platt-scaled by numbers that `model/calibration.py` fits after training.

    Computed in float64, rounded once: two logits may become one float32, but never change their order.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(heads, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(heads, dtype=torch.float64))

    def reset(self) -> None:
        """Back to the plain sigmoid."""
        self.scale.fill_(1.0)
        self.shift.zero_()

    def forward(self, logits_NA: Tensor) -> Tensor:
        """(N, A) logits -> (N, A) float32."""
        return torch.sigmoid(logits_NA.double() * self.scale + self.shift).float()


def mlp(width: int, hidden: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU and, where there is any, dropout for every hidden width."""
    parts: list[nn.Module] = []
    for size in hidden:
        parts += [nn.Linear(width, size), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        width = size
    return nn.Sequential(*parts)
