"""The ranker in the form in which it is exported: the same function, arranged for one request with many candidates.

Nothing here is trained. What only a request determines is computed once a request, also inside linear layers of which
the candidate determines another part; tensors over actions and candidates have the candidates last, so that what is
added or multiplied along them is long.

Shapes: B requests, C candidates of each (padded), L actions (padded) as queries, M as keys, H width of an action,
E = width of an action beside a candidate, W hashed columns, F numeric columns, D embedding width, K quantiles, A
actions, V width of a content vector, S signals, X inputs of the interaction.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.fields import Numeric
from model.interactions.masknet import MaskBlock, ParallelMaskNet, ParallelMaskNetDCN
from model.layers import LEARNED_EPS, l2_normalise
from model.lookups import UNKNOWN
from model.ranker import Ranker
from model.transact import Feedforward, TransAct, hiding


def fixed(value: Tensor) -> Tensor:
    """A tensor that was computed of the trained ones, as a constant of the graph."""
    return value.detach().contiguous()


class ServableSequence(nn.Module):
    """`TransAct` over padded requests.

    The first layer's tensors are (B, L, E, C). Its two norms are taken apart: that their inputs have mean zero, their
    gains and their biases are moved into the weights around them.
    """

    def __init__(self, transact: TransAct) -> None:
        super().__init__()
        self.transact = transact
        fuse, feed = transact.fuse, cast(Feedforward, transact.feed[0])
        h, folded = fuse.action_width, fuse.folded()
        self.width = width = transact.width
        centre = torch.eye(width) - 1 / width
        self.eps1, self.eps2 = feed.norm1.eps, feed.norm2.eps
        gain, bias = feed.norm1.weight, feed.norm1.bias
        # Rows that compute the mean of the gained input, as relu(m) - relu(-m), and the constant one.
        ones = torch.zeros(1, width)
        self.up = fixed(torch.cat([feed.up.weight * gain, gain[None] / width, -gain[None] / width, ones]))
        self.up_bias = fixed(torch.cat([feed.up.bias + feed.up.weight @ bias, torch.tensor([0.0, 0.0, 1.0])])[:, None])
        mean = torch.ones(width, 1)
        down = [centre @ feed.down.weight, -mean, mean, (centre @ (feed.down.bias + bias))[:, None]]
        # A maximum does not commute with a negative gain: its sign goes before, its size behind.
        sign = torch.where(feed.norm2.weight < 0, -1.0, 1.0)[:, None]
        self.down = fixed(torch.cat(down, 1) * sign)
        self.gain1 = fixed(gain[:, None] * sign)
        self.gain2 = fixed(feed.norm2.weight[:, None].abs())
        self.bias2 = fixed(feed.norm2.bias[:, None])
        self.logit_HH = fixed(folded.logit_EE[:h, :h].T)
        self.logit_H = fixed(folded.logit_E[:h])
        self.query_HZ = fixed(folded.logit_EE[:h, h:])
        self.value_HE = fixed((centre @ folded.value_EE[:, :h]).T)
        self.token_HE = fixed(centre[:, :h].T)
        self.own_EZ = fixed(centre @ folded.value_EE[:, h:] + centre[:, h:])
        self.own_E = fixed((centre @ folded.value_E)[:, None])

    def forward(self, action_BLH: Tensor, cand_BCZ: Tensor, mask_BL: Tensor) -> Tensor:
        """Encode every candidate against its user's history; (B, C, S)."""
        # As a query, padding repeats the newest action, which changes no maximum.
        query_BLH = torch.where(mask_BL[..., None], action_BLH, action_BLH[:, :1])
        shared_BLM = (query_BLH @ self.logit_HH + self.logit_H) @ action_BLH.transpose(1, 2) + hiding(
            mask_BL, action_BLH.dtype
        )[:, None]
        cand_BZC = cand_BCZ.transpose(1, 2)
        own_BMC = action_BLH @ (self.query_HZ @ cand_BZC)
        logits_BLMC = shared_BLM[..., None] + own_BMC[:, None]
        weight_BLMC = torch.exp(logits_BLMC - logits_BLMC.amax(2, keepdim=True))
        value_BEM = (action_BLH @ self.value_HE).transpose(1, 2)
        x_BLEC = (value_BEM[:, None] @ weight_BLMC) * (1 / weight_BLMC.sum(2, keepdim=True))
        x_BLEC = x_BLEC + (query_BLH @ self.token_HE)[..., None] + (self.own_EZ @ cand_BZC + self.own_E)[:, None]
        x_BLEC = self._scaled(x_BLEC, self.eps1)
        up_BLGC = torch.relu(self.up @ x_BLEC + self.up_bias)
        x_BLEC = self._scaled(x_BLEC * self.gain1 + self.down @ up_BLGC, self.eps2)
        if not self.transact.attend:
            return self._outcome(x_BLEC, mask_BL)
        candidates = cand_BCZ.shape[1]
        x_NLE = (x_BLEC * self.gain2 + self.bias2).permute(0, 3, 1, 2).flatten(0, 1)
        mask_NL = mask_BL[:, None].expand(-1, candidates, -1).flatten(0, 1)
        folded = [attention.folded() for attention in (self.transact.fuse, *self.transact.attend)]
        out_NS = self.transact.outcome(self.transact.further(x_NLE, mask_NL, folded), mask_NL)
        return out_NS.unflatten(0, (-1, candidates))

    def _scaled(self, x_BLEC: Tensor, eps: float) -> Tensor:
        return x_BLEC * torch.rsqrt((x_BLEC * x_BLEC).mean(2, keepdim=True) + eps)

    def _outcome(self, x_BLEC: Tensor, mask_BL: Tensor) -> Tensor:
        transact, first = self.transact, self.transact.first
        pooled_BEC = x_BLEC.flatten(2).amax(1).unflatten(1, (self.width, -1)) * self.gain2 + self.bias2
        first_BKEC = (x_BLEC[:, :first] * self.gain2 + self.bias2) * mask_BL[:, :first, None, None]
        there_B = mask_BL[:, :1, None]
        pooled_BEC = torch.where(there_B, pooled_BEC, transact.no_history[:, None])
        weight_SX, split = transact.summary.weight, first * self.width
        return (
            weight_SX[:, :split] @ first_BKEC.flatten(1, 2)
            + weight_SX[:, split:] @ pooled_BEC
            + transact.summary.bias[:, None]
        ).transpose(1, 2)


