"""The input fields of the ranker: hashed features and numbers, each level by itself.

Shapes: N rows (requests or candidates), W hashed columns, D embedding width, G features, F numeric columns,
... any leading dimensions.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from engagement.table import Feature
from model.data import numeric_statistics, quantiles
from model.layers import LEARNED_EPS, NumericNorm, l2_normalise, pool_values

START_LENGTH = 0.08  # of a feature's fallback vector


class Hashed(nn.Module):
    """The hashed features of one level: pooled over their columns, L2-normalised, concatenated."""

    owner: Tensor

    def __init__(self, features: tuple[Feature, ...], dim: int) -> None:
        super().__init__()
        self.widths = [f.width for f in features]
        self.field_widths = [dim] * len(features)
        # What an id counts as that training never saw. Learned from ids that training hides.
        self.fallback = nn.Parameter(torch.randn(len(features), dim) * (START_LENGTH * dim**-0.5))
        owner = [g for g, width in enumerate(self.widths) for _ in range(width)]
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long), persistent=False)

    def vectors(self, values_NWD: Tensor, ids_NW: Tensor) -> Tensor:
        """(N, W, D) found in the table -> the vectors of the ids: fallback and difference, zero where no value is."""
        return (values_NWD + self.fallback[self.owner]) * (ids_NW != 0)[..., None]

    def forward(self, vectors_NWD: Tensor, ids_NW: Tensor) -> Tensor:
        """(N, W, D) and (N, W) -> (N, G * D)."""
        if not self.widths:
            return vectors_NWD.flatten(-2)
        parts = zip(vectors_NWD.split(self.widths, -2), ids_NW.split(self.widths, -1), strict=True)
        pooled = [pool_values(v, i != 0) if v.shape[-2] > 1 else v.squeeze(-2) for v, i in parts]
        return l2_normalise(torch.stack(pooled, -2), LEARNED_EPS).flatten(-2)


class Numeric(nn.Module):
    """The unhashed features of one level: numbers standardised, embeddings L2-normalised and projected down."""

    columns: Tensor

    def __init__(self, features: tuple[Feature, ...], dim: int) -> None:
        super().__init__()
        ends = list(itertools.accumulate(f.width for f in features))
        spans = [(f, end - f.width, end) for f, end in zip(features, ends, strict=True)]
        numbers = [start for f, start, _ in spans if f.kind == "numeric"]
        self.register_buffer("columns", torch.tensor(numbers, dtype=torch.long), persistent=False)
        self.norm = NumericNorm(len(numbers))
        self.spans = [(start, end) for f, start, end in spans if f.kind == "embedding"]
        widths = [end - start for start, end in self.spans]
        self.project = nn.ModuleList(nn.Linear(width, min(width, dim), bias=False) for width in widths)
        self.field_widths = [self.norm.out_features] * bool(numbers) + [min(width, dim) for width in widths]

    def fit(self, columns_RF: np.ndarray) -> None:
        """Take the statistics of the numeric columns."""
        columns = self.columns.cpu().numpy()
        self.norm.fit(*numeric_statistics(columns_RF, columns), quantiles(columns_RF, columns, self.norm.KNOTS))

    def forward(self, x_F: Tensor) -> Tensor:
        """(..., F) -> (..., out_features)."""
        return torch.cat([self.norm(x_F.index_select(-1, self.columns)), *self.embeddings(x_F)], -1)

    def embeddings(self, x_F: Tensor) -> Iterator[Tensor]:
        """The embeddings, projected."""
        for (start, end), project in zip(self.spans, self.project, strict=True):
            # A missing embedding is NaN throughout; it becomes the zero vector.
            yield project(l2_normalise(torch.nan_to_num(x_F[..., start:end], 0.0, 0.0, 0.0)))
