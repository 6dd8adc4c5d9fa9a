"""TransAct: a transformer over a user's recent actions, fused with the candidate (arXiv 2306.00248).

Every token of the sequence is [action ; candidate], so a naive layer does its projections for every pair of a
candidate and an action. Nothing here is approximate, but much is done once a request instead:

- Attention logits are (x_l W_q + b_q) . (x_m W_k) = (x_l M + c) . x_m with M = W_q W_k', c = b_q W_k': one product of
  weights and one projection a layer instead of two. The same for values: W_v W_o is one projection.
- In the first layer x_l = [h_l ; c_n], so the logits are S_lm + o_nm plus terms that are the same for every m and
  cancel in the softmax: S is the request's, o_nm takes one dot product a pair. For the same reason keys have no bias.
- exp(S_lm + o_nm) = exp(S_lm) exp(o_nm), so in inference the first layer has no softmax over N x L x L, and the
  attention of all candidates of a request is one matrix product.
- In inference, requests with histories of similar length go together and none computes more padding than its group.

Shapes: B requests, N candidates, L actions (newest first), M actions as keys, H action token width, C candidate width,
E = H + C, K kept outputs, S summary width. `request_of_row` (N) maps candidates to requests; `mask_BL` is True for
real actions. No positional encoding, as in the paper (its Table 10: positions make it worse).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.gemm import eager, linear

CHUNK = 200_000
"""Numbers in one activation of a chunk of inference: with its neighbours it stays in a core's second-level cache."""
SAFE = 1e-20
"""Smallest denominator with which the factorised softmax is exact: what underflows then is below rounding."""


class Feedforward(nn.Module):
    """Second half of a post-norm transformer layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x_NLE: Tensor) -> Tensor:
        """Norm, two linear layers with ReLU, residual, norm."""
        x_NLE = self.norm1(x_NLE)
        hidden = F.relu(linear(x_NLE, self.up.weight, self.up.bias))
        return self.norm2(x_NLE + linear(hidden, self.down.weight, self.down.bias))


def hiding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to hide padding."""
    # Finite, not -inf: a row without any action must give numbers (which nobody reads), not NaN. A quarter of the
    # smallest number, so that adding to it cannot overflow.
    return (~mask).to(dtype) * (torch.finfo(dtype).min / 4)


class Folded(NamedTuple):
    """The two projections of an attention."""

    logit_EE: Tensor
    logit_E: Tensor
    value_EE: Tensor
    value_E: Tensor


class SelfAttention(nn.Module):
    """Single-head self-attention with its residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # No bias in the key: it adds the same to every logit of a query, which the softmax takes out again.
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def folded(self) -> Folded:
        """The products of weights, which are small beside any batch."""
        scale = 1 / math.sqrt(self.query.in_features)
        logit_EE = self.key.weight.T @ self.query.weight * scale
        logit_E = self.query.bias @ self.key.weight * scale
        return Folded(logit_EE, logit_E, self.out.weight @ self.value.weight, self.out(self.value.bias))

    def forward(self, x_NLE: Tensor, mask_NL: Tensor | None, folded: Folded) -> Tensor:
        """(N, L, E) -> (N, L, E); no mask where all actions are real."""
        logits_NLL = linear(x_NLE, folded.logit_EE, folded.logit_E) @ x_NLE.transpose(1, 2)
        if mask_NL is not None:
            logits_NLL = logits_NLL + hiding(mask_NL, logits_NLL.dtype)[:, None]
        return x_NLE + linear(torch.softmax(logits_NLL, -1) @ x_NLE, folded.value_EE, folded.value_E)


@dataclass(frozen=True)
class Halves:
    """The first layer's part that no candidate changes, and the part that no action changes."""

    token_BLE: Tensor  # actions, zeros in place of the candidate
    shared_BLM: Tensor  # logits, masked
    value_BLE: Tensor
    query_NH: Tensor  # its dot product with an action is the candidate's own logit
    token_NE: Tensor  # zeros in place of the action, candidate
    value_NE: Tensor

    def rows(self, start: int, stop: int) -> "Halves":
        """Some of the candidates."""
        parts = (self.query_NH[start:stop], self.token_NE[start:stop], self.value_NE[start:stop])
        return Halves(self.token_BLE, self.shared_BLM, self.value_BLE, *parts)


