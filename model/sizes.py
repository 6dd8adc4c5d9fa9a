"""Parameters and FLOPs of a configuration, on PyTorch's meta device: no memory, no time."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from engagement.table import TableSpec
from model.config import RankerConfig
from model.data import Batch
from model.optim import dense_parameters
from model.ranker import Ranker

CANDIDATES = 100  # of the one request for which FLOPs are counted; its history is full


@dataclass(frozen=True)
class Sizes:
    """How large a ranker is.

    Attributes:
        table: Parameters of the embedding table.
        dense: All other parameters.
        flops: Floating-point operations of a forward pass per candidate (a multiplication and an addition are two).
    """

    table: int
    dense: int
    flops: float


def sizes_of(config: RankerConfig, spec: TableSpec) -> Sizes:
    """Count the parameters of a ranker, and the FLOPs of one request."""
    with torch.device("meta"):
        ranker = Ranker(config, spec).eval()
        batch = _request(config, spec)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ranker(batch)
    dense = sum(p.numel() for p in dense_parameters(ranker).values())
    return Sizes(ranker.table.weight.numel(), dense, counter.get_total_flops() / CANDIDATES)


def _request(config: RankerConfig, spec: TableSpec) -> Batch:
    ids, history = torch.long, (1, config.history)
    return Batch(
        request_ids_BW=torch.zeros(1, spec.width("request", True), dtype=ids),
        request_num_BF=torch.zeros(1, spec.width("request", False)),
        item_ids_NW=torch.zeros(CANDIDATES, spec.width("candidate", True), dtype=ids),
        item_num_NF=torch.zeros(CANDIDATES, spec.width("candidate", False)),
        history_ids_BL=torch.zeros(history, dtype=ids),
        history_bits_BL=torch.zeros(history, dtype=ids),
        history_hours_BL=torch.zeros(history),
        history_mask_BL=torch.ones(history, dtype=torch.bool),
        history_visible_BL=torch.ones(history, dtype=torch.bool),
        time_B=torch.zeros(1, dtype=ids),
        request_of_row=torch.zeros(CANDIDATES, dtype=ids),
        rows=torch.zeros(CANDIDATES, dtype=ids),
        labels_NA=torch.zeros(CANDIDATES, len(spec.actions)),
        weight_N=torch.zeros(CANDIDATES),
    )
