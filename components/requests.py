"""The latest real requests: what the canary replays, and what train/serve parity is measured on."""

from datetime import datetime, timedelta

import polars as pl

from engagement.snapshot import Snapshot
from serving.protocol import RankRequest

REQUESTS = 200
DAYS = 14


def latest_requests(snapshot: Snapshot, as_of: datetime) -> list[RankRequest]:
    """The last `REQUESTS` requests of the last `DAYS` days, oldest first, each asked again at `as_of`."""
    context = list(snapshot.manifest.context_features)
    rows = pl.DataFrame(snapshot.engagements(as_of - timedelta(days=DAYS), as_of))
    first = [pl.col("user_id").first(), pl.col("event_timestamp").min(), *(pl.col(c).first() for c in context)]
    requests = rows.group_by("request_id").agg(pl.col("item_id"), *first).sort("event_timestamp", "request_id")
    return [
        RankRequest(
            request_id=r["request_id"],
            user_id=r["user_id"],
            item_ids=tuple(r["item_id"]),
            context={c: r[c] for c in context if r[c] is not None},
            time=as_of,
        )
        for r in requests.tail(REQUESTS).to_dicts()
    ]
