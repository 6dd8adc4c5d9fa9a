"""What a replay consists of: tasks named by all that their results depend on, and which of them are still to do.

    replay/tables/<snapshot>/     features of every request known at a slot; removed when no task needs it
    replay/windows/<key>.npz      who asked in a slot's window, and which requests are its exam
    replay/models/<key>/          record.json, exam-<first slot>.npz, and the bundle while a later task needs it
    replay/tests/<key>/           record.json (what the gate says), hits.npz

A finished task is never done again: the same replay computes nothing, another strategy or a later end only what is
new. What was removed and is needed again is made again, to the same bits.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from model.config import RECIPES, Recipe

AGES = (0, 1, 2, 4, 8)  # of a model, in slots, when a window tests it
FROZEN, SCRATCH = "frozen", "scratch"
_STRENGTH = "@"

Kind = Literal["table", "model", "test"]


@dataclass(frozen=True)
class Named:
    """A strategy as it is asked for: `ewc`, or `ewc@100`, which is ewc with `ewc_lambda` 100."""

    strategy: str
    strength: float | None = None

    @classmethod
    def parse(cls, text: str, known: Iterable[str]) -> "Named":
        """Read a strategy's name.

        Raises:
            EvergreenError: The strategy is unknown, has no strength, or the strength is no number above 0.
        """
        strategy, at, strength = text.partition(_STRENGTH)
        known = tuple(known)
        if strategy not in known:
            raise EvergreenError(f"strategy {strategy!r} is unknown", f"Choose one of {', '.join(known)}")
        if not at:
            return cls(strategy)
        if not {"ewc", "l2"} & set(strategy.split("+")):
            raise EvergreenError(f"{strategy} has no penalty whose strength could be set", f"Write {strategy}")
        try:
            value = float(strength)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise EvergreenError(f"{strength!r} is no strength", f"Write a number above 0, like {strategy}@100")
        return cls(strategy, value)

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe with this strength."""
        return base if self.strength is None else replace(base, train=replace(base.train, ewc_lambda=self.strength))


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        slot: Index of the slot.
        kind: `table` builds the slot's features. `model` trains on the window that ends at the slot, and examines the
            model on the held-out requests of all windows so far. `test` tests earlier models, one of each age, on it.
        strategy: As it was asked for; empty for a table.
        seed: Of the training; 0 for a table.
    """

    slot: int
    kind: Kind
    strategy: str = ""
    seed: int = 0

    @property
    def priority(self) -> tuple[bool, int, str, str, int]:
        """Sorts tasks into the order in which a free worker takes them: all else waits for tables."""
        return self.kind != "table", self.slot, self.kind, self.strategy, self.seed


@dataclass(frozen=True)
class Replay:
    """One replay: what every worker needs to know of it.

    Attributes:
        settings: The home.
        slots: The instants; the first model is trained on everything before the first.
        start: The log's first instant.
        snapshots: Digest of what was known at each slot.
        strategies: By the name that was asked for.
        seeds: One lineage of each strategy a seed.
        code: Digest of the source.
    """

    settings: Settings
    slots: tuple[datetime, ...]
    start: datetime
    snapshots: tuple[str, ...]
    strategies: dict[str, Named]
    seeds: tuple[int, ...]
    code: str

    @property
    def root(self) -> Path:
        """Where results are kept."""
        return self.settings.root / "replay"

    @cached_property
    def base(self) -> Recipe:
        """The recipe before a strategy's strength is set."""
        return RECIPES[self.settings.recipe]()

    def named(self, label: str) -> Named:
        """The strategy of a task."""
        return self.strategies.get(label) or Named(label)

    def recipe(self, label: str) -> Recipe:
        """The recipe of a task."""
        return self.named(label).recipe(self.base)

    def window(self, slot: int) -> tuple[datetime, datetime]:
        """First and last instant of the window that ends at a slot; the first one is all of the history before it."""
        return (self.slots[slot - 1] if slot else self.start), self.slots[slot]

    def told(self, task: Task) -> str:
        """A task's name for people."""
        at = f"{self.slots[task.slot]:%a %Y-%m-%d}"
        return f"features of {at}" if task.kind == "table" else f"{task.kind} {task.strategy} of {at}, seed {task.seed}"

    # -- tasks --------------------------------------------------------------------------------------------------

    def model(self, label: str, seed: int, slot: int) -> Task:
        """The task that trains a model. At the first slot all strategies share one, trained from scratch."""
        return Task(slot, "model", label if slot else SCRATCH, seed)

    def tasks(self) -> list[Task]:
        """Everything that has a result to report."""
        lineages = [(label, seed) for label in self.strategies for seed in self.seeds]
        models = {self.model(label, seed, i) for label, seed in lineages for i in range(len(self.slots))}
        tests = [Task(k, "test", label, seed) for label, seed in lineages for k in range(1, len(self.slots))]
        return [*models, *tests]

    def ages(self, test: Task) -> dict[int, Task]:
        """The models that a test compares, by age in slots; a frozen model has but one."""
        ages = (0,) if test.strategy == FROZEN else AGES
        return {a: self.model(test.strategy, test.seed, test.slot - 1 - a) for a in ages if a < test.slot}

    def parent(self, model: Task) -> Task | None:
        """The model that an update starts from."""
        if not model.slot or self.named(model.strategy).strategy == SCRATCH:
            return None
        return self.model(model.strategy, model.seed, model.slot - 1)

    def inputs(self, task: Task) -> list[Task]:
        """The tasks whose artefacts a task reads."""
        if task.kind == "table":
            return []
        if task.kind == "test":
            return [Task(task.slot, "table"), *self.ages(task).values()]
        parent = self.parent(task)
        return [Task(j, "table") for j in range(task.slot + 1)] + ([parent] if parent else [])

    # -- names and files ----------------------------------------------------------------------------------------

    @cached_property
    def _keys(self) -> dict[Task, str]:
        return {}

    def key(self, task: Task) -> str:
        """Names a task by all that its result depends on."""
        if task not in self._keys:
            self._keys[task] = self._key(task)
        return self._keys[task]

    def _key(self, task: Task) -> str:
        stamp = f"{self.slots[task.slot]:%Y%m%dT%H%M}"
        if task.kind == "table":
            return f"{stamp}-{_digest(self.snapshots[task.slot], self.code)}"
        inputs = [self.snapshots[task.slot], self.code, self.named(task.strategy).strategy, task.seed]
        if task.kind == "model":
            parent = self.parent(task)
            inputs += [self.recipe(task.strategy).digest(), self.key(parent) if parent else ""]
        else:
            inputs += [str(self.window(task.slot)[0]), *(self.key(m) for m in self.ages(task).values())]
        return f"{stamp}-{task.strategy}-{task.seed}-{_digest(*inputs)}"

    def directory(self, task: Task) -> Path:
        """Where a task's files are."""
        return self.root / f"{task.kind}s" / self.key(task)

    def artefact(self, task: Task) -> Path:
        """What later tasks read of a task."""
        return self.directory(task) / "bundle" if task.kind == "model" else self.directory(task)

    def window_file(self, slot: int) -> Path:
        """Who asked in a window."""
        bounds = [str(t) for t in self.window(slot)]
        return self.root / "windows" / f"{self.key(Task(slot, 'table'))}-{_digest(*bounds)}.npz"

    def exam_file(self, model: Task) -> Path:
        """Hits on the exams of all windows so far; the first slot says what these are."""
        names = [self.window_file(j).name for j in range(model.slot + 1)]
        return self.directory(model) / f"exam-{_digest(*names)}.npz"

    # -- what is left to do -------------------------------------------------------------------------------------

    def finished(self, task: Task) -> bool:
        """Whether a task's result is on disk."""
        if task.kind == "table":
            return self.present(task)
        results = self.exam_file(task) if task.kind == "model" else self.directory(task) / "hits.npz"
        return results.exists() and (self.directory(task) / "record.json").exists()

    def present(self, task: Task) -> bool:
        """Whether what later tasks read of a task is on disk."""
        whole = self.artefact(task).is_dir()
        return whole and (task.kind != "table" or self.window_file(task.slot).exists())

    def outstanding(self) -> dict[Task, set[Task]]:
        """The tasks to do, each with those that must be done before it.

        A task whose result is known is among them only where what it made is gone and another one needs it. Tables
        are built one after the other: the feature repository is for one run at a time.
        """
        todo: dict[Task, set[Task]] = {}
        asked = [t for t in self.tasks() if not self.finished(t)]
        while asked:
            task = asked.pop()
            if task in todo:
                continue
            todo[task] = {t for t in self.inputs(task) if not self.present(t)}
            asked += todo[task]
        tables = sorted((t for t in todo if t.kind == "table"), key=lambda t: t.slot)
        for before, table in zip(tables, tables[1:], strict=False):
            todo[table].add(before)
        return todo

    def kept(self) -> set[Task]:
        """Models that stay when no task needs them: the shared first one, and the newest, for a later end."""
        last = len(self.slots) - 1
        return {self.model(label, s, i) for label in self.strategies for s in self.seeds for i in (0, last)}


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
