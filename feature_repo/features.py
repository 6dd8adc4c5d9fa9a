"""The one declaration of the features: what there is, where it lives, and what the ranker gets.

Feast's views, the Parquet behind them, the columns of the ranking table, Evidently's data definition and the serving
request all derive from `declare`. A feature that a view holds is named as Feast names it, `<view>__<column>`, so that
one name means one thing everywhere; features without `__` are worked out when a request is ranked.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engagement.contract import Manifest
from engagement.errors import EvergreenError
from engagement.table import Feature, Kind, Level, TableSpec

SERVICE = "ranker_v1"
HISTORY_LENGTH = 100  # recent actions a request may look at, as in TransAct (Xia et al., KDD 2023)
CATEGORIES_WIDTH = 8  # of a list<string> the first eight count
WINDOWS = {"1h": 1, "1d": 24, "7d": 7 * 24, "30d": 30 * 24}  # hours; the last is the longest
LONGEST = "30d"
RATE_PRIOR_WEIGHT = 20.0  # impressions' worth of trust in the global rate
# Longer than the longest gap between two slots; a stopped pipeline serves nulls rather than old counts.
STATS_TTL = timedelta(days=7)
# Columns of item_profile that are no features themselves: the age is worked out from one, the other is a join key.
ITEM_CREATED, ITEM_CATEGORY = "_created_us", "_category"
_TAKEN = ("event_timestamp", "created_timestamp", "embedding")  # columns of every profile view

Entity = Literal["user", "item", "category"]
JOIN_KEY: dict[Entity, str] = {"user": "user_id", "item": "item_id", "category": "category"}
# Column types of a view, in the few types that Feast, Parquet and the online store share.
ColumnType = Literal["string", "strings", "float", "floats", "int", "ints"]
_TYPE_OF_KIND: dict[Kind, ColumnType] = {
    "categorical": "string",
    "categories": "strings",
    "numeric": "float",
    "embedding": "floats",
}
ARROW: dict[ColumnType, pa.DataType] = {
    "string": pa.string(),
    "strings": pa.list_(pa.string()),
    "float": pa.float64(),
    "floats": pa.list_(pa.float32()),
    "int": pa.int64(),
    "ints": pa.list_(pa.int64()),
}

# A user's newest actions, oldest first, in the order (known, time, item). Only `known` tells what a request may see
# and where an action that comes late belongs.
HISTORY: tuple[tuple[str, ColumnType], ...] = (
    ("time", "ints"),
    ("known", "ints"),
    ("actions", "ints"),
    ("item", "strings"),
)


@dataclass(frozen=True)
class Statistic:
    """One trailing number about a user, an item, a category or a user and a category, as of a whole hour UTC.

    Attributes:
        name: Column of the stats view.
        action: The action counted; None counts impressions.
        window: Length of the window that ends at that hour, one of `WINDOWS`.
        rate: False for the plain count; True for `(count + m * prior) / (impressions + m)`, where `prior` is the
            rate over all rows in the same window and `m` is `RATE_PRIOR_WEIGHT`.
    """

    name: str
    action: str | None
    window: str
    rate: bool


@dataclass(frozen=True)
class View:
    """One Feast view.

    Attributes:
        name: View name.
        entities: What one row is about; their join keys together are the key.
        ttl: How long a row stays true; zero for ever.
        columns: (name, type) of the columns besides key and timestamps.
        offline: Whether the training join reads it. The history is not joined: the ranking table points into the log.
    """

    name: str
    entities: tuple[Entity, ...]
    ttl: timedelta
    columns: tuple[tuple[str, ColumnType], ...]
    offline: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        """The join keys."""
        return tuple(JOIN_KEY[e] for e in self.entities)

    @property
    def level(self) -> Level:
        """`request` for what is the same for all candidates of a request, else `candidate`."""
        return "request" if self.entities == ("user",) else "candidate"


def statistics(actions: tuple[str, ...], primary_action: str) -> tuple[Statistic, ...]:
    """The trailing numbers that each stats view has, in column order."""
    others = [a for a in actions if a != primary_action]
    return (
        *(Statistic(f"impressions_{w}", None, w, rate=False) for w in WINDOWS),
        *(Statistic(f"count_{primary_action}_{w}", primary_action, w, rate=False) for w in WINDOWS),
        *(Statistic(f"rate_{primary_action}_{w}", primary_action, w, rate=True) for w in WINDOWS),
        *(Statistic(f"rate_{a}_{LONGEST}", a, LONGEST, rate=True) for a in others),
    )


def declare(manifest: Manifest, item_schema: pa.Schema, user_schema: pa.Schema) -> TableSpec:
    """Declare every feature of a dataset.

    Args:
        manifest: Which columns are features.
        item_schema: Types of the item columns. An embedding's width is that of its fixed-size list (`sized` gives it).
        user_schema: Types of the user columns.

    Raises:
        EvergreenError: A feature column is missing, has a type that no feature can have, or an embedding has no width.
    """
    stats = statistics(manifest.actions, manifest.primary_action)
    for entity, names in (("user", manifest.user_features), ("item", manifest.item_features)):
        for name in set(names) & set(_TAKEN):
            raise EvergreenError(
                f"'{name}' cannot name a feature of an {entity}", "Rename the column and the manifest's entry"
            )
    user = [_profile("user", n, user_schema) for n in manifest.user_features]
    item = [_profile("item", n, item_schema) for n in manifest.item_features]
    if "embedding" in item_schema.names:
        item.append(_profile("item", "embedding", item_schema))
    grouped = ("category_stats", "user_category_stats") if _category(item) else ()
    features = (
        Feature("user_id", "request", "categorical"),
        *user,
        *(Feature(f"context__{n}", "request", "categorical") for n in manifest.context_features),
        Feature("hour_of_day", "request", "categorical"),
        Feature("day_of_week", "request", "categorical"),
        *(_stat("user_stats", "request", s) for s in stats),
        Feature("days_since_action", "request", "numeric", transform="log1p"),
        Feature("item_id", "candidate", "categorical"),
        *item,
        *(_stat(view, "candidate", s) for view in ("item_stats", *grouped) for s in stats),
        Feature("item_age_days", "candidate", "numeric", transform="log1p"),
    )
    return TableSpec(features, manifest.actions, manifest.primary_action, manifest.negative_actions)


def views(spec: TableSpec) -> tuple[View, ...]:
    """The Feast views that hold the declared features."""
    never = timedelta(0)
    hidden: tuple[tuple[str, ColumnType], ...] = ((ITEM_CREATED, "int"),)
    if category_of(spec):
        hidden = (*hidden, (ITEM_CATEGORY, "string"))
    item_columns = (*hidden, *_columns(spec, "item_profile"))
    found = (
        View("user_profile", ("user",), never, _columns(spec, "user_profile")),
        View("item_profile", ("item",), never, item_columns),
        View("user_stats", ("user",), STATS_TTL, _columns(spec, "user_stats")),
        View("item_stats", ("item",), STATS_TTL, _columns(spec, "item_stats")),
        View("category_stats", ("category",), STATS_TTL, _columns(spec, "category_stats")),
        View("user_category_stats", ("user", "category"), STATS_TTL, _columns(spec, "user_category_stats")),
        View("user_history", ("user",), never, HISTORY, offline=False),
    )
    return tuple(v for v in found if v.columns)


def category_of(spec: TableSpec) -> str | None:
    """The column of the items that gives an item's category: the first list of text (its first value), else text."""
    return _category([f for f in spec.features if f.name.startswith("item_profile__")])