class ServableMasks(nn.Module):
    """`ParallelMaskNet` of inputs of which the request has some and the candidate the others.

    The request's part of the masks' first layer, and the norm of its fields, are computed once.

    Args:
        masks: The trained module.
        of_request: For each of its fields, whether the request has it.
    """

    def __init__(self, masks: ParallelMaskNet, of_request: Sequence[bool]) -> None:
        super().__init__()
        self.blocks, self.project = [cast(MaskBlock, block) for block in masks.blocks], masks.project
        whose_X = torch.tensor(of_request).repeat_interleave(torch.tensor(masks.norm.widths))
        order_X = torch.cat([whose_X.nonzero()[:, 0], (~whose_X).nonzero()[:, 0]])  # the request's inputs first
        first, second = ([cast(nn.Linear, block.mask[i]) for block in self.blocks] for i in (0, 2))
        weight_HX = torch.cat([linear.weight for linear in first])
        self.request_HX, self.candidate_HX = fixed(weight_HX[:, whose_X]), fixed(weight_HX[:, ~whose_X])
        self.bias_H, self.hidden = fixed(torch.cat([linear.bias for linear in first])), first[0].out_features
        self.request_norm, self.candidate_norm = (
            masks.norm.part([given == own for given in of_request]) for own in (True, False)
        )
        self.expand = [(fixed(linear.weight[order_X]), fixed(linear.bias[order_X])) for linear in second]
        self.linear = [fixed(block.linear.weight[:, order_X]) for block in self.blocks]

    def forward(self, request_BX: Tensor, cand_BCX: Tensor) -> Tensor:
        """(B, X of the request) and (B, C, X of a candidate) -> (B * C, Y)."""
        each, cand_NX = (-1, cand_BCX.shape[1]), cand_BCX.flatten(0, 1)
        given_B1H = F.linear(request_BX, self.request_HX, self.bias_H)[:, None]
        hidden_NH = torch.relu((given_B1H + (cand_NX @ self.candidate_HX.T).unflatten(0, each)).flatten(0, 1))
        given_BCX = self.request_norm(request_BX)[:, None].expand(-1, cand_BCX.shape[1], -1)
        normed_NX = torch.cat([given_BCX.flatten(0, 1), self.candidate_norm(cand_NX)], -1)
        parts = zip(hidden_NH.split(self.hidden, -1), self.expand, self.linear, self.blocks, strict=True)
        found = [
            torch.relu(block.norm((F.linear(x_NH, *expand) * normed_NX) @ linear.T))
            for x_NH, expand, linear, block in parts
        ]
        return cast(Tensor, self.project(torch.cat(found, -1)))


