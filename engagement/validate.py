"""Row validation: which rows of a delivery can be used, and why the others cannot.

Nothing here raises for a bad row. Every value is read as the contract's type; a value that was there before
the reading and not after it is of a bad type. Reasons, in the order in which they are looked for:

=================== ==================================================================================
null_key            an id or the timestamp is null, or an id is empty text
bad_type            a value cannot be read as its column's type
null_action         an action is neither true nor false
before_1970         the timestamp lies before 1970: a lost clock
future_timestamp    the row was shown, or became known, later than `now` (`>`)
unknown_item        the item is in no delivery of items
duplicate           the same row, in every column, came earlier in this delivery
other_user          the request belongs to another user in an earlier row
repeated_item       the item came earlier in this request, with other content; the first row is kept
repeated_user       users only: the user came earlier with the same timestamp and other content
changed             items and users only: differs from what the store holds under its key; the stored row is kept
=================== ==================================================================================

The last five need more than one row: `settle` finds them for engagements, `check_profiles` for items and
users. Beside rows, the quarantine names the files that an importer could not read (`unreadable_file`).
"""

from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from engagement.contract import Manifest, engagement_schema
from engagement.errors import EvergreenError
from engagement.reading import as_json, delivered, reading

MAX_BAD_SHARE = 0.10
"""An import stops when bad > MAX_BAD_SHARE * read, for engagements, items or users taken each by itself.

`read` counts all rows given. `bad` counts the quarantined ones, exact duplicates included, except those with
the reason `changed`: a profile delivered again with new content is no sign of a broken delivery. Exactly 10 %
passes. Files that cannot be read are judged by the same share of the table's files.
"""

BAD = pl.Schema({"table": pl.String, "reason": pl.String, "file": pl.String, "row_number": pl.Int64, "row": pl.String})


@dataclass(frozen=True)
class Checked:
    """The outcome of validation.

    Attributes:
        good: Rows in the stored columns and types, plus `_row` (their number in the delivery) and `_file`.
        bad: Rows in the columns of `BAD`; `row` is the row as it was given, in JSON.
    """

    good: pl.DataFrame
    bad: pl.DataFrame


def check_engagements(
    table: pa.Table, manifest: Manifest, known_items: pl.DataFrame, now_us: int, first_row: int = 0
) -> Checked:
    """Validate a batch of engagement rows, as far as rows can be judged one by one.

    Args:
        table: Rows as delivered; columns beyond the contract are ignored.
        manifest: What the delivery claims to be.
        known_items: One column `item_id`, unique.
        now_us: The present instant, microseconds.
        first_row: Number of the first row within the delivery.

    Raises:
        EvergreenError: A required column is missing.
    """
    schema = engagement_schema(manifest)
    raw = _frame(table, schema.names, required_columns(manifest), first_row, "engagements")
    cast = _read(raw, schema)
    mistyped = _mistyped(raw, cast)  # before defaults fill what could not be read
    event = pl.col("event_timestamp")
    cast = cast.with_columns(
        sampled=pl.lit(False),
        created_timestamp=pl.max_horizontal(event, pl.col("created_timestamp").fill_null(event)),
    )
    known = known_items.with_columns(_known=pl.lit(True))
    judged = cast.join(known, on="item_id", how="left", maintain_order="left")
    judged = judged.with_columns(
        _mistyped=mistyped,
        _null=_null_key(raw, cast, ["request_id", "user_id", "item_id", "event_timestamp"]),
    )
    reason = judged.select(
        pl.when("_null").then(pl.lit("null_key"))
        .when("_mistyped").then(pl.lit("bad_type"))
        .when(pl.any_horizontal(pl.col(a).is_null() for a in manifest.actions)).then(pl.lit("null_action"))
        .when(event.dt.timestamp("us") < 0).then(pl.lit("before_1970"))
        .when(pl.col("created_timestamp").dt.timestamp("us") > now_us).then(pl.lit("future_timestamp"))
        .when(pl.col("_known").is_null()).then(pl.lit("unknown_item"))
        .alias("_reason")
    ).to_series()  # fmt: skip
    return _split("engagements", raw, cast, reason, schema.names)


