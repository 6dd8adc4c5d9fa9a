"""Items and users of a delivery, beside those that the store holds: what is new, what changed, what is bad."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from engagement.contract import Manifest, item_schema, user_schema
from engagement.errors import EvergreenError
from engagement.files import read_part
from engagement.index import Part, Room
from engagement.reading import as_json, frame
from engagement.validate import as_bad, check_profiles


@dataclass(frozen=True)
class Profiles:
    """The outcome for one of the two tables.

    Attributes:
        schema: The stored columns.
        new: Rows to be stored, in the stored columns, sorted by (timestamp, key).
        known: Key and timestamp of all rows, stored and new, in the same order.
        bad: Rows for the quarantine.
        read: Rows delivered.
        usable: Rows that are new or present.
    """

    schema: pa.Schema
    new: pl.DataFrame
    known: pl.DataFrame
    bad: pl.DataFrame
    read: int
    usable: int


def merge(root: Path, parts: list[Part], room: Room, table: pa.Table, manifest: Manifest, now_us: int) -> Profiles:
    """Validate delivered profiles and keep those that the store does not hold.

    A profile is never replaced: a run that has read it must be repeatable. An item is identified by its id, a
    user row by id and timestamp; a changed user is a row with a later timestamp.

    Args:
        root: The store's directory.
        parts: Its parts of this room.
        room: `items` or `users`.
        table: The delivery.
        manifest: What the delivery claims to be.
        now_us: The present instant, microseconds.

    Raises:
        EvergreenError: A column is missing, or a feature has another type than before.
    """
    held = [read_part(root / p.path) for p in parts]
    if not table.num_columns and not table.num_rows:  # no users directory at all
        names = ["user_id", "event_timestamp", *manifest.user_features]
        table = pa.table({n: pa.array([], pa.string()) for n in names})
    schema = item_schema(manifest, table.schema) if room == "items" else user_schema(manifest, table.schema)
    if held:
        schema = _same_types(room, schema, pa.unify_schemas([h.schema for h in held]), table)
    key, time = schema.names[:2]
    keys = [key] if room == "items" else [key, time]
    checked = check_profiles(table, schema, room, now_us)
    stored = frame(pa.concat_tables(held, promote_options="default")) if held else checked.good.clear()
    content = [n for n in schema.names if n in stored.columns]
    # A feature that came later is no change of the rows from before: they stay without a value.
    late = [n for n in content if not all(n in h.schema.names for h in held)]
    before = stored.select(*keys, _before=as_json(stored, content), **{f"_no_{n}": pl.col(n).is_null() for n in late})
    beside = checked.good.join(before, on=keys, how="left", maintain_order="left")
    shown = beside.with_columns(pl.when(~pl.col(f"_no_{n}").fill_null(value=False)).then(n).alias(n) for n in late)
    changed = beside.filter(pl.col("_before").is_not_null() & (pl.col("_before") != as_json(shown, content)))
    new = beside.filter(pl.col("_before").is_null()).select(schema.names).sort(time, key)
    bad = pl.concat([checked.bad, as_bad(room, changed.with_columns(_reason=pl.lit("changed")), schema.names)])
    return Profiles(
        schema=schema,
        new=new,
        known=pl.concat([stored.select(key, time), new.select(key, time)]).sort(time, key),
        bad=bad,
        read=table.num_rows,
        usable=beside.height - changed.height,
    )


def _same_types(room: Room, schema: pa.Schema, stored: pa.Schema, table: pa.Table) -> pa.Schema:
    """The delivery's schema, with the stored type for a column that has no value in this delivery."""
    for number, column in enumerate(schema):
        if column.name not in stored.names or column.type == stored.field(column.name).type:
            continue
        expected = stored.field(column.name).type
        if table.column(column.name).null_count < table.num_rows:
            raise EvergreenError(
                f"column '{column.name}' of {room} is {column.type}, and {expected} in the store",
                "Deliver it as before",
            )
        schema = schema.set(number, pa.field(column.name, expected))
    return schema