class ServableNumbers(nn.Module):
    """`Numeric` of the candidates; the places among the quantiles are (B, F, K, C)."""

    def __init__(self, numeric: Numeric) -> None:
        super().__init__()
        self.numeric = numeric
        norm = numeric.norm
        self.limit = norm.LIMIT
        self.lowest_FK1 = fixed(norm.knots[:, :-1, None])
        self.steps_FK1 = fixed(1 / (norm.knots[:, 1:] - norm.knots[:, :-1]).clamp(min=1e-6)[..., None])

    def forward(self, x_BCF: Tensor) -> Tensor:
        """(B, C, F) -> (B, C, X)."""
        numeric, norm = self.numeric, self.numeric.norm
        x_BFC = x_BCF.index_select(-1, numeric.columns).transpose(1, 2)
        missing = ~torch.isfinite(x_BFC)
        z_BFC = ((x_BFC - norm.mean[:, None]) / norm.std[:, None]).clamp(-self.limit, self.limit)
        steps_BFKC = ((x_BFC[:, :, None] - self.lowest_FK1) * self.steps_FK1).clamp(0, 1)
        both = torch.cat([z_BFC, 2 * steps_BFKC.mean(2) - 1], 1)
        both = torch.where(torch.cat([missing, missing], 1), torch.zeros_like(both), both)
        normed = torch.cat([both, missing * norm.sometimes_missing[:, None]], 1).transpose(1, 2)
        return torch.cat([normed, *numeric.embeddings(x_BCF)], -1)


