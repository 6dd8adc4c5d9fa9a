"""The Homefeed ranker: merged embedding table, TransAct, DCNv2 crosses, one sigmoid head an action.

Shapes: B requests, N candidates, L actions (newest first), W hashed columns, F numeric columns, D embedding width,
G hashed features (a feature may take several columns), X width of the crossed vector, A actions.
"""

import itertools
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engagement.errors import EvergreenError
from engagement.table import Feature, Level, RankingTable, TableSpec
from model.config import RankerConfig
from model.data import Batch, numeric_statistics
from model.layers import LEARNED_EPS, CrossStack, NumericNorm, l2_normalise, mlp, pool_values
from model.transact import TransAct

START_LENGTH = 0.08  # of an embedding that no training has touched
ITEM_FEATURE = "item_id"  # the candidate's own id; histories hold hashes of the same feature


@dataclass(frozen=True)
class Vectors:
    """What a batch looks up in the embedding table; zero where there is no value."""

    request_BWD: Tensor
    item_NWD: Tensor
    history_BLD: Tensor


class Hashed(nn.Module):
    """The hashed features of one level: pooled over their columns, L2-normalised, concatenated."""

    def __init__(self, features: tuple[Feature, ...], dim: int) -> None:
        super().__init__()
        self.widths = [f.width for f in features]
        self.out_features = len(features) * dim

    def forward(self, values: Tensor, ids: Tensor) -> Tensor:
        """(N, W, D) and (N, W) -> (N, G * D)."""
        if not self.widths:
            return values.flatten(-2)
        parts = zip(values.split(self.widths, -2), ids.split(self.widths, -1), strict=True)
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
        self.out_features = self.norm.out_features + sum(min(width, dim) for width in widths)

    def fit(self, columns_RF: np.ndarray) -> None:
        """Take the statistics of the numeric columns."""
        self.norm.fit(*numeric_statistics(columns_RF, self.columns.numpy()))

    def forward(self, x_F: Tensor) -> Tensor:
        """(..., F) -> (..., out_features)."""
        parts = [self.norm(x_F.index_select(-1, self.columns))]
        for (start, end), project in zip(self.spans, self.project, strict=True):
            # A missing embedding is NaN throughout; it becomes the zero vector.
            parts.append(project(l2_normalise(torch.nan_to_num(x_F[..., start:end], 0.0, 0.0, 0.0))))
        return torch.cat(parts, -1)


