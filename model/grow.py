"""New feature columns in an update: the champion as a model of a table that has more columns than it knows.

A grown model computes what the champion did (Net2Net, Chen et al. 2016, arXiv 1511.05641: a function-preserving
transformation). New positions of the interaction's input have weights of zero into everything that was there; these
weights get gradients, and so the next update learns what the new columns say. Two more things keep it exact: a new
numeric column joins the field of all numbers of its level, which is still normed by those it had
(`FieldNorm.founding`), and columns of new embeddings have no axes in the content state, which keeps the vectors.

It is exact to rounding with all interactions but `sdcn_v3`, whose layers norm and cut a vector of half the input's
width: old elements move between its halves. There it comes out finite and trainable, with other scores.

Shapes: X width of the interaction's input, F numeric columns, K knots, E embedding columns, C width of a vector.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import Feature, Kind, Level, RankingTable, TableSpec
from model.bundle import Bundle
from model.columns import changes, widen_table
from model.content import CONTENT
from model.fields import Numeric
from model.interactions.sizes import DHEN, DeepLight, ParallelMaskNetDCN, SDCNv3
from model.optim import dense_parameters
from model.ranker import Ranker
from model.reservoir import EXAM, RESERVOIR, Reservoir

LEVELS: tuple[Level, Level] = ("request", "candidate")
HASHED: tuple[Kind, ...] = ("categorical", "categories")
_SPECLESS = ("table.", "vectors.")  # prefixes of state that no column is part of
_FISHER, _AXES = "fisher.dense.", CONTENT + "axes"  # in a bundle's memory
_SCRATCH = "train with --strategy scratch"


def grown(champion: Bundle, table: RankingTable) -> Bundle:
    """The champion as a model of the table's spec, ready to be continued; itself where there is nothing to do.

    Weights, importance (zero for what is new), accumulators of the table and the content state carry over. Statistics
    of numeric columns that the champion has never seen a value of are taken from the table. The past requests that
    travel with it have no value in the new columns.

    Args:
        champion: The model.
        table: The new training window.

    Raises:
        EvergreenError: As `changes`; or a weight has no place in the new model.
    """
    added, late = changes(champion.spec, table.spec), _late(champion, table)
    if not added and not late:
        return champion
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(len(table.spec.features))
        old, new = (Ranker(champion.recipe.ranker, spec) for spec in (champion.spec, table.spec))
    for level, block in zip(LEVELS, (table.request_num, table.item_num), strict=True):
        cast(Numeric, new.numeric[level]).fit(block)
    move = _Move(old, new, late)
    fresh = {k: v for k, v in new.state().items() if not k.startswith(_SPECLESS)}
    importance = {k.removeprefix(_FISHER): v for k, v in champion.memory.items() if k.startswith(_FISHER)}
    dense = dense_parameters(new) if importance else {}
    memory = champion.memory | {_FISHER + k: move.place(k, importance, torch.zeros_like(p)) for k, p in dense.items()}
    for prefix in (RESERVOIR, EXAM):
        past = Reservoir.from_tensors(champion.memory, prefix, champion.spec)
        if past:
            memory |= replace(past, table=widen_table(past.table, table.spec)).to_tensors(prefix)
    return replace(
        champion,
        spec=table.spec,
        weights=champion.weights | {k: move.place(k, champion.weights, v) for k, v in fresh.items()},
        memory=memory | ({_AXES: move.axes(memory[_AXES])} if _AXES in memory else {}),
    )


class _Move:
    """Where the entries of an old ranker's tensors lie in those of a new one.

    Args:
        old: A ranker of the old spec.
        new: A ranker of the new spec.
        late: Numeric columns, by name, whose statistics are taken anew.

    Raises:
        EvergreenError: The two differ in a module that is neither a new feature's own nor moved with its feature.
    """

    def __init__(self, old: Ranker, new: Ranker, late: set[str]) -> None:
        self._old, self._new, self._late = old, new, late
        self._fields = _fields(old), _fields(new)
        self._x = _places(*([label for field in fields.values() for label in field] for fields in self._fields))
        self._widths = tuple(sum(map(len, fields.values())) for fields in self._fields)
        origins = {self._origin(name) for name, _ in new.named_parameters()} - {None}
        for name in sorted(origins ^ {name for name, _ in old.named_parameters()}, key=str):
            raise _no_place(str(name))

    def place(self, name: str, olds: dict[str, Tensor], fresh: Tensor) -> Tensor:
        """The tensor of this name: old entries at their places, zero from new inputs to old units, else `fresh`.

        Raises:
            EvergreenError: It grew in a way that no feature explains.
        """
        origin = self._origin(name)
        if origin is None:
            return fresh.detach()
        was, out = olds[origin], fresh.detach().clone()
        if name.endswith(".founding") and was.shape != out.shape:
            out = self._founding()
        index = [self._along(name, *sizes) for sizes in zip(was.shape, out.shape, strict=True)]
        columns = self._kept_statistics(name)
        if columns is not None:
            was, index[0] = was[columns], index[0][columns]
        if out.ndim > 1:
            out[index[0]] = 0
        out[torch.meshgrid(*index, indexing="ij")] = was
        return out

    def axes(self, axes_EC: Tensor) -> Tensor:
        """The axes of the content state, zero for the columns of new embeddings."""
        old, new = ([(f.name, i) for f in side for i in range(f.width)] for side in self._of("candidate", "embedding"))
        out = axes_EC.new_zeros(len(new), axes_EC.shape[1])
        if len(axes_EC):
            out[_places(old, new)] = axes_EC
        return out

    def _of(self, level: str, *kinds: Kind) -> tuple[list[Feature], list[Feature]]:
        """The old and the new features of a level and some kinds."""
        old, new = (_of(ranker.spec, cast(Level, level), *kinds) for ranker in (self._old, self._new))
        return old, new

    def _origin(self, name: str) -> str | None:
        """The name of a tensor in the old ranker; None for a new feature's own."""
        found = _IN_LIST.fullmatch(name)
        if not found:
            return name
        head, number, tail = found.groups()
        if head == "interaction.vectors":  # DeepLight's projection of a field
            old, new = (list(fields) for fields in self._fields)
        else:
            old, new = ([f.name for f in side] for side in self._of(head.split(".")[1], "embedding"))
        feature = new[int(number)]
        return f"{head}.{old.index(feature)}.{tail}" if feature in old else None

    def _along(self, name: str, was: int, now: int) -> Tensor:
        """Places of the old entries along one dimension of a tensor, given its old and new size."""
        if was == now:
            return torch.arange(was)
        room, part, *rest = name.split(".")
        if room == "hashed":
            return _places(*([f.name for f in side] for side in self._of(part, *HASHED)))
        if room == "numeric":
            return _places(*([f.name for f in side] for side in self._of(part, "numeric")))
        sizes, fields = self._old.config.interaction, self._fields
        if isinstance(sizes, DeepLight) and room == "interaction" and part != "linear":
            if part == "vectors":
                field = list(fields[1])[int(rest[0])]
                return _places(fields[0][field], fields[1][field])
            if part == "pairs":
                return _places(*fields)
            return _places(*([(key, i) for key in side for i in range(sizes.width)] for side in fields))
        return self._of_input(name, was, now)

    def _of_input(self, name: str, was: int, now: int) -> Tensor:
        """A dimension that follows from the width of the interaction's input."""
        sizes, (old_x, new_x) = self._old.config.interaction, self._widths
        times, rest = divmod(was, old_x)
        if not rest and now == times * new_x:
            return torch.cat([self._x + n * new_x for n in range(times)])
        if isinstance(sizes, DHEN) and (was, now) == (old_x + sizes.width, new_x + sizes.width):
            return torch.cat([self._x, new_x + torch.arange(sizes.width)])
        if isinstance(sizes, SDCNv3) or (isinstance(sizes, ParallelMaskNetDCN | DHEN) and ".mask." in name):
            return torch.arange(was)  # hidden units, whose places mean nothing
        raise _no_place(name)

    def _founding(self) -> Tensor:
        """(X,) bool: of a field that grew, the elements that it had."""
        old, new = self._fields
        return torch.tensor([key not in old or label in old[key] for key, field in new.items() for label in field])

    def _kept_statistics(self, name: str) -> Tensor | None:
        """Of the numeric columns of a level, the old ones whose statistics stay; None for another tensor."""
        parts = name.split(".")
        if parts[0] != "numeric" or parts[-1] not in ("mean", "std", "knots"):
            return None
        old, _ = self._of(parts[1], "numeric")
        return torch.tensor([n for n, f in enumerate(old) if f.name not in self._late], dtype=torch.long)


