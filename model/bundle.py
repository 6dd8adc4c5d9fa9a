"""A trained model as one directory: weights, what an update needs to remember, and where it came from.

model.safetensors      dense weights, statistics, the seen rows of the embedding table
continual.safetensors  importance of the weights, accumulators of the table's optimiser
bundle.json            spec, recipe, lineage, metrics, SHA-256 of the two files
reference/             optional, put there by the step that trained it: what drift is judged against
served/                what a server runs, put there by the judge step (`model/export.py`)
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import TableSpec
from model.config import Recipe
from model.files import canonical, read_card, sha, stamped, write_directory
from model.ranker import Ranker
from model.tensors import pack, unpack

WEIGHTS, MEMORY, CARD = "model.safetensors", "continual.safetensors", "bundle.json"
FORMAT = 3


@dataclass(frozen=True)
class Bundle:
    """One trained model; equal bundles have equal digests.

    Attributes:
        spec: Features and actions that it was trained on.
        recipe: Its sizes and how it was trained.
        weights: Tensors of `Ranker.state`.
        memory: Tensors that the next update starts from; scoring does not need them.
        strategy: Continual-learning strategy that made it.
        seed: Seed of everything random.
        parent: Digest of the champion that it was continued from, empty if it was trained from scratch.
        updates: How many updates ago its line was trained from scratch.
        data: Digest of the training table.
        train_start: Time of its first training request.
        train_end: Time of its last training request.
        train_rows: Candidates that it was trained on.
        code: Digest of the source of this package at training time.
        metrics: Numbers for people (loss, seconds, HIT@3, ...); not part of the digest.
    """

    spec: TableSpec
    recipe: Recipe
    weights: dict[str, Tensor]
    memory: dict[str, Tensor]
    strategy: str
    seed: int
    parent: str
    updates: int
    data: str
    train_start: datetime
    train_end: datetime
    train_rows: int
    code: str
    metrics: dict[str, float] = field(default_factory=dict)

    @cached_property
    def _packed(self) -> dict[str, bytes]:
        return {WEIGHTS: pack(self.weights), MEMORY: pack(self.memory)}

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over weights, memory, spec, recipe and lineage. Metrics (wall times among them) stay out."""
        return sha(canonical(self._lineage()).encode())

    def with_metrics(self, **metrics: float) -> "Bundle":
        """The same bundle with more metrics."""
        return replace(self, metrics={**self.metrics, **metrics})

    def ranker(self) -> Ranker:
        """The ranker with these weights, in evaluation mode; one a bundle, for reading only."""
        return self._ranker

    @cached_property
    def _ranker(self) -> Ranker:
        with torch.random.fork_rng():
            ranker = Ranker(self.recipe.ranker, self.spec)
        ranker.load_state(self.weights)
        return ranker.eval().requires_grad_(False)

    def save(self, directory: Path) -> None:
        """Write the bundle, atomically; does nothing when this very bundle is already there."""
        try:
            if Bundle.load(directory).digest == self.digest:
                return
        except EvergreenError:
            pass
        card = self._lineage() | {"metrics": self.metrics}
        write_directory(directory, {**self._packed, CARD: stamped(card)})

    @classmethod
    def load(cls, directory: Path) -> "Bundle":
        """Read a bundle and verify every file of it.

        Raises:
            EvergreenError: A file is missing, damaged or was changed.
        """
        try:
            card = read_card(directory / CARD)
            if card["format"] != FORMAT:
                raise EvergreenError(
                    f"{directory} holds a model of format {card['format']}, and this code reads format {FORMAT}",
                    "Start a fresh home: a model of another architecture can be neither continued nor compared",
                )
            plain = ("strategy", "seed", "parent", "updates", "data", "train_rows", "code", "metrics")
            return cls(
                spec=TableSpec.from_json(card["spec"]),
                recipe=Recipe.from_json(card["recipe"]),
                weights=unpack(directory / WEIGHTS, card["files"][WEIGHTS]),
                memory=unpack(directory / MEMORY, card["files"][MEMORY]),
                train_start=datetime.fromisoformat(card["train_start"]),
                train_end=datetime.fromisoformat(card["train_end"]),
                **{name: card[name] for name in plain},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvergreenError(f"{directory / CARD} is damaged ({error})", "Restore it, or train again") from error

    def _lineage(self) -> dict:
        return {
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "recipe": self.recipe.to_json(),
            "strategy": self.strategy,
            "seed": self.seed,
            "parent": self.parent,
            "updates": self.updates,
            "data": self.data,
            "train_start": self.train_start.isoformat(),
            "train_end": self.train_end.isoformat(),
            "train_rows": self.train_rows,
            "code": self.code,
            "files": {name: sha(data) for name, data in self._packed.items()},
        }


@cache
def code_digest() -> str:
    """Digest (12 hex digits) of the source of this package, its sub-packages included."""
    room = Path(__file__).parent
    files = sorted(room.rglob("*.py"))
    return sha(b"".join(path.relative_to(room).as_posix().encode() + path.read_bytes() for path in files))[:12]
