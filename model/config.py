"""Model and training configurations: frozen, built by named functions, named by a digest.

`debug()` trains in a second and is for tests; `laptop()` is for two CPU cores.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from engagement.errors import EvergreenError


@dataclass(frozen=True)
class RankerConfig:
    """Sizes of the ranker.

    Attributes:
        buckets: Rows of the merged embedding table; row 0 is kept for "no value".
        dim: Width of one embedding.
        action_dim: Width of the embedding of what an action was (its type and its age).
        history: Most recent actions that the sequence model sees.
        layers: Transformer layers over the history.
        ffn: Hidden width of a transformer layer's feed-forward part.
        first: K, outputs of the newest actions that are kept beside the max-pool; at most 10.
        summary: Width to which the K + 1 outputs are projected before the crosses.
        crosses: Stacked DCNv2 layers.
        hidden: Hidden widths of the MLP under the heads.
        dropout: Dropout in the transformer and the MLP.
    """

    buckets: int
    dim: int
    action_dim: int
    history: int
    layers: int
    ffn: int
    first: int
    summary: int
    crosses: int
    hidden: tuple[int, ...]
    dropout: float

    def __post_init__(self) -> None:
        if not 1 <= self.first <= min(10, self.history):
            raise EvergreenError(
                f"first is {self.first} with a history of {self.history}", "Choose 1 <= first <= min(10, history)"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How the ranker is trained.

    Attributes:
        epochs: Passes over the table when training from scratch; the embeddings start anew in each.
        update_epochs: Passes over the new window when continuing from a champion.
        requests_per_batch: Requests in one step; a step sees all their candidates.
        lr: Peak learning rate of the dense part (AdamW).
        table_lr: Learning rate of the embedding table (row-wise Adagrad).
        update_lr_scale: Factor on both rates when continuing from a champion.
        weight_decay: AdamW's decay on matrices (not on biases or norms).
        warmup: Share of the steps over which the rates rise linearly; they fall to zero along a cosine after it.
        clip: Largest gradient norm of the dense part.
        id_dropout: Chance with which a categorical value is hidden in training, so that new ids are no surprise.
        time_window_hours: W; in training, actions younger than T ~ U(0, W) hours are hidden, one T a request.
        primary_weight: Weight of the primary action's head; every other head has weight 1.
        negative_weight: Extra weight of a row with a negative action on the primary head.
        sampled_weight: Weight of candidates that were sampled rather than logged.
        user_weight_power: p; a request weighs (requests of its user) ** -p, scaled to mean 1.
        ewc_lambda: Strength of the EWC penalty.
        fisher_decay: Factor on the old importance when the new one is added (online EWC).
        fisher_rows: Most candidate rows from which the importance is estimated.
        distill_weight: Weight of the loss against the champion's predictions.
        checkpoint_steps: Steps between checkpoints.
        max_skipped_steps: Steps with a non-finite loss or gradient that are skipped before training is given up.
        threads: CPU threads; part of what makes a run reproducible to the bit.
        precision: `auto` is float32 on a CPU and float16 autocast with a GradScaler on a GPU; `bf16` is bfloat16
            autocast on either.
    """

    epochs: int
    update_epochs: int
    requests_per_batch: int
    lr: float
    table_lr: float
    update_lr_scale: float
    weight_decay: float
    warmup: float
    clip: float
    id_dropout: float
    time_window_hours: float
    primary_weight: float
    negative_weight: float
    sampled_weight: float
    user_weight_power: float
    ewc_lambda: float
    fisher_decay: float
    fisher_rows: int
    distill_weight: float
    checkpoint_steps: int
    max_skipped_steps: int
    threads: int
    precision: Literal["auto", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained."""

    ranker: RankerConfig
    train: TrainConfig

    def to_json(self) -> dict:
        """A JSON form that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Recipe":
        """The inverse of `to_json`."""
        ranker = {**data["ranker"], "hidden": tuple(data["ranker"]["hidden"])}
        return cls(RankerConfig(**ranker), TrainConfig(**data["train"]))

    def digest(self) -> str:
        """Names the recipe (12 hex digits)."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]


def laptop() -> Recipe:
    """Two CPU cores: tens of thousands of rows from scratch in half a minute."""
    return Recipe(
        RankerConfig(
            buckets=2**18,
            dim=8,
            action_dim=8,
            history=64,
            layers=1,
            ffn=32,
            first=4,
            summary=48,
            crosses=2,
            hidden=(64,),
            dropout=0.1,
        ),
        TrainConfig(
            epochs=3,
            update_epochs=1,
            requests_per_batch=16,
            lr=5e-3,
            table_lr=0.2,
            update_lr_scale=0.5,
            weight_decay=0.01,
            warmup=0.1,
            clip=1.0,
            id_dropout=0.2,
            time_window_hours=0.5,
            primary_weight=2.0,
            negative_weight=1.0,
            sampled_weight=1.0,
            user_weight_power=0.0,
            ewc_lambda=10.0,
            fisher_decay=0.9,
            fisher_rows=2048,
            distill_weight=0.5,
            checkpoint_steps=100,
            max_skipped_steps=10,
            threads=1,
            precision="auto",
        ),
    )


def debug() -> Recipe:
    """Seconds, for tests: the laptop's parts, all of them small."""
    big = laptop()
    sizes = replace(
        big.ranker, buckets=4096, dim=8, action_dim=4, history=8, layers=2, ffn=16, first=3, summary=16, hidden=(32,)
    )
    return Recipe(
        sizes, replace(big.train, epochs=2, requests_per_batch=16, checkpoint_steps=5, fisher_rows=64, threads=1)
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"debug": debug, "laptop": laptop}

# Named here and not in continual.py, so that the command line knows them without importing torch.
STRATEGY_NAMES = ("scratch", "finetune", "ewc+distill")
DEFAULT_STRATEGY = "ewc+distill"
