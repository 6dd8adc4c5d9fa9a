"""Optimisers: row-wise Adagrad for the embedding table, AdamW for everything else, one schedule for both."""

import math

import torch
from torch import Tensor, nn

from model.config import TrainConfig


class RowAdagrad:
    """Row-wise Adagrad (one accumulator a row, as in FBGEMM's `EXACT_ROWWISE_ADAGRAD`) on a sparse gradient.

    Only rows that the batch looked up change, and only theirs accumulators.

    Attributes:
        sums: (rows,) float32: sum over steps of the mean squared gradient of each row.
    """

    EPS = 1e-8

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.sums = torch.zeros(weight.shape[0], device=weight.device)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply and clear the gradient."""
        gradient = self.weight.grad
        if gradient is None:
            return
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        sums = self.sums.index_select(0, rows) + values.square().mean(1)
        self.sums.index_copy_(0, rows, sums)
        self.weight.index_add_(0, rows, values / (sums.sqrt() + self.EPS)[:, None], alpha=-lr)
        self.weight.grad = None


def dense_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on all but the table; matrices decay, biases and norms do not."""
    dense = dense_parameters(model)
    groups = [
        {"params": [p for p in dense.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in dense.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters but the embedding table, by name."""
    return {name: p for name, p in model.named_parameters() if name != "table.weight"}


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to zero."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
