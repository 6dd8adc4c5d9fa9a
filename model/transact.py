"""TransAct: a transformer over a user's recent actions, fused with the candidate (arXiv 2306.00248).

Every token of the sequence is [action ; candidate], so a naive layer does its projections for every pair of a
candidate and an action. But the projections are linear, so the action's half is computed once a request and the
candidate's half once a candidate, and of the attention logits (q_l + q_n) . (k_m + k_n) the terms with k_n are the
same for every m and cancel in the softmax. `FusedLayer` does exactly this; a test holds it to the naive layer.

Shapes: B requests, N candidates, L actions (newest first), H action token width, C candidate width, E = H + C,
K kept outputs, S summary width. `request_of_row` (N) maps candidates to requests; `mask_BL` is True for real actions.
No positional encoding, as in the paper (its Table 10: positions make it worse).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Feedforward(nn.Module):
    """Second half of a post-norm transformer layer."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NLE: Tensor) -> Tensor:
        """Norm, two linear layers with ReLU, residual, norm."""
        x_NLE = self.norm1(x_NLE)
        return self.norm2(x_NLE + self.down(F.relu(self.up(x_NLE))))


def _masked_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    # A finite floor, not -inf: a row without any action must give numbers (which nobody reads), not NaN.
    return torch.softmax(logits.masked_fill(~keep, torch.finfo(logits.dtype).min), dim=-1)


class SelfAttention(nn.Module):
    """Single-head self-attention over tokens that exist in full (every layer after the first)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # No bias in the key: it adds the same to every logit of a query, which the softmax takes out again.
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_NLE: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, E) -> (N, L, E), residual included."""
        logits = self.query(x_NLE) @ self.key(x_NLE).transpose(1, 2) / math.sqrt(x_NLE.shape[-1])
        return x_NLE + self.out(_masked_softmax(logits, mask_NL[:, None]) @ self.value(x_NLE))


class FusedAttention(SelfAttention):
    """The same attention over [action ; candidate] tokens, without ever building them before the softmax."""

    def __init__(self, action_width: int, candidate_width: int) -> None:
        super().__init__(action_width + candidate_width)
        self.action_width = action_width

    def fused(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        """(B, L, H) and (N, C) -> (N, L, E), equal to `forward` of the concatenated tokens."""
        h, scale = self.action_width, 1 / math.sqrt(self.query.in_features)
        wq, wk, wo = self.query.weight, self.key.weight, self.out.weight
        q_BLE = F.linear(hist_BLH, wq[:, :h], self.query.bias) * scale
        k_BLE = F.linear(hist_BLH, wk[:, :h])
        v_BLE = F.linear(F.linear(hist_BLH, self.value.weight[:, :h]), wo)
        hist_BLE = F.pad(hist_BLH, (0, cand_NC.shape[-1]))
        q_NE = F.linear(cand_NC, wq[:, h:]) * scale
        v_NE = F.linear(F.linear(cand_NC, self.value.weight[:, h:], self.value.bias), wo, self.out.bias)
        cand_NE = v_NE + F.pad(cand_NC, (h, 0))

        shared_BLL = q_BLE @ k_BLE.transpose(1, 2)
        # Masked once a request. The floor is finite so that a row without any action gives numbers, not NaN, and a
        # quarter of the smallest number so that adding the candidate's own logits cannot overflow.
        shared_BLL = shared_BLL.masked_fill(~mask_BL[:, None], torch.finfo(shared_BLL.dtype).min / 4)
        own_NL = (k_BLE.index_select(0, request_of_row) @ q_NE[..., None]).squeeze(-1)
        weights_NLL = torch.softmax(shared_BLL.index_select(0, request_of_row) + own_NL[:, None], -1)
        out_NLE = hist_BLE.index_select(0, request_of_row) + weights_NLL @ v_BLE.index_select(0, request_of_row)
        return out_NLE + cand_NE[:, None]


class TransAct(nn.Module):
    """The sequence model: fused first layer, further layers, first K outputs and max-pool, projected to S numbers."""

    def __init__(
        self, action_width: int, candidate_width: int, layers: int, ffn: int, first: int, summary: int, dropout: float
    ) -> None:
        super().__init__()
        width = action_width + candidate_width
        self.first = first
        self.fuse = FusedAttention(action_width, candidate_width)
        self.attend = nn.ModuleList(SelfAttention(width) for _ in range(layers - 1))
        self.feed = nn.ModuleList(Feedforward(width, ffn, dropout) for _ in range(layers))
        self.no_history = nn.Parameter(torch.zeros(width))
        self.summary = nn.Linear((first + 1) * width, summary)
        self.out_features = summary

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        """Encode every candidate against its user's history; returns (N, S).

        Padded actions influence nothing: they are no keys, their outputs are zeroed among the first K and lose the
        max-pool. A user without actions gets zeros and a learned vector in place of the max-pool.
        """
        mask_NL = mask_BL.index_select(0, request_of_row)
        x_NLE = self.feed[0](self.fuse.fused(hist_BLH, cand_NC, mask_BL, request_of_row))
        for attend, feed in zip(self.attend, self.feed[1:], strict=True):
            x_NLE = feed(attend(x_NLE, mask_NL))
        keep = mask_NL[..., None]
        first_NKE = x_NLE[:, : self.first] * keep[:, : self.first]
        pooled_NE = x_NLE.masked_fill(~keep, torch.finfo(x_NLE.dtype).min).amax(1)
        pooled_NE = torch.where(mask_NL.any(1, keepdim=True), pooled_NE, self.no_history.to(pooled_NE.dtype))
        return self.summary(torch.cat([first_NKE.flatten(1), pooled_NE], -1))