class Servable(nn.Module):
    """The ranker over padded requests, from rows of its compacted table to calibrated probabilities.

    Row 0 of the compacted table stands for "no value" and row 1 for an id that training never saw, both zero.
    """

    table: Tensor

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker
        self.sequence = ServableSequence(ranker.sequence)
        self.numbers = ServableNumbers(ranker._numeric("candidate"))
        user, item = (
            ranker._hashed(v).field_widths + ranker._numeric(v).field_widths for v in ("request", "candidate")
        )
        of_request = [True] * len(user) + [False] * len(item) + [True, True, False, False, False]
        found = ranker.interaction.masks if isinstance(ranker.interaction, ParallelMaskNetDCN) else ranker.interaction
        self.masks = ServableMasks(found, of_request) if isinstance(found, ParallelMaskNet) else None
        rows_RD = ranker.table.weight.detach()[ranker.seen.nonzero()[:, 0]]
        self.register_buffer("table", torch.cat([rows_RD.new_zeros(UNKNOWN + 1, rows_RD.shape[1]), rows_RD]))

    def forward(
        self,
        request_rows_BW2: Tensor,
        request_num_BF: Tensor,
        history_rows_BL2: Tensor,
        history_types_BLA: Tensor,
        history_hours_BL: Tensor,
        history_mask_BL: Tensor,
        history_vectors_BLV: Tensor,
        long_BV: Tensor,
        now_BV: Tensor,
        level_B: Tensor,
        item_rows_BCW2: Tensor,
        item_num_BCF: Tensor,
        item_vectors_BCV: Tensor,
        item_bias_BC: Tensor,
    ) -> Tensor:
        """(B, C, A) float32; what it computes is `Ranker.forward`, in another order."""
        ranker, (user, item) = self.ranker, (self.ranker._hashed(v) for v in ("request", "candidate"))
        given_BW, given_BCW = request_rows_BW2[..., 0], item_rows_BCW2[..., 0]  # row 0 is no value
        request_BX = torch.cat(
            [
                user(user.vectors(self._lookup(request_rows_BW2), given_BW), given_BW),
                ranker._numeric("request")(request_num_BF),
            ],
            -1,
        )
        item_BCWD = item.vectors(self._lookup(item_rows_BCW2), given_BCW)
        now_BC = (item_vectors_BCV @ now_BV[..., None]).squeeze(-1)
        long_BC = (item_vectors_BCV @ long_BV[..., None]).squeeze(-1)
        level_BC = level_B[:, None].expand_as(now_BC)
        signals_BCS = ranker.content.norm(
            torch.stack([now_BC, long_BC, item_bias_BC, level_BC, now_BC + item_bias_BC + level_BC], -1)
        )
        candidate_BCE = torch.cat(
            [
                l2_normalise(item_BCWD[..., ranker.item_column, :], LEARNED_EPS),
                l2_normalise(item_vectors_BCV, LEARNED_EPS),
            ],
            -1,
        )
        history_BLH = torch.cat(
            [
                ranker.action(history_types_BLA) + ranker.age(torch.log1p(history_hours_BL[..., None])),
                l2_normalise(self._lookup(history_rows_BL2) + item.fallback[ranker.item_feature], LEARNED_EPS),
                l2_normalise(history_vectors_BLV, LEARNED_EPS),
            ],
            -1,
        )
        of_request, of_item = (
            (request_BX, torch.cat([long_BV, now_BV], -1)),
            (
                torch.cat([item(item_BCWD, given_BCW), self.numbers(item_num_BCF)], -1),
                torch.cat(
                    [item_vectors_BCV, signals_BCS, self.sequence(history_BLH, candidate_BCE, history_mask_BL)], -1
                ),
            ),
        )
        x_NX = self._interact(of_request, of_item)
        logits_NA = ranker.heads(ranker.mlp(x_NX)) + ranker.skip(signals_BCS.flatten(0, 1))
        return ranker.calibration(logits_NA).unflatten(0, item_bias_BC.shape)

    def _interact(self, request: tuple[Tensor, Tensor], item: tuple[Tensor, Tensor]) -> Tensor:
        """(B * C, X) of the interaction; its inputs come in the order request, item, request, item."""
        interaction = self.ranker.interaction
        if self.masks is not None:
            x_NX = self.masks(torch.cat(request, -1), torch.cat(item, -1))
            return interaction.crosses(x_NX) if isinstance(interaction, ParallelMaskNetDCN) else x_NX
        size = (-1, item[0].shape[1], -1)
        parts = [part for pair in zip(request, item, strict=True) for part in (pair[0][:, None].expand(size), pair[1])]
        return interaction(torch.cat(parts, -1).flatten(0, 1))

    def _lookup(self, rows: Tensor) -> Tensor:
        """(..., 2) -> (..., D)"""
        return nn.functional.embedding(rows, self.table).flatten(-2)