class Ranker(nn.Module):
    """Scores the candidates of requests: logits (N, A) in the order of `spec.actions`.

    Args:
        config: Sizes.
        spec: What the columns mean.

    Raises:
        EvergreenError: There is no categorical candidate feature `item_id`.
    """

    seen: Tensor

    def __init__(self, config: RankerConfig, spec: TableSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.item_column = _item_column(spec)
        # Row 0 is "no value": always zero, never trained. `seen` marks rows that training changed: the others hold
        # their random start, which must not reach a score, so until then a new id is "no value" too.
        self.table = nn.Embedding(config.buckets, config.dim, padding_idx=0, sparse=True)
        self.register_buffer("seen", torch.zeros(config.buckets, dtype=torch.bool))
        self.draw_table(torch.default_generator)

        levels: tuple[Level, Level] = ("request", "candidate")
        self.hashed = nn.ModuleDict({v: Hashed(spec.of(v, hashed=True), config.dim) for v in levels})
        self.numeric = nn.ModuleDict({v: Numeric(spec.of(v, hashed=False), config.dim) for v in levels})
        self.action = nn.Linear(len(spec.actions), config.action_dim)  # a sum of vectors, one an action type
        self.age = nn.Linear(1, config.action_dim, bias=False)
        self.sequence = TransAct(
            config.action_dim + config.dim,
            config.dim,
            config.layers,
            config.ffn,
            config.first,
            config.summary,
            config.dropout,
        )
        width = sum(p.out_features for v in levels for p in (self._hashed(v), self._numeric(v))) + config.summary
        self.crosses = CrossStack(width, config.crosses)
        self.mlp = mlp(self.crosses.out_features, config.hidden, config.dropout)
        self.heads = nn.Linear((self.crosses.out_features, *config.hidden)[-1], len(spec.actions))

    @torch.no_grad()
    def draw_table(self, generator: torch.Generator) -> None:
        """Give all rows of the embedding table their random start, from a CPU generator on any device."""
        weight = self.table.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * (START_LENGTH * self.config.dim**-0.5))
        weight[0].zero_()

    def fit_statistics(self, table: RankingTable) -> None:
        """Before training from scratch: scales of the numeric columns, and heads that start at the base rates."""
        self._numeric("request").fit(table.request_num)
        self._numeric("candidate").fit(table.item_num)
        rate = torch.from_numpy((table.labels.sum(0, dtype="int64") + 0.5) / (table.rows + 1.0))
        with torch.no_grad():
            self.heads.bias.copy_(torch.logit(rate))

    def _hashed(self, level: Level) -> Hashed:
        return cast(Hashed, self.hashed[level])

    def _numeric(self, level: Level) -> Numeric:
        return cast(Numeric, self.numeric[level])

    def state(self) -> dict[str, Tensor]:
        """All that was learned: the dense weights, the statistics and the seen rows of the table, no others."""
        tensors = {k: v for k, v in self.state_dict().items() if k not in ("table.weight", "seen")}
        rows = self.seen.nonzero()[:, 0]
        tensors |= {"table.rows": rows, "table.values": self.table.weight.detach()[rows]}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`; rows that were not seen keep the random start that they have here.

        Raises:
            EvergreenError: The tensors are of another model.
        """
        dense = {k: v for k, v in tensors.items() if not k.startswith("table.")}
        try:
            missing, unexpected = self.load_state_dict(dense, strict=False)
            if unexpected or set(missing) != {"table.weight", "seen"}:
                raise KeyError(sorted({*unexpected, *missing} - {"table.weight", "seen"}))
            self.table.weight[tensors["table.rows"]] = tensors["table.values"].to(self.table.weight.device)
        except (KeyError, RuntimeError, IndexError) as error:
            raise EvergreenError(f"the weights do not fit the ranker ({error})", "Train again from scratch") from error
        self.seen.zero_()
        self.seen[tensors["table.rows"]] = True

    def lookup(self, batch: Batch) -> Vectors:
        """One merged lookup of everything hashed; in evaluation, of the seen rows only."""
        ids = (batch.request_ids_BW, batch.item_ids_NW, batch.history_ids_BL)
        flat = torch.cat([i.flatten() for i in ids])
        if not self.training:
            flat = flat.masked_fill(~self.seen[flat], 0)
        found = self.table(flat).split([i.numel() for i in ids])
        return Vectors(*(v.view(*i.shape, v.shape[-1]) for v, i in zip(found, ids, strict=True)))

    def forward(self, batch: Batch, vectors: Vectors | None = None) -> Tensor:
        """Logits (N, A).

        Args:
            batch: Requests with their candidates.
            vectors: Looked up before, where the caller needs them (gradients per sample); else looked up here.
        """
        vectors = self.lookup(batch) if vectors is None else vectors
        row = batch.request_of_row
        request = torch.cat(
            [
                self.hashed["request"](vectors.request_BWD, batch.request_ids_BW),
                self.numeric["request"](batch.request_num_BF),
            ],
            -1,
        )
        parts = [
            request.index_select(0, row),
            self.hashed["candidate"](vectors.item_NWD, batch.item_ids_NW),
            self.numeric["candidate"](batch.item_num_NF),
            self._sequence(vectors, batch),
        ]
        return self.heads(self.mlp(self.crosses(torch.cat(parts, -1))))

    def _sequence(self, vectors: Vectors, batch: Batch) -> Tensor:
        # Bit a of the mask is action a; shifting tells all of them apart, action 0 included.
        shifts = torch.arange(len(self.spec.actions), device=batch.history_bits_BL.device)
        types_BLA = ((batch.history_bits_BL[..., None] >> shifts) & 1).to(vectors.history_BLD.dtype)
        age_BL1 = torch.log1p(batch.history_hours_BL)[..., None]
        item_BLD = l2_normalise(vectors.history_BLD, LEARNED_EPS)
        action_BLH = torch.cat([self.action(types_BLA) + self.age(age_BL1), item_BLD], -1)
        candidate_ND = l2_normalise(vectors.item_NWD.select(-2, self.item_column), LEARNED_EPS)
        return self.sequence(action_BLH, candidate_ND, batch.history_mask_BL, batch.request_of_row)


def _item_column(spec: TableSpec) -> int:
    column = 0
    for feature in spec.of("candidate", hashed=True):
        if feature.name == ITEM_FEATURE and feature.kind == "categorical":
            return column
        column += feature.width
    raise EvergreenError(
        f"the features have no categorical candidate feature {ITEM_FEATURE!r}",
        "Declare it: the action history is matched to candidates by it",
    )
