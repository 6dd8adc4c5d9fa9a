"""What a module costs: parameters and floating-point operations."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(module: nn.Module) -> int:
    """Trained numbers of the module."""
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, width: int) -> int:
    """Floating-point operations for one row (1, width), forward.

    Matrix products count, two operations a multiply-add; elementwise work and norms don't. Nothing is computed: the
    module is copied to the meta device.
    """
    shapes_only = copy.deepcopy(module).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes_only(torch.empty(1, width, device="meta"))
    return counter.get_total_flops()
