"""From rows of the engagement log to requests with their candidates.

A request is ranked at the earliest `event_timestamp` of its rows; its context is that of its first row. Requests are
in time order (ties: by request and user id). Candidates are sorted by item id rather than by logged position, so that
nothing downstream can learn the logged order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import polars as pl

from engagement.errors import EvergreenError
from engagement.table import TableSpec

_KEY = ["request_id", "user_id"]
CONTEXT = "context__"


@dataclass(frozen=True)
class Asked:
    """One ranking request, as serving gets it."""

    user_id: str
    item_ids: tuple[str, ...]
    context: Mapping[str, str]
    at: datetime


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


def as_asked(asked: Sequence[Asked], spec: TableSpec, time: np.ndarray) -> Requests:
    """Requests that nobody has logged yet, in the order given; no action is set.

    Args:
        asked: R requests, each with a candidate or more.
        spec: The declaration.
        time: (R,) int64, microseconds, the instants as of which they are answered.
    """
    context = [f.name for f in spec.features if f.name.startswith(CONTEXT)]
    requests = pl.DataFrame(
        {
            "request_id": [str(i) for i in range(len(asked))],
            "user_id": [a.user_id for a in asked],
            **{c: pl.Series([a.context.get(c.removeprefix(CONTEXT)) for a in asked], dtype=pl.String) for c in context},
            ":time": time,
        }
    )
    owner = np.repeat(np.arange(len(asked)), [len(a.item_ids) for a in asked])
    candidates = pl.DataFrame(
        {
            ":request": owner.astype(np.uint32),
            ":time": time[owner],
            "item_id": [i for a in asked for i in a.item_ids],
        }
    ).with_columns(pl.lit(False).alias(name) for name in ("sampled", *spec.actions))
    return Requests(requests, candidates)


def with_category(candidates: pl.DataFrame, categories: pl.DataFrame) -> pl.DataFrame:
    """Candidates with the `category` of their item; null where it has none, or was not available at the request.

    Args:
        candidates: As in `Requests`.
        categories: Of each item `item_id`, `category` and `:created` (int64 microseconds).
    """
    joined = candidates.join(categories, on="item_id", how="left", maintain_order="left")
    there = pl.col(":created") <= pl.col(":time")
    return joined.with_columns(category=pl.when(there).then("category")).drop(":created")