_IN_LIST = re.compile(r"(numeric\.\w+\.project|interaction\.vectors)\.(\d+)\.(.+)")  # a list with an entry a feature


def _fields(ranker: Ranker) -> dict[str, list[str]]:
    """The fields of the interaction's input, in order, each with a label an element."""
    config, fields = ranker.config, dict[str, list[str]]()
    for level in LEVELS:
        fields |= {f.name: _labels(f.name, config.dim) for f in _of(ranker.spec, level, *HASHED)}
        numbers = [f.name for f in _of(ranker.spec, level, "numeric")]
        if numbers:
            thrice = [f"{name} {part}" for part in ("value", "place", "gap") for name in numbers]  # as in NumericNorm
            fields[f"numbers of the {level}"] = thrice
        embeddings = _of(ranker.spec, level, "embedding")
        fields |= {f.name: _labels(f.name, min(f.width, config.dim)) for f in embeddings}
    rest = (config.content, config.content, config.content, ranker.content.out_features, config.summary)
    return fields | {f"of no column {n}": _labels(f"of no column {n}", width) for n, width in enumerate(rest)}


def _labels(name: str, width: int) -> list[str]:
    return [f"{name} {i}" for i in range(width)]


def _of(spec: TableSpec, level: Level, *kinds: Kind) -> list[Feature]:
    return [f for f in spec.features if f.level == level and f.kind in kinds]


def _places(old: Iterable[object], new: Iterable[object]) -> Tensor:
    """Where each old label stands among the new ones."""
    place = {label: n for n, label in enumerate(new)}
    return torch.tensor([place[label] for label in old], dtype=torch.long)


def _late(champion: Bundle, table: RankingTable) -> set[str]:
    """The champion's numeric columns without a value in any window so far, where the table has one.

    A feature is declared with the first delivery that names it, and its values may lie in a later window only.
    """
    found = set()
    for level, block in zip(LEVELS, (table.request_num, table.item_num), strict=True):
        norm = {k: champion.weights[f"numeric.{level}.norm.{k}"] for k in ("mean", "sometimes_missing", "knots")}
        empty_F = (norm["sometimes_missing"] > 0) & (norm["mean"] == 0) & ~norm["knots"].any(1)
        names = [f.name for f, empty in zip(_of(champion.spec, level, "numeric"), empty_F, strict=True) if empty]
        columns = [f.name for f in table.spec.of(level, hashed=False) for _ in range(f.width)]
        found |= {name for name in names if np.isfinite(block[:, columns.index(name)]).any()}
    return found


def _no_place(name: str) -> EvergreenError:
    return EvergreenError(
        f"the champion's weight {name} has no place in a model of the new features", _SCRATCH.capitalize()
    )
