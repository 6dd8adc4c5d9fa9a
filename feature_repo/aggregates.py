"""Trailing counts and smoothed rates of users and items, one row an entity and day.

The snapshot of a day holds what could be known at its midnight (00:00 UTC): rows shown before it and known before it.
Late rows therefore appear only in later snapshots, and a request at any time of the day reads numbers that end before
the day began. An entity has a row on each day within 30 days of a row of its own, and one more with zeros after them.
"""

from datetime import datetime, timedelta

import polars as pl

from feature_repo.encode import DAY_US
from feature_repo.features import RATE_DAYS, RATE_PRIOR_WEIGHT, Statistic

LOOK_BACK = timedelta(days=RATE_DAYS + 1)  # the closing row of zeros comes a day after the longest window


def snapshots(
    log: pl.DataFrame, key: str, stats: tuple[Statistic, ...], first: datetime, last: datetime
) -> dict[datetime, pl.DataFrame]:
    """Compute the rows of all midnights in [first, last].

    Args:
        log: Engagement rows; those shown in [first - LOOK_BACK, last) must be among them.
        key: `user_id` or `item_id`.
        stats: The statistics, in column order.
        first: First midnight, UTC.
        last: Last midnight, UTC.

    Returns:
        By midnight: key, event_timestamp and created_timestamp (both the midnight) and one double a statistic,
        sorted by key. Midnights without rows are left out.
    """
    actions = sorted({s.action for s in stats if s.action})
    rows = _contributions(log, key, actions, first, last)
    windows = sorted({s.days for s in stats})
    sums = [
        pl.col(f"n:{what}").filter(pl.col(":age") <= days).sum().alias(f"{what}:{days}")
        for what in ("", *actions)
        for days in windows
    ]
    counts = rows.group_by(":midnight", key).agg(sums)
    totals = counts.group_by(":midnight").agg(pl.exclude(":midnight", key).sum().name.suffix(":all"))
    midnight = (pl.col(":midnight") * DAY_US).cast(pl.Datetime("us", "UTC"))
    numbers = counts.join(totals, on=":midnight").select(
        key, event_timestamp=midnight, created_timestamp=midnight, **{s.name: _value(s) for s in stats}
    )
    parts = numbers.sort("event_timestamp", key).collect().partition_by("event_timestamp", maintain_order=True)
    return {part["event_timestamp"][0]: part for part in parts}


def _contributions(log: pl.DataFrame, key: str, actions: list[str], first: datetime, last: datetime) -> pl.LazyFrame:
    """One row for each (entity, day shown, day known) and each midnight that its counts enter.

    `:age` is how many days before the midnight the rows were shown: 1 to 30, and 31 for the closing row, which no
    window reaches. Days are numbered since 1970. Counts are `n:<action>`, impressions `n:`; the colons keep our names
    apart from the dataset's, which have none.
    """
    shown = pl.col("event_timestamp").dt.timestamp("us") // DAY_US
    known = pl.col("created_timestamp").dt.timestamp("us") // DAY_US
    daily = (
        log.lazy()
        .filter(~pl.col("sampled"))
        .group_by(key, shown.alias(":shown"), known.alias(":known"))
        .agg(pl.len().cast(pl.Int64).alias("n:"), *[pl.col(a).sum().cast(pl.Int64).alias(f"n:{a}") for a in actions])
    )
    ages = pl.LazyFrame({":age": range(1, RATE_DAYS + 2)}, schema={":age": pl.Int64})
    return (
        daily.join(ages, how="cross")
        .with_columns((pl.col(":shown") + pl.col(":age")).alias(":midnight"))
        .filter(pl.col(":known") < pl.col(":midnight"), pl.col(":midnight").is_between(_day(first), _day(last)))
    )


def _value(stat: Statistic) -> pl.Expr:
    count, shown = f"{stat.action or ''}:{stat.days}", f":{stat.days}"
    if not stat.rate:
        return pl.col(count).cast(pl.Float64)
    everyone = pl.col(f"{shown}:all")
    prior = pl.when(everyone > 0).then(pl.col(f"{count}:all") / everyone).otherwise(0.0)
    return (pl.col(count) + RATE_PRIOR_WEIGHT * prior) / (pl.col(shown) + RATE_PRIOR_WEIGHT)


def _day(instant: datetime) -> int:
    return int(instant.timestamp()) // 86_400