def sized(items: pa.Table) -> pa.Table:
    """Items with the embedding as a fixed-size list, of the commonest width; other widths become null."""
    if "embedding" not in items.column_names:
        return items
    index = items.column_names.index("embedding")
    column = items.column(index).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    found, times = np.unique(lengths[lengths > 0], return_counts=True)
    if not len(found):
        return items.remove_column(index)
    width = int(found[np.argmax(times)])
    whole = lengths == width
    values = np.zeros((len(column), width), np.float32)
    values[whole] = pc.list_flatten(column.filter(pa.array(whole))).to_numpy(zero_copy_only=False).reshape(-1, width)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width, mask=pa.array(~whole))
    return items.set_column(index, pa.field("embedding", fixed.type), fixed)


def _columns(spec: TableSpec, view: str) -> tuple[tuple[str, ColumnType], ...]:
    parts = [(f.name.split("__", 1), f.kind) for f in spec.features]
    return tuple((name[1], _TYPE_OF_KIND[kind]) for name, kind in parts if name[0] == view and len(name) == 2)


def _category(item: list[Feature]) -> str | None:
    hashed = [f for kind in ("categories", "categorical") for f in item if f.kind == kind]
    return hashed[0].name.removeprefix("item_profile__") if hashed else None


def _stat(view: str, level: Level, stat: Statistic) -> Feature:
    return Feature(f"{view}__{stat.name}", level, "numeric", transform="none" if stat.rate else "log1p")


def _profile(entity: Entity, name: str, schema: pa.Schema) -> Feature:
    if name not in schema.names:
        raise EvergreenError(
            f"the {entity}s lack the column '{name}' that the manifest names", "Import the dataset again"
        )
    kind, width = _kind(entity, name, schema.field(name).type)
    return Feature(f"{entity}_profile__{name}", _level(entity), kind, width)


def _kind(entity: Entity, name: str, found: pa.DataType) -> tuple[Kind, int]:
    if pa.types.is_string(found):
        return "categorical", 1
    if pa.types.is_list(found) and pa.types.is_string(found.value_type):
        return "categories", CATEGORIES_WIDTH
    if pa.types.is_floating(found) or pa.types.is_integer(found):
        return "numeric", 1
    if pa.types.is_fixed_size_list(found) and pa.types.is_floating(found.value_type):
        return "embedding", found.list_size
    raise EvergreenError(
        f"column '{name}' of the {entity}s has the type {found}, which no feature can have",
        "Give it as string, list<string> or a number, an embedding as lists of one length",
    )


def _level(entity: Entity) -> Level:
    return "request" if entity == "user" else "candidate"
