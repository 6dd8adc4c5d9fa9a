"""What only serving makes of the serving log: requests to be asked again, and train/serve parity of what was served.

Reading it and joining it with later actions is in `engagement.served`, for all rooms.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl

from engagement.index import from_us
from engagement.served import LIVE, ServedFeatures, read, read_features
from engagement.snapshot import Snapshot
from engagement.table import RankingTable
from feature_repo.parity import Asked, Parity, compare
from feature_repo.repo import FeatureRepo
from feature_repo.views import Inputs
from serving.protocol import RankRequest


def live_requests(rows: pl.DataFrame, context: list[str]) -> list[RankRequest]:
    """The requests of live users among rows of the log, oldest first, each once; asked again as of its own instant.

    Args:
        rows: Rows as `engagement.served.read` gives them; failed requests, whose candidates nobody noted, are left out.
        context: Names of the context features.
    """
    live = rows.filter((pl.col("purpose") == LIVE) & pl.col("item_id").is_not_null())
    live = live.filter(pl.col("created_timestamp") == pl.col("created_timestamp").max().over("request_id"))
    named = [c for c in context if c in live.columns]
    first = [pl.col(c).first() for c in ("user_id", "event_timestamp", *named)]
    requests = live.group_by("request_id").agg(pl.col("item_id"), *first).sort("event_timestamp", "request_id")
    return [RankRequest.logged(r, named, r["event_timestamp"]) for r in requests.to_dicts()]


def parity(repo: FeatureRepo, snapshot: Snapshot, directory: Path, start: datetime, end: datetime) -> Parity | None:
    """Compare the features that were logged as requests were served with the offline features of the same instants.

    Degraded answers keep no features: what they were served is known to be old.

    Args:
        repo: The features of a home.
        snapshot: What was known by the latest request, or later.
        directory: The serving log.
        start: First instant of a request.
        end: Last instant, exclusive.

    Returns:
        None where no features were logged.
    """
    spec = Inputs(snapshot).spec  # features of an older declaration cannot be compared
    context = {r["request_id"]: r for r in read(directory, start, end).unique("request_id").to_dicts()}
    names = list(snapshot.manifest.context_features)
    asked, online, as_of = [], [], []
    for features in read_features(directory, start, end):
        for table, known in _each(features):
            row = context.get(table.request_id[0].decode())
            if row is None or table.spec != spec:
                continue
            items = tuple(i.decode() for i in table.item_id)
            said = {n: row[n] for n in names if row.get(n) is not None}
            asked.append(Asked(table.user_id[0].decode(), items, said, from_us(int(table.time[0]))))
            online.append(table)
            as_of.append(known)
    return compare(repo, snapshot, asked, online, as_of) if asked else None


def _each(features: ServedFeatures) -> Iterator[tuple[RankingTable, datetime]]:
    """One table a request, in which other requests' candidates and histories do not show."""
    for i, known in enumerate(features.as_of):
        yield features.table.select(np.array([i])), known
