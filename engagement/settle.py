"""Settling: what becomes of the rows of whole requests, beside each other and beside what the store holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from engagement.sampling import complete
from engagement.validate import as_bad

STORED = -1  # `_row` of rows that the store already holds; deliveries count from 0
KEY = ["request_id", "item_id"]
_GIVEN = pl.col("_row") != STORED


@dataclass(frozen=True)
class Settled:
    """The outcome for one group of requests.

    Attributes:
        new: Rows to be stored, sampled candidates included, in the stored columns.
        bad: Rows for the quarantine, in the order of delivery.
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


def settle(group: pl.DataFrame, columns: list[str], items: pl.DataFrame | None, late: Sequence[str] = ()) -> Settled:
    """Decide about every row of a group of whole requests.

    Args:
        group: Stored columns with `_row` and `_file`: the delivered rows, and those that the store already holds of the
            same requests (`_row` = `STORED`): all logged ones, and at least one sampled one where there are any.
        columns: The stored columns.
        items: All items in order of creation, to complete new requests from; None where exposure is logged.
        late: Columns that the store did not have at first: a row from before them is present whatever they say now.
    """
    drawn = pl.col("sampled") & ~_GIVEN
    completed, group = group.filter(drawn).select("request_id").unique(), group.filter(~drawn)
    contested = _contested(group)
    judged = _judge(group.filter(contested), columns, late)
    alone = group.filter(~contested & _GIVEN).select(columns)
    accepted = judged.filter(pl.col("_reason").is_null())
    new = pl.concat([alone, accepted.filter(~pl.col("_present")).select(columns)])
    usable = pl.concat([alone, accepted.select(columns)])
    if items is not None:
        fresh = _to_complete(new, group.filter(~_GIVEN).select(columns), completed)
        new = pl.concat([new, complete(fresh, items)]) if fresh.height else new
    times = usable["event_timestamp"].dt.timestamp("us")
    return Settled(
        new=new,
        bad=as_bad("engagements", judged.filter(pl.col("_reason").is_not_null()).sort("_row"), columns),
        present=int(accepted["_present"].sum()),
        requests=usable["request_id"].hash().n_unique(),
        users=usable["user_id"].hash().unique(),
        span=(int(times.min()), int(times.max())) if usable.height else None,  # type: ignore[arg-type]
    )


def _to_complete(new: pl.DataFrame, stored: pl.DataFrame, completed: pl.DataFrame) -> pl.DataFrame:
    """All rows of the requests that are to be completed: those whose first row is new and that have no sampled one.

    A new request is one. So is a request that runs over midnight and lost the part of its first day, where its
    sampled rows lay too.
    """
    known = pl.concat([new.with_columns(_new=True), stored.with_columns(_new=False)])
    known = known.join(completed, on="request_id", how="anti").sort("event_timestamp", "item_id")
    first = known.group_by("request_id").agg(pl.col("_new").first()).filter("_new")
    return known.join(first.select("request_id"), on="request_id", how="semi").drop("_new")


def _contested(group: pl.DataFrame) -> pl.Series:
    """Rows that share their request and item with another row, or whose request has several users.

    Nearly all rows of a good delivery are alone, and need none of the comparisons below. Hashes decide; a
    collision can only send a row the long way.
    """
    hashed = group.select(
        request=pl.col("request_id").hash(),
        row=pl.col("request_id").hash() ^ pl.col("item_id").hash(seed=1),
        user=pl.col("user_id").hash(),
    )
    several = pl.col("user").min().over("request") != pl.col("user").max().over("request")
    return hashed.select(pl.col("row").is_duplicated() | several).to_series()


def _judge(rows: pl.DataFrame, columns: list[str], late: Sequence[str]) -> pl.DataFrame:
    """The delivered rows with `_reason`, null for the usable ones, and `_present` where the store holds the row."""
    rows = rows.sort("_row")  # stored rows first, then the order of delivery: the first row is right
    stored = rows.filter(~_GIVEN)
    held = stored.select(*KEY, _held=True)
    fixed = [c for c in columns if c not in late]
    same = stored.select(*fixed, *(pl.col(n).alias(f"_was_{n}") for n in late), _present=True)
    agrees = [pl.col(f"_was_{n}").is_null() | (pl.col(f"_was_{n}") == pl.col(n)).fill_null(value=False) for n in late]
    owner = rows.group_by("request_id", maintain_order=True).agg(pl.col("user_id").first().alias("_owner"))
    given = rows.filter(_GIVEN)
    given = given.with_columns(_reason=pl.when(~pl.struct(columns).is_first_distinct()).then(pl.lit("duplicate")))
    given = given.join(same, on=fixed, how="left", nulls_equal=True, maintain_order="left")
    given = given.with_columns(_present=pl.all_horizontal("_present", *agrees))
    given = given.join(owner, on="request_id", how="left", maintain_order="left")
    given = given.join(held, on=KEY, how="left", maintain_order="left")
    given = given.with_columns(pl.col("_present", "_held").fill_null(value=False))
    given = _blame(given, pl.col("user_id") != pl.col("_owner"), "other_user")
    free = pl.col("_reason").is_null()
    later = free & ~pl.struct(*KEY, free).is_first_distinct()
    return _blame(given, ~pl.col("_present") & (pl.col("_held") | later), "repeated_item")


def _blame(rows: pl.DataFrame, guilty: pl.Expr, reason: str) -> pl.DataFrame:
    """Give rows without a reason this one where `guilty`."""
    blamed = pl.when(pl.col("_reason").is_null() & guilty).then(pl.lit(reason)).otherwise(pl.col("_reason"))
    return rows.with_columns(_reason=blamed)
