"""What the study compares: feature interactions, and the ranker with one part taken out or replaced.

An ablation replaces a class of `model.ranker` in the process that trains it, so the model itself carries no switches.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import model.ranker
from model.config import Recipe, laptop
from model.data import Batch
from model.interactions import sizes as s
from model.interest import ContentVectors, Interest
from model.transact import TransAct

FULL = "full"


def interactions() -> dict[str, Recipe]:
    """Every interaction in place of the default's, at sizes for two cores; the paper's baseline comes first."""
    chosen: dict[str, s.Sizes] = {
        "stacked DCNv2, 4": s.StackedDCN(4),
        "stacked DCNv2, 8": s.StackedDCN(8),
        "parallel DCNv2, 2 x 4": s.ParallelDCN(2, 4),
        "low-rank DCNv2 with ReLU": s.LowRankDCN(4, 32),
        "transformer": s.Transformer(tokens=4, width=32, multiplier=4, layers=2),
        "FinalMLP": s.FinalMLP((64, 64), gate=32, heads=4, outputs=64),
        "GDCN": s.GDCN(4),
        "SDCNv3": s.SDCNv3(2, 2),
        "DeepLight": s.DeepLight(8, 4, (64, 64)),
        "DHEN": s.DHEN(2, 3, 0.5, 64),
        "parallel MaskNet, then DCNv2 (default)": laptop().ranker.interaction,
    }
    base = laptop()
    return {name: replace(base, ranker=replace(base.ranker, interaction=sizes)) for name, sizes in chosen.items()}


def ladder() -> dict[str, Recipe]:
    """The steps from no sequence to the whole model."""
    names = [name for name in PATCHES if name != FULL]
    no_mask = replace(laptop(), train=replace(laptop().train, time_window_hours=0.0))
    return dict.fromkeys(names, laptop()) | {"without the time mask": no_mask, FULL: laptop()}


class NoSequence(TransAct):
    """Nothing of the sequence."""

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        return cand_NC.new_zeros(len(cand_NC), self.out_features)


class AveragePool(TransAct):
    """The mean of the actions' tokens."""

    def __init__(self, action_width: int, candidate_width: int, *sizes: float) -> None:
        super().__init__(action_width, candidate_width, *sizes)  # type: ignore[arg-type]
        self.pool = nn.Linear(action_width, self.out_features)

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        mean_BH = (hist_BLH * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        return self.pool(mean_BH).index_select(0, request_of_row)


class NoFusion(TransAct):
    """The candidate is not part of the tokens."""

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        return super().forward(hist_BLH, torch.zeros_like(cand_NC), mask_BL, request_of_row)


class NoTypes(TransAct):
    """Actions are their items: neither type nor age."""

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        kind = hist_BLH.shape[-1] - cand_NC.shape[-1]
        only_BLH = torch.cat([torch.zeros_like(hist_BLH[..., :kind]), hist_BLH[..., kind:]], -1)
        return super().forward(only_BLH, cand_NC, mask_BL, request_of_row)


class PlainTransformer(NoTypes):
    """Items alone, and no candidate (TransAct, Table 3)."""

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        return super().forward(hist_BLH, torch.zeros_like(cand_NC), mask_BL, request_of_row)


class NoMaxPool(TransAct):
    """The first K outputs alone."""

    def __init__(self, *sizes: float) -> None:
        super().__init__(*sizes)  # type: ignore[arg-type]
        kept = self.first * self.width
        self.summary.register_forward_pre_hook(
            lambda _, given: nn.functional.pad(given[0][..., :kept], (0, self.width))
        )


class LateFusion(TransAct):
    """BST (arXiv 1905.06874): the candidate is one more token of the sequence, not a part of each."""

    def __init__(self, action_width: int, candidate_width: int, layers: int, ffn: int, *sizes: float) -> None:
        super().__init__(action_width, candidate_width, layers, ffn, *sizes)  # type: ignore[arg-type]
        width = action_width
        self.into = nn.Linear(candidate_width, width)
        layer = nn.TransformerEncoderLayer(width, 1, ffn, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.pool = nn.Linear(2 * width, self.out_features)

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        tokens = torch.cat([self.into(cand_NC)[:, None], hist_BLH.index_select(0, request_of_row)], 1)
        real = torch.nn.functional.pad(mask_BL.index_select(0, request_of_row), (1, 0), value=True)
        out = self.encoder(tokens, src_key_padding_mask=~real)
        mean = (out * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.pool(torch.cat([out[:, 0], mean], -1))


class NoContent(ContentVectors):
    """No content vectors at all: ids, statistics and the sequence."""

    def forward(self, batch: Batch) -> Interest:
        return Interest(*(torch.zeros_like(part) for part in vars(super().forward(batch)).values()))


class NoLongTerm(ContentVectors):
    """No batch user vector."""

    def forward(self, batch: Batch) -> Interest:
        found = super().forward(batch)
        signals = found.signals_NS.clone()
        signals[:, 1] = 0
        return replace(found, batch_BC=torch.zeros_like(found.batch_BC), signals_NS=signals)


class NoMoment(ContentVectors):
    """No interest folded in from the history."""

    def forward(self, batch: Batch) -> Interest:
        found = super().forward(batch)
        signals = found.signals_NS.clone()
        signals[:, [0, 3, 4]] = 0
        return replace(found, now_BC=torch.zeros_like(found.now_BC), signals_NS=signals)


def _sequence(kind: type[TransAct]) -> Callable[[], None]:
    return lambda: setattr(model.ranker, "TransAct", kind)


def _content(kind: type[ContentVectors]) -> Callable[[], None]:
    return lambda: setattr(model.ranker, "ContentVectors", kind)


PATCHES: dict[str, Callable[[], None]] = {
    "no sequence": _sequence(NoSequence),
    "average pool": _sequence(AveragePool),
    "plain transformer": _sequence(PlainTransformer),
    "BST-like": _sequence(LateFusion),
    "without early fusion": _sequence(NoFusion),
    "without action types": _sequence(NoTypes),
    "without max-pool": _sequence(NoMaxPool),
    "without content vectors": _content(NoContent),
    "without long-term interest": _content(NoLongTerm),
    "without interest at the moment": _content(NoMoment),
    FULL: lambda: None,
}
