"""The Homefeed ranker: one embedding table, content vectors, TransAct, an interaction, one sigmoid head an action.

Shapes: B requests, N candidates, L actions (newest first), W hashed columns, F numeric columns, D embedding width,
G hashed features (a feature may take several columns), A actions, E width of an item's vector.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engagement.errors import EvergreenError
from engagement.table import Level, RankingTable, TableSpec
from model.columns import ITEM_FEATURE, USER_FEATURE, place_of
from model.config import RankerConfig
from model.data import Batch, Batcher, action_types, quantiles
from model.fields import Hashed, Numeric
from model.hashing import MISSING_ROW, rows_of
from model.interactions import build
from model.interest import ContentVectors, Interest
from model.layers import LEARNED_EPS, Calibrated, l2_normalise, mlp
from model.transact import TransAct

_STATISTICS_REQUESTS = 20_000  # from which the scales of the content signals are taken


@dataclass(frozen=True)
class Vectors:
    """What a batch finds in the embedding table; zero where there is no value and where training never saw the id."""

    request_BWD: Tensor
    item_NWD: Tensor
    history_BLD: Tensor


class Ranker(nn.Module):
    """Scores the candidates of requests: logits (N, A) in the order of `spec.actions`.

    Args:
        config: Sizes.
        spec: What the columns mean.

    Raises:
        EvergreenError: There is no categorical feature `user_id` of the request or `item_id` of the candidate.
    """

    seen: Tensor

    def __init__(self, config: RankerConfig, spec: TableSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        _, user_column = place_of(spec, "request", USER_FEATURE)
        self.item_feature, self.item_column = place_of(spec, "candidate", ITEM_FEATURE)
        # The table holds how an id differs from its feature's fallback vector and starts at zero, so an id that
        # training never saw is the fallback and no noise. `seen` marks the rows that training changed: an id is known
        # by both of its rows, which a new id has by chance only as often as the filled share of the table squared.
        self.table = nn.Embedding(config.buckets, config.dim // 2, padding_idx=MISSING_ROW, sparse=True)
        nn.init.zeros_(self.table.weight)
        self.register_buffer("seen", torch.zeros(config.buckets, dtype=torch.bool))

        levels: tuple[Level, Level] = ("request", "candidate")
        self.hashed = nn.ModuleDict({v: Hashed(spec.of(v, hashed=True), config.dim) for v in levels})
        self.numeric = nn.ModuleDict({v: Numeric(spec.of(v, hashed=False), config.dim) for v in levels})
        self.action = nn.Linear(len(spec.actions), config.action_dim)  # a sum of vectors, one an action type
        self.age = nn.Linear(1, config.action_dim, bias=False)
        self.content = ContentVectors(config.content, self.item_column, user_column, len(spec.actions))
        self.sequence = TransAct(
            config.action_dim + config.dim + config.content,
            config.dim + config.content,
            config.layers,
            config.ffn,
            config.first,
            config.summary,
            config.dropout,
        )
        of_interest = (config.content, config.content, config.content, self.content.out_features)
        per_level = [w for v in levels for p in (self._hashed(v), self._numeric(v)) for w in p.field_widths]
        self.interaction = build(config.interaction, (*per_level, *of_interest, config.summary))
        width = self.interaction.out_features
        self.mlp = mlp(width, config.hidden, config.dropout)
        self.heads = nn.Linear((width, *config.hidden)[-1], len(spec.actions))
        # A direct way from the signals to the logits; zero at first.
        self.skip = nn.Linear(self.content.out_features, len(spec.actions), bias=False)
        nn.init.zeros_(self.skip.weight)
        # Not part of `forward`: losses and the importance of the weights are of the raw logits.
        self.calibration = Calibrated(len(spec.actions))

    def fit_statistics(self, table: RankingTable) -> None:
        """Before training from scratch: scales of all numbers, and heads that start at the base rates."""
        self._numeric("request").fit(table.request_num)
        self._numeric("candidate").fit(table.item_num)
        rate = torch.from_numpy((table.labels.sum(0, dtype="int64") + 0.5) / (table.rows + 1.0))
        with torch.no_grad():
            self.heads.bias.copy_(torch.logit(rate))
        some = np.unique(np.linspace(0, table.requests - 1, min(table.requests, _STATISTICS_REQUESTS)).astype(int))
        batch = Batcher(table, self.config).of_requests(some).to(self.heads.bias.device)
        signals_NS = self.content(batch).signals_NS
        std, mean = torch.std_mean(signals_NS, 0, correction=0)
        knots = quantiles(signals_NS.cpu().numpy(), np.arange(signals_NS.shape[1]), self.content.norm.KNOTS)
        self.content.norm.fit(mean, std, torch.zeros_like(mean), knots)

    def _hashed(self, level: Level) -> Hashed:
        return cast(Hashed, self.hashed[level])

    def _numeric(self, level: Level) -> Numeric:
        return cast(Numeric, self.numeric[level])

    def state(self) -> dict[str, Tensor]:
        """All that was learned: the dense weights, the statistics and the seen rows of the table, no others."""
        tensors = {k: v for k, v in self.state_dict().items() if k not in ("table.weight", "seen")}
        rows = self.seen.nonzero()[:, 0]
        tensors |= {"table.rows": rows, "table.values": self.table.weight.detach()[rows]}
        tensors |= {f"vectors.{name}": tensor for name, tensor in self.content.state().items()}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            EvergreenError: The tensors are of another model.
        """
        dense = {k: v for k, v in tensors.items() if not k.startswith(("table.", "vectors."))}
        try:
            missing, unexpected = self.load_state_dict(dense, strict=False)
            if unexpected or set(missing) != {"table.weight", "seen"}:
                raise KeyError(sorted({*unexpected, *missing} - {"table.weight", "seen"}))
            self.table.weight[tensors["table.rows"]] = tensors["table.values"].to(self.table.weight.device)
        except (KeyError, RuntimeError, IndexError) as error:
            raise EvergreenError(f"the weights do not fit the ranker ({error})", "Train again from scratch") from error
        self.seen.zero_()
        self.seen[tensors["table.rows"]] = True
        self.content.load({k.removeprefix("vectors."): v for k, v in tensors.items() if k.startswith("vectors.")})

    def rows(self, batch: Batch) -> Tensor:
        """(I, 2) rows of the table of every id: of the request, the candidates, the attended history, in order.

        In evaluation an id that training never saw has no rows.
        """
        rows_I2 = rows_of(torch.cat([i.flatten() for i in self._ids(batch)]), self.config.buckets)
        if self.training:
            return rows_I2
        return rows_I2.masked_fill(~self.seen[rows_I2].all(-1, keepdim=True), MISSING_ROW)

    def _ids(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return batch.request_ids_BW, batch.item_ids_NW, batch.history_ids_BL[:, : self.config.attended]

    def lookup(self, batch: Batch) -> Vectors:
        """One merged lookup of everything hashed."""
        ids = self._ids(batch)
        found = self.table(self.rows(batch)).flatten(-2).split([i.numel() for i in ids])
        return Vectors(*(v.view(*i.shape, v.shape[-1]) for v, i in zip(found, ids, strict=True)))

    def forward(self, batch: Batch, vectors: Vectors | None = None, interest: Interest | None = None) -> Tensor:
        """Logits (N, A).

        Args:
            batch: Requests with their candidates.
            vectors: Looked up before, where the caller needs them (gradients per sample); else looked up here.
            interest: The same.
        """
        vectors = self.lookup(batch) if vectors is None else vectors
        interest = self.content(batch) if interest is None else interest
        user, item = self._hashed("request"), self._hashed("candidate")
        item_NWD = item.vectors(vectors.item_NWD, batch.item_ids_NW)
        request = [
            user(user.vectors(vectors.request_BWD, batch.request_ids_BW), batch.request_ids_BW),
            self._numeric("request")(batch.request_num_BF),
        ]
        signals_NS = self.content.norm(interest.signals_NS)
        parts = [
            torch.cat(request, -1).index_select(0, batch.request_of_row),
            item(item_NWD, batch.item_ids_NW),
            self._numeric("candidate")(batch.item_num_NF),
            torch.cat([interest.batch_BC, interest.now_BC], -1).index_select(0, batch.request_of_row),
            interest.item_NC,
            signals_NS,
            self._sequence(vectors.history_BLD, item_NWD[..., self.item_column, :], interest, batch),
        ]
        return self.heads(self.mlp(self.interaction(torch.cat(parts, -1)))) + self.skip(signals_NS)

    def _sequence(self, history_BLD: Tensor, candidate_ND: Tensor, interest: Interest, batch: Batch) -> Tensor:
        last = self.config.attended
        types_BLA = action_types(batch.history_bits_BL[:, :last], len(self.spec.actions)).to(history_BLD.dtype)
        age_BL1 = torch.log1p(batch.history_hours_BL[:, :last, None])
        fallback_D = self._hashed("candidate").fallback[self.item_feature]
        action_BLH = torch.cat(
            [
                self.action(types_BLA) + self.age(age_BL1),
                l2_normalise(history_BLD + fallback_D, LEARNED_EPS),
                l2_normalise(interest.history_BLC[:, :last], LEARNED_EPS),
            ],
            -1,
        )
        candidate_NE = torch.cat(
            [l2_normalise(candidate_ND, LEARNED_EPS), l2_normalise(interest.item_NC, LEARNED_EPS)], -1
        )
        return self.sequence(action_BLH, candidate_NE, batch.history_visible_BL[:, :last], batch.request_of_row)
