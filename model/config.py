"""Model and training configurations: frozen, built by named functions, named by a digest.

`debug()` trains in a second and is for tests; `laptop()` is for two CPU cores, `homefeed()` for a GPU.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from engagement.errors import EvergreenError
from model.interactions.sizes import ParallelMaskNetDCN, Sizes
from model.interactions.sizes import from_json as sizes_from_json
from model.interactions.sizes import to_json as sizes_to_json


@dataclass(frozen=True)
class RankerConfig:
    """Sizes of the ranker.

    Attributes:
        buckets: Rows of the merged embedding table; row 0 is kept for "no value".
        dim: Width of one embedding, even: it is made of two rows of the table.
        content: Width of the content vectors that are learned from co-engagement.
        action_dim: Width of the embedding of what an action was (its type and its age).
        history: Most recent actions from which the user's interest at the moment is worked out.
        attended: The newest of them, over which the sequence model attends.
        layers: Transformer layers over the history.
        ffn: Hidden width of a transformer layer's feed-forward part.
        first: K, outputs of the newest actions that are kept beside the max-pool; at most 10.
        summary: Width to which the K + 1 outputs are projected before the interaction.
        interaction: How the fields meet: one of `model.interactions.sizes.SIZES`.
        hidden: Hidden widths of the MLP under the heads.
        dropout: Dropout behind the transformer and in the MLP.
    """

    buckets: int
    dim: int
    content: int
    action_dim: int
    history: int
    attended: int
    layers: int
    ffn: int
    first: int
    summary: int
    interaction: Sizes
    hidden: tuple[int, ...]
    dropout: float

    def __post_init__(self) -> None:
        if not 1 <= self.first <= min(10, self.attended) or self.attended > self.history:
            raise EvergreenError(
                f"first is {self.first}, attended {self.attended} and history {self.history}",
                "Choose 1 <= first <= 10 and first <= attended <= history",
            )


@dataclass(frozen=True)
class TrainConfig:
    """How the ranker is trained.

    Attributes:
        epochs: Passes over the table when training from scratch; the embeddings start anew in each.
        update_epochs: Passes over the new window when continuing from a champion.
        rows_per_batch: Candidates in one step, over all processes, on average: whole requests are taken. On a GPU that
            cannot hold so many, fewer are chosen and the trained bundle's recipe holds that number.
        update_rows_per_batch: The same for an update, whose window is short: smaller batches are more steps.
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
        replay_share: Past requests that an update replays for every new one.
        reservoir_requests: Most past requests that travel with the model to be replayed.
        exam_requests: Most held-out requests that travel with it to see what was forgotten.
        checkpoint_steps: Steps between checkpoints.
        max_skipped_steps: Steps with a non-finite loss or gradient that are skipped before training is given up.
        threads: CPU threads; part of what makes a run reproducible to the bit.
        precision: `auto` is float32 on a CPU and float16 autocast with a GradScaler on a GPU; `bf16` is bfloat16
            autocast, `fp16` float16 autocast with a GradScaler, on either.
        compile: Whether the dense part goes through `torch.compile`: minutes of compiling for a faster step.
    """

    epochs: int
    update_epochs: int
    rows_per_batch: int
    update_rows_per_batch: int
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
    replay_share: float
    reservoir_requests: int
    exam_requests: int
    checkpoint_steps: int
    max_skipped_steps: int
    threads: int
    precision: Literal["auto", "bf16", "fp16"]
    compile: bool = False


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained."""

    ranker: RankerConfig
    train: TrainConfig

    def to_json(self) -> dict:
        """A JSON form that `from_json` reads back."""
        data = asdict(self)
        data["ranker"]["interaction"] = sizes_to_json(self.ranker.interaction)
        return data

    @classmethod
    def from_json(cls, data: dict) -> "Recipe":
        """The inverse of `to_json`."""
        sizes = data["ranker"]
        ranker = RankerConfig(
            **{**sizes, "hidden": tuple(sizes["hidden"]), "interaction": sizes_from_json(sizes["interaction"])}
        )
        return cls(ranker, TrainConfig(**data["train"]))

    def digest(self) -> str:
        """Names the recipe (12 hex digits)."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]


def laptop() -> Recipe:
    """Two CPU cores: tens of thousands of rows from scratch in half a minute."""
    return Recipe(
        RankerConfig(
            buckets=2**18,
            dim=8,
            content=8,
            action_dim=8,
            history=100,
            attended=32,
            layers=1,
            ffn=32,
            first=4,
            summary=48,
            interaction=ParallelMaskNetDCN(blocks=3, ratio=0.5, width=64, crosses=4),
            hidden=(64,),
            dropout=0.1,
        ),
        TrainConfig(
            epochs=3,
            update_epochs=2,
            rows_per_batch=512,
            update_rows_per_batch=256,
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
            fisher_rows=1024,
            distill_weight=0.5,
            replay_share=1.0,
            reservoir_requests=4096,
            exam_requests=1024,
            checkpoint_steps=100,
            max_skipped_steps=10,
            threads=1,
            precision="auto",
        ),
    )


def homefeed() -> Recipe:
    """A GPU, and the dimensions that Pinterest published (arXiv 2306.00248, 2412.01985); never trained here.

    100 actions of 32 + 64 numbers (action type; item), two transformer layers with one head and 32 hidden units, K is
    10; three parallel MaskNet blocks with projection ratio 2.0 and 512 outputs, four crosses; batches of 12,000,
    learning rate 0.0048, actions younger than U(0, 24 h) hidden.
    """
    small = laptop()
    return Recipe(
        replace(
            small.ranker,
            buckets=2**27,
            dim=32,
            content=32,
            action_dim=32,
            attended=100,
            layers=2,
            first=10,
            summary=256,
            hidden=(256,),
            interaction=ParallelMaskNetDCN(),
        ),
        replace(
            small.train,
            epochs=1,
            update_epochs=1,
            rows_per_batch=12_000,
            update_rows_per_batch=12_000,
            lr=4.8e-3,
            time_window_hours=24.0,
            fisher_rows=65_536,
            reservoir_requests=50_000,
            exam_requests=10_000,
            checkpoint_steps=1000,
        ),
    )


def debug() -> Recipe:
    """Seconds, for tests: the laptop's parts, all of them small."""
    big = laptop()
    sizes = replace(
        big.ranker,
        buckets=4096,
        dim=8,
        content=4,
        action_dim=4,
        history=8,
        attended=8,
        layers=2,
        ffn=16,
        first=3,
        summary=16,
        hidden=(32,),
        interaction=ParallelMaskNetDCN(blocks=2, ratio=0.5, width=32, crosses=2),
    )
    train = replace(
        big.train,
        epochs=2,
        update_epochs=1,
        rows_per_batch=72,
        update_rows_per_batch=72,
        checkpoint_steps=5,
        fisher_rows=64,
    )
    return Recipe(sizes, train)


RECIPES: dict[str, Callable[[], Recipe]] = {"debug": debug, "laptop": laptop, "homefeed": homefeed}

# Named here and not in continual.py, so that the command line knows them without importing torch.
STRATEGY_NAMES = (
    "frozen",
    "scratch",
    "finetune",
    "l2",
    "ewc",
    "distill",
    "replay",
    "ewc+distill",
    "distill+replay",
    "ewc+distill+replay",
)
DEFAULT_STRATEGY = "ewc+distill+replay"
