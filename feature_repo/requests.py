"""From rows of the engagement log to requests with their candidates.

A request is ranked at the earliest `event_timestamp` of its rows; its context is that of its first row. Requests are
in time order (ties: by request and user id). Candidates are sorted by item id rather than by logged position, so that
nothing downstream can learn the logged order.
"""

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import polars as pl

from engagement.errors import EvergreenError
from engagement.table import TableSpec

_KEY = ["request_id", "user_id"]
CONTEXT = "context__"


@dataclass(frozen=True)
class Requests:
    """The requests of a window.

    Attributes:
        requests: (R rows) request_id, user_id, `:time` (int64 microseconds) and `context__*`.
        candidates: (N rows) `:request` (index), `:time`, item_id, sampled and one column an action, request by request.
    """

    requests: pl.DataFrame
    candidates: pl.DataFrame

    @property
    def time(self) -> np.ndarray:
        """(R,) int64, microseconds."""
        return self.requests[":time"].to_numpy()

    @property
    def offsets(self) -> np.ndarray:
        """(R + 1,) int64: where each request's candidates begin."""
        sizes = np.bincount(self.candidates[":request"].to_numpy(), minlength=len(self.requests))
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def labels(self, actions: tuple[str, ...]) -> np.ndarray:
        """(N, A) uint8."""
        return self.candidates.select(pl.col(a).fill_null(False).cast(pl.UInt8) for a in actions).to_numpy()


def collect(log: pl.DataFrame, spec: TableSpec, start: datetime, end: datetime) -> Requests:
    """Requests ranked in [start, end).

    Args:
        log: Engagement rows sorted by (event_timestamp, request_id, item_id); all rows of the requests, and those of
            requests that began before `start` but reach into the window.
        spec: The declaration.
        start: First instant, inclusive.
        end: Last instant, exclusive.

    Raises:
        EvergreenError: No request was ranked in the window.
    """
    context = [f.name.removeprefix(CONTEXT) for f in spec.features if f.name.startswith(CONTEXT)]
    shown = pl.col("event_timestamp")
    requests = (
        log.lazy()
        .group_by(_KEY, maintain_order=True)
        .agg(shown.min().alias(":start"), *[pl.col(c).first().alias(f"{CONTEXT}{c}") for c in context])
        .filter(pl.col(":start").is_between(start, end, closed="left"))
        .sort(":start", *_KEY)
        .with_columns(pl.col(":start").dt.timestamp("us").alias(":time"))
        .drop(":start")
        .with_row_index(":request")
        .collect()
    )
    if not len(requests):
        raise EvergreenError(
            f"no requests between {start:%Y-%m-%d %H:%M} and {end:%Y-%m-%d %H:%M}", "Choose a window with data"
        )
    candidates = (
        log.lazy()
        .join(requests.lazy().select(*_KEY, ":request", ":time"), on=_KEY, how="inner", maintain_order="left")
        .sort(":request", "item_id", maintain_order=True)
        .select(":request", ":time", "item_id", "sampled", *spec.actions)
        .collect()
    )
    return Requests(requests.drop(":request"), candidates)
