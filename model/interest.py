"""What the content vectors say about a batch: the user's interest, long-term and at this moment, beside each candidate.

The vectors are learned before training (`model/content.py`) and not moved by it. In training a request reads the
version that was known before it; a trained ranker keeps the final version alone.

Shapes: B requests, N candidates, L actions, A action types, C vector width, V versions, I items, U users, S signals.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engagement.errors import EvergreenError
from model.content import ALWAYS, VERSIONED, Content, fold_in
from model.data import Batch, action_types
from model.layers import NumericNorm

SIGNALS = 5
_NOBODY = -1  # no id's hash


@dataclass(frozen=True)
class Interest:
    """Content vectors of a batch, zero where unknown.

    Attributes:
        batch_BC: The user's long-term interest, as of the version.
        now_BC: The user's interest by the history that the request sees.
        item_NC: The candidates.
        history_BLC: The items of the history.
        signals_NS: For each candidate: its match with `now_BC`, its match with `batch_BC`, its bias, the user's level,
            and the factorisation's own prediction (match now + bias + level).
    """

    batch_BC: Tensor
    now_BC: Tensor
    item_NC: Tensor
    history_BLC: Tensor
    signals_NS: Tensor


class ContentVectors(nn.Module):
    """The versions of all content vectors, looked up by id.

    Args:
        dim: C.
        item_column: Column of the candidates' ids among the hashed candidate columns.
        user_column: Column of the user's id among the hashed request columns.
        actions: A.
    """

    since: Tensor
    item_keys: Tensor
    item_VIC: Tensor
    bias_VI: Tensor
    user_keys: Tensor
    user_VUC: Tensor
    mean_V: Tensor
    values_A: Tensor

    def __init__(self, dim: int, item_column: int, user_column: int, actions: int) -> None:
        super().__init__()
        self.item_column, self.user_column = item_column, user_column
        self.norm = NumericNorm(SIGNALS)
        self.set(
            Content(
                since=np.array([ALWAYS]),
                item_keys=np.array([_NOBODY]),
                item_VIC=np.zeros((1, 1, dim), np.float32),
                bias_VI=np.zeros((1, 1), np.float32),
                user_keys=np.array([_NOBODY]),
                user_VUC=np.zeros((1, 1, dim), np.float32),
                mean_V=np.zeros(1, np.float32),
                values_A=np.zeros(actions, np.float32),
            )
        )

    @property
    def out_features(self) -> int:
        """Width of the normed signals."""
        return self.norm.out_features

    def set(self, content: Content) -> None:
        """Hold these vectors; they are stored by `state`, not by `state_dict`."""
        device = self.norm.mean.device
        for name, array in vars(content).items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)).to(device), persistent=False)

    def state(self) -> dict[str, Tensor]:
        """The final version, by name of the buffer."""
        last = {n: getattr(self, n)[-1:] for n in VERSIONED}
        return last | {n: getattr(self, n) for n in ("item_keys", "user_keys", "values_A")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            EvergreenError: The vectors are of another width or for other actions.
        """
        if any(tensors[n].shape[-1] != getattr(self, n).shape[-1] for n in ("item_VIC", "user_VUC", "values_A")):
            raise EvergreenError("the content vectors have another width than the ranker", "Train again from scratch")
        arrays = {n: t.cpu().numpy() for n, t in tensors.items()}
        self.set(Content(since=np.array([ALWAYS]), **arrays))

    @torch.no_grad()
    def forward(self, batch: Batch) -> Interest:
        """Look up and fold in; no gradient goes through."""
        version_B = torch.searchsorted(self.since, batch.time_B, right=True) - 1
        row = batch.request_of_row
        item_NC, bias_N = self._items(batch.item_ids_NW[:, self.item_column], version_B[row])
        history_BLC, bias_BL = self._items(batch.history_ids_BL, version_B[:, None])
        place_B, known_B = _find(self.user_keys, batch.request_ids_BW[:, self.user_column])
        batch_BC = self.user_VUC[version_B, place_B] * known_B[:, None]
        types_BLA = action_types(batch.history_bits_BL, len(self.values_A))
        # All that was known, also what training hides from the sequence: evaluation must see the same numbers.
        now_BC, level_B = fold_in(
            history_BLC, bias_BL, types_BLA, batch.history_mask_BL, self.mean_V[version_B], self.values_A
        )
        now_N, long_N = (item_NC * now_BC[row]).sum(-1), (item_NC * batch_BC[row]).sum(-1)
        level_N = level_B[row]
        signals_NS = torch.stack([now_N, long_N, bias_N, level_N, now_N + bias_N + level_N], -1)
        return Interest(batch_BC, now_BC, item_NC, history_BLC, signals_NS)

    def _items(self, ids: Tensor, version: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (..., C) and biases (...) at the versions, which broadcast against the ids."""
        place, known = _find(self.item_keys, ids)
        return self.item_VIC[version, place] * known[..., None], self.bias_VI[version, place] * known


def _find(keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each id among the keys, and whether it is there. A hidden id is found: content is what it leaves."""
    ids = ids.abs()
    place = torch.searchsorted(keys, ids).clamp(max=len(keys) - 1)
    return place, keys[place] == ids
