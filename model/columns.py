"""Columns of tables and models: where a feature stands, and how two of them differ.

Plain numpy: a served model narrows its requests without PyTorch.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache

import numpy as np

from engagement.errors import EvergreenError
from engagement.table import MISSING, Feature, Level, RankingTable, TableSpec

USER_FEATURE, ITEM_FEATURE = "user_id", "item_id"  # histories hold hashes of the latter


def place_of(spec: TableSpec, level: Level, name: str) -> tuple[int, int]:
    """Which of a level's hashed features has this name, and which column of the block it is.

    Raises:
        EvergreenError: There is no such categorical feature.
    """
    column = 0
    for place, feature in enumerate(spec.of(level, hashed=True)):
        if feature.name == name and feature.kind == "categorical":
            return place, column
        column += feature.width
    raise EvergreenError(
        f"the features have no categorical {level} feature {name!r}",
        "Declare it: histories and content vectors are matched by it",
    )


def changes(old: TableSpec, new: TableSpec) -> tuple[Feature, ...]:
    """The features that `new` has and `old` has not, in the order of `new`.

    Raises:
        EvergreenError: Anything else differs: features vanished, were renamed, changed or stand in another order, or
            the actions are others. It names them.
    """
    before, after = ({f.name: f for f in spec.features} for spec in (old, new))
    added = tuple(f for f in new.features if f.name not in before)
    gone, kept = before.keys() - after.keys(), [name for name in before if name in after]
    problems = []
    if gone:
        others = f" while {_names(f.name for f in added)} came: a feature with a new name is another feature"
        problems.append(f"{_names(n for n in before if n in gone)} vanished{others if added else ''}")
    for name in kept:
        old_values, values = asdict(before[name]), asdict(after[name])
        differing = [k for k in values if values[k] != old_values[k]]
        problems += [f"the {k} of {name!r} was {old_values[k]} and is {values[k]}" for k in differing]
    for role in ("actions", "primary_action", "negative_actions"):
        if getattr(old, role) != getattr(new, role):
            was, now = (", ".join(np.atleast_1d(getattr(spec, role))) or "none" for spec in (old, new))
            problems.append(f"{role} was {was} and is {now}")
    if not problems and kept != [f.name for f in new.features if f.name in before]:
        problems.append("they stand in another order")
    if problems:
        raise EvergreenError(
            f"the table has other features or actions than the model was trained on: {'; '.join(problems)}",
            "Bring them back as they were, or train with --strategy scratch",
        )
    return added


def widen_table(table: RankingTable, spec: TableSpec) -> RankingTable:
    """An old table as one of a spec with more features: no value (`MISSING`, NaN) in the new columns.

    Raises:
        EvergreenError: As `changes`.
    """
    if table.spec == spec:
        return table
    blocks = {}
    for block, columns in _picks(spec, table.spec).items():
        old = getattr(table, block)
        level: Level = "request" if block.startswith("request") else "candidate"
        width, nothing = spec.width(level, block.endswith("cat")), MISSING if block.endswith("cat") else np.nan
        blocks[block] = np.full((len(old), width), nothing, old.dtype)
        blocks[block][:, columns] = old
    return replace(table, spec=spec, **blocks)


def narrowed(table: RankingTable, spec: TableSpec) -> RankingTable:
    """The columns of a table that an older model knows.

    Raises:
        EvergreenError: As `changes`.
    """
    if table.spec == spec:
        return table
    blocks = {block: getattr(table, block)[:, columns] for block, columns in _picks(table.spec, spec).items()}
    return replace(table, spec=spec, **blocks)


@cache
def _picks(more: TableSpec, fewer: TableSpec) -> dict[str, np.ndarray]:
    """By column block, the columns of `fewer` among those of `more`."""
    changes(fewer, more)
    blocks = {"request_cat": True, "request_num": False, "item_cat": True, "item_num": False}
    picks = {}
    for block, hashed in blocks.items():
        level: Level = "request" if block.startswith("request") else "candidate"
        few, many = ([(f.name, i) for f in s.of(level, hashed) for i in range(f.width)] for s in (fewer, more))
        place = {label: n for n, label in enumerate(many)}
        picks[block] = np.array([place[label] for label in few], np.int64)
    return picks


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