def check_profiles(table: pa.Table, schema: pa.Schema, room: str, now_us: int) -> Checked:
    """Validate all items or all users.

    Args:
        table: Rows as delivered.
        schema: The stored columns: the key first, its timestamp second.
        room: `items` or `users`.
        now_us: The present instant, microseconds. An item may be announced for later; a user row may not.
    """
    key, time = schema.names[:2]
    raw = _frame(table, schema.names, schema.names, 0, room)
    cast = _read(raw, schema)
    judged = cast.with_columns(_null=_null_key(raw, cast, [key, time]), _mistyped=_mistyped(raw, cast))
    if "embedding" in schema.names:
        judged = judged.with_columns(_mistyped=pl.col("_mistyped") | _odd_embedding(cast["embedding"]))
    late = pl.col(time).dt.timestamp("us") > now_us if room == "users" else pl.lit(False)
    reason = judged.select(
        pl.when("_null").then(pl.lit("null_key"))
        .when("_mistyped").then(pl.lit("bad_type"))
        .when(late).then(pl.lit("future_timestamp"))
        .alias("_reason")
    ).to_series()  # fmt: skip
    checked = _split(room, raw, cast, reason, schema.names)
    again = checked.good.select(
        pl.when(~pl.struct(schema.names).is_first_distinct()).then(pl.lit("duplicate"))
        .when(~pl.struct([key] if room == "items" else [key, time]).is_first_distinct())
        .then(pl.lit("repeated_item" if room == "items" else "repeated_user"))
        .alias("_reason")
    ).to_series()  # fmt: skip
    repeated = checked.good.with_columns(_reason=again).drop_nulls("_reason")
    return Checked(checked.good.filter(again.is_null()), pl.concat([checked.bad, as_bad(room, repeated, schema.names)]))


def required_columns(manifest: Manifest) -> list[str]:
    """Engagement columns that must be there."""
    return [
        "request_id",
        "user_id",
        "item_id",
        "event_timestamp",
        *manifest.actions,
        *manifest.context_features,
    ]


def as_bad(room: str, rows: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """Rows with `_reason`, `_file` and `_row` in the columns of the quarantine."""
    if not rows.height:
        return pl.DataFrame(schema=BAD)
    named = {
        "table": pl.lit(room),
        "reason": pl.col("_reason"),
        "file": pl.col("_file"),
        "row_number": pl.col("_row"),
    }
    return rows.select(**named, row=as_json(rows, columns)).cast(BAD)  # type: ignore[arg-type]


def to_stored(frame: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Polars to exactly the stored arrow types."""
    return frame.select(schema.names).to_arrow().cast(schema)


def _frame(table: pa.Table, wanted: list[str], required: list[str], first_row: int, room: str) -> pl.DataFrame:
    """The wanted columns, null where an optional one is absent, with `_row` and `_file`."""
    file = (table.schema.metadata or {}).get(b"file", b"").decode()
    for name in required:
        if name not in table.column_names:
            raise EvergreenError(f"{file or room} lacks the column '{name}'", "Add it, or correct the manifest")
    absent = pl.Series([None], dtype=pl.Null).new_from_index(0, table.num_rows)
    columns = {n: delivered(n, table.column(n)) if n in table.column_names else absent for n in wanted}
    rows = pl.int_range(first_row, first_row + table.num_rows, eager=True)
    return pl.DataFrame({**columns, "_row": rows}).with_columns(_file=pl.lit(file, pl.String))


def _read(raw: pl.DataFrame, schema: pa.Schema) -> pl.DataFrame:
    return raw.select("_row", "_file").with_columns([reading(raw[f.name], f.type).alias(f.name) for f in schema])


def _mistyped(raw: pl.DataFrame, cast: pl.DataFrame) -> pl.Series:
    names = [c for c in cast.columns if not c.startswith("_")]
    return _any([raw[c].is_not_null() & cast[c].is_null() for c in names])


def _null_key(raw: pl.DataFrame, cast: pl.DataFrame, keys: list[str]) -> pl.Series:
    return _any([raw[k].is_null() for k in keys] + [cast[k] == "" for k in keys if cast[k].dtype == pl.String])


def _any(flags: list[pl.Series]) -> pl.Series:
    found = flags[0].fill_null(False)
    for flag in flags[1:]:
        found = found | flag.fill_null(False)
    return found


def _odd_embedding(embedding: pl.Series) -> pl.Series:
    """Embeddings of another width than the most common one, or with a null or non-finite number inside."""
    widths = embedding.list.len()
    usual = widths.drop_nulls().mode().sort()
    odd = widths != (usual[0] if len(usual) else 0)
    finite = embedding.list.eval(pl.element().is_finite().fill_null(False)).list.all()
    return odd.fill_null(False) | ~finite.fill_null(True)


def _split(room: str, raw: pl.DataFrame, cast: pl.DataFrame, reason: pl.Series, columns: list[str]) -> Checked:
    bad = raw.with_columns(_reason=reason).drop_nulls("_reason")
    return Checked(cast.filter(reason.is_null()), as_bad(room, bad, columns))
