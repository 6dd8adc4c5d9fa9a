"""Settling: what becomes of the rows of whole requests, beside each other and beside what the store holds."""

from dataclasses import dataclass

import polars as pl

from engagement.sampling import complete
from engagement.validate import as_bad

STORED = -1  # `_row` of rows that the store already holds; deliveries count from 0
KEY = ["request_id", "item_id"]


@dataclass(frozen=True)
class Settled:
    """The outcome for one group of requests.

    Attributes:
        new: Rows to be stored, sampled candidates included, in the stored columns.
        bad: Rows for the quarantine.
        present: Delivered rows that the store already holds.
        requests: Distinct requests with a usable row in the delivery.
        users: (U,) UInt64 hashes of the distinct users among them.
        span: Earliest and latest `event_timestamp` of usable rows, microseconds; None without any.
    """

    new: pl.DataFrame
    bad: pl.DataFrame
    present: int
    requests: int
    users: pl.Series
    span: tuple[int, int] | None


def settle(group: pl.DataFrame, columns: list[str], items: pl.DataFrame | None) -> Settled:
    """Decide about every row of a group of whole requests.

    Args:
        group: Stored columns with `_row` and `_file`: the delivered rows, and those that the store already holds
            of the same requests (`_row` = `STORED`).
        columns: The stored columns.
        items: All items in order of creation, to complete new requests from; None where exposure is logged.
    """
    group = group.sort("_row")
    stored = group.filter((pl.col("_row") == STORED) & ~pl.col("sampled")).select(columns)
    given = group.filter(pl.col("_row") != STORED)
    again = ~pl.struct(columns).is_first_distinct()
    given = given.with_columns(reason=pl.when(again).then(pl.lit("duplicate")))
    same = given.select(*columns).join(
        stored.with_columns(_same=pl.lit(True)),
        on=columns,
        how="left",
        nulls_equal=True,
        maintain_order="left",
    )
    given = given.with_columns(_present=same["_same"].fill_null(False))
    owner = group.group_by("request_id", maintain_order=True).agg(pl.col("user_id").first().alias("_owner"))
    given = given.join(owner, on="request_id", how="left", maintain_order="left")
    given = _blame(given, pl.col("user_id") != pl.col("_owner"), "other_user")
    held = given.select(KEY).join(
        stored.select(*KEY, pl.lit(True).alias("_held")), on=KEY, how="left", maintain_order="left"
    )
    given = given.with_columns(_held=held["_held"].fill_null(False))
    free = pl.col("reason").is_null()
    given = _blame(
        given,
        ~pl.col("_present") & (pl.col("_held") | (free & ~pl.struct(*KEY, free).is_first_distinct())),
        "repeated_item",
    )
    usable = given.filter(free)
    new = usable.filter(~pl.col("_present")).select(columns)
    if items is not None and new.height:
        fresh = new.join(
            group.filter(pl.col("_row") == STORED).select("request_id").unique(), on="request_id", how="anti"
        )
        if fresh.height:
            new = pl.concat([new, complete(fresh, items)])
    times = usable["event_timestamp"].dt.timestamp("us")
    return Settled(
        new=new,
        bad=as_bad("engagements", given.filter(~free), columns),
        present=int(usable["_present"].sum()),
        requests=usable["request_id"].n_unique(),
        users=usable["user_id"].unique().hash(seed=0),
        span=(int(times.min()), int(times.max())) if usable.height else None,  # type: ignore[arg-type]
    )


def _blame(rows: pl.DataFrame, guilty: pl.Expr, reason: str) -> pl.DataFrame:
    """Give rows without a reason this one where `guilty`."""
    blamed = pl.when(pl.col("reason").is_null() & guilty).then(pl.lit(reason)).otherwise(pl.col("reason"))
    return rows.with_columns(reason=blamed)