class FusedAttention(SelfAttention):
    """The same attention over [action ; candidate] tokens, its two halves apart for as long as they can be."""

    def __init__(self, action_width: int, candidate_width: int) -> None:
        super().__init__(action_width + candidate_width)
        self.action_width = action_width

    def halves(self, action_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, folded: Folded) -> Halves:
        """All that is done once a request or once a candidate."""
        h, (logit_EE, logit_E, value_EE, value_E) = self.action_width, folded
        shared_BLM = linear(action_BLH, logit_EE[:h, :h], logit_E[:h]) @ action_BLH.transpose(1, 2)
        return Halves(
            F.pad(action_BLH, (0, cand_NC.shape[-1])),
            shared_BLM + hiding(mask_BL, shared_BLM.dtype)[:, None],
            linear(action_BLH, value_EE[:, :h]),
            linear(cand_NC, logit_EE[:h, h:]),
            F.pad(cand_NC, (h, 0)),
            linear(cand_NC, value_EE[:, h:], value_E),
        )

    def fused(self, halves: Halves, request_of_row: Tensor) -> Tensor:
        """(N, L, E), equal to `forward` of the concatenated tokens."""
        each = (halves.token_BLE, halves.shared_BLM, halves.value_BLE)
        token_NLE, shared_NLM, value_NLE = (x.index_select(0, request_of_row) for x in each)
        own_NM = (token_NLE[..., : self.action_width] @ halves.query_NH[..., None]).squeeze(-1)
        mixed_NLE = torch.softmax(shared_NLM + own_NM[:, None], -1) @ value_NLE
        return token_NLE + mixed_NLE + (halves.token_NE + halves.value_NE)[:, None]

    def factorised(self, halves: Halves, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        """`fused` for inference: exp(S_lm + o_nm) = exp(S_lm) exp(o_nm), the softmax's division after the product.

        Both exponents are at most 0, so nothing overflows; where their sum could underflow for all m, `fused` does it.
        """
        action_BLH = halves.token_BLE[..., : self.action_width]
        shared_BLM = _exponential(halves.shared_BLM)
        bias_BM = hiding(mask_BL, shared_BLM.dtype)
        if len(mask_BL) > 1:
            base_NLE, value_NLE = (x.index_select(0, request_of_row) for x in (halves.token_BLE, halves.value_BLE))
            shared_NLM, bias_NM = shared_BLM.index_select(0, request_of_row), bias_BM.index_select(0, request_of_row)
            own_NM = (base_NLE[..., : self.action_width] @ halves.query_NH[..., None]).squeeze(-1)
            own_NM = _exponential(own_NM + bias_NM)
            total_NL = (shared_NLM @ own_NM[..., None]).squeeze(-1)
            mixed_NLE = shared_NLM @ (own_NM[..., None] * value_NLE)
        else:  # one product for all candidates of the request: (L, M) @ (M, N E)
            base_NLE = halves.token_BLE
            own_NM = _exponential(halves.query_NH @ action_BLH[0].T + bias_BM)
            total_NL = own_NM @ shared_BLM[0].T
            value_NEM = own_NM[:, None] * halves.value_BLE[0].T.contiguous()
            mixed_LX = linear(shared_BLM[0], value_NEM.flatten(0, 1))
            mixed_NLE = mixed_LX.unflatten(1, value_NEM.shape[:2]).transpose(0, 1)
        if not total_NL.min() > SAFE:
            return self.fused(halves, request_of_row)
        base_NLE = base_NLE + (halves.token_NE + halves.value_NE)[:, None]
        return base_NLE.addcdiv_(mixed_NLE, total_NL[..., None])


def _exponential(logits: Tensor) -> Tensor:
    return torch.exp(logits - logits.amax(-1, keepdim=True))


class TransAct(nn.Module):
    """The sequence model: fused first layer, further layers, first K outputs and max-pool, projected to S numbers."""

    def __init__(
        self, action_width: int, candidate_width: int, layers: int, ffn: int, first: int, summary: int, dropout: float
    ) -> None:
        super().__init__()
        self.width = width = action_width + candidate_width
        self.first = first
        self.fuse = FusedAttention(action_width, candidate_width)
        self.attend = nn.ModuleList(SelfAttention(width) for _ in range(layers - 1))
        self.feed = nn.ModuleList(Feedforward(width, ffn) for _ in range(layers))
        self.no_history = nn.Parameter(torch.zeros(width))
        self.summary = nn.Linear((first + 1) * width, summary)
        # Once, on the outcome: inside the layers a mask for every number of (N, L, E) takes a seventh of a step.
        self.dropout = nn.Dropout(dropout)
        self.out_features = summary

    def forward(self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor) -> Tensor:
        """Encode every candidate against its user's history; returns (N, S).

        Padded actions influence nothing: they are no keys, their outputs are zeroed among the first K and lose the
        max-pool. A user without actions gets zeros and a learned vector in place of the max-pool.
        """
        folded = [attention.folded() for attention in (self.fuse, *self.attend)]
        if self._plain(hist_BLH, cand_NC):
            halves = self.fuse.halves(hist_BLH, cand_NC, mask_BL, folded[0])
            x_NLE = self.fuse.fused(halves, request_of_row)
            return self._rest(x_NLE, mask_BL.index_select(0, request_of_row), folded)
        out_NS = self.summary(F.pad(self.no_history, (self.first * self.width, 0))).repeat(len(cand_NC), 1)
        for rows, part_NS in self._chunks(hist_BLH, cand_NC, mask_BL, request_of_row, folded):
            out_NS[rows] = part_NS
        return out_NS

    def _plain(self, hist_BLH: Tensor, cand_NC: Tensor) -> bool:
        # Chunks have sizes that depend on the data: no gradients, no graphs, and not on a GPU, which would wait.
        if self.training or torch.is_grad_enabled() or not eager(hist_BLH):
            return True
        # Of a few candidates even all padding costs less than sorting them.
        return 4 * len(cand_NC) * hist_BLH.shape[1] * self.width <= CHUNK

    def _rest(self, x_NLE: Tensor, mask_NL: Tensor | None, folded: list[Folded]) -> Tensor:
        return self.outcome(self.further(self.feed[0](x_NLE), mask_NL, folded), mask_NL)

    def further(self, x_NLE: Tensor, mask_NL: Tensor | None, folded: list[Folded]) -> Tensor:
        """The layers behind the first."""
        for attend, fold, feed in zip(self.attend, folded[1:], self.feed[1:], strict=True):
            x_NLE = feed(attend(x_NLE, mask_NL, fold))
        return x_NLE

    def outcome(self, x_NLE: Tensor, mask_NL: Tensor | None) -> Tensor:
        """The first K outputs and the max-pool, projected; (N, S)."""
        first_NKE = x_NLE[:, : self.first]
        if mask_NL is None:
            pooled_NE = x_NLE.amax(1)
        else:
            first_NKE = first_NKE * mask_NL[:, : self.first, None]
            pooled_NE = (x_NLE + hiding(mask_NL, x_NLE.dtype)[..., None]).amax(1)
            pooled_NE = torch.where(mask_NL.any(1, keepdim=True), pooled_NE, self.no_history.to(pooled_NE.dtype))
        first_NKE = F.pad(first_NKE, (0, 0, 0, self.first - first_NKE.shape[1]))
        return self.dropout(self.summary(torch.cat([first_NKE.flatten(1), pooled_NE], -1)))

    def _chunks(
        self, hist_BLH: Tensor, cand_NC: Tensor, mask_BL: Tensor, request_of_row: Tensor, folded: list[Folded]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and their outputs, of requests with a history, those with similar length together."""
        length_B = (mask_BL * torch.arange(1, mask_BL.shape[1] + 1)).amax(1)
        order_B = length_B.argsort(descending=True, stable=True)
        place_N = order_B.argsort()[request_of_row]
        order_N = place_N.argsort(stable=True)
        count_B = torch.bincount(place_N, minlength=len(order_B))
        for start, stop, first, last, length in self._groups(length_B[order_B].tolist(), count_B.tolist()):
            requests, rows = order_B[start:stop], order_N[first:last]
            mask, local = mask_BL[requests, :length], place_N[rows] - start
            halves = self.fuse.halves(hist_BLH[requests, :length], cand_NC[rows], mask, folded[0])
            step, all_real = self._fit(length), bool(mask.all())
            for i in range(0, len(rows), step):
                part = local[i : i + step]
                x_NLE = self.fuse.factorised(halves.rows(i, i + step), mask, part)
                each = None if all_real else mask.index_select(0, part)
                yield rows[i : i + step], self._rest(x_NLE, each, folded)

    def _groups(self, lengths: list[int], counts: list[int]) -> Iterator[tuple[int, int, int, int, int]]:
        """(first request, past the last, first row, past the last, longest history); requests longest first."""
        start = row = 0
        while start < len(lengths) and lengths[start]:
            stop, last, fit = start + 1, row + counts[start], self._fit(lengths[start])
            # A request with enough candidates goes alone: its attention is then one matrix product.
            if 4 * counts[start] < fit:
                while stop < len(lengths) and lengths[stop] and last + counts[stop] - row <= fit:
                    last, stop = last + counts[stop], stop + 1
            if last > row:
                yield start, stop, row, last, lengths[start]
            start, row = stop, last

    def _fit(self, length: int) -> int:
        return max(1, CHUNK // (length * self.width))
