"""The users' actions in the order in which they became known, and what a request may see of them.

A user's history is stored once; a request points into it (`start`, `end`), as section 3 of TransAct's serving log does
it (Xia et al., KDD 2023). An action counts for a request only when it was known strictly before the request: an action
shown at one instant and reported at another is known from the later of the two.

Shapes: H actions, U users, R requests.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.features import HISTORY_LENGTH


@dataclass(frozen=True)
class ActionLog:
    """Real rows with at least one action, sorted by user and then by when they became known.

    Attributes:
        users: (U,) the users that have actions, ascending.
        offsets: (U + 1,) int64; user `u` owns the actions `offsets[u]:offsets[u + 1]`.
        known: (H,) int64, microseconds; a request strictly later sees the action.
        time: (H,) int64, microseconds; when the item was shown.
        actions: (H,) int64; bit `a` is set for the `a`-th declared action.
        item: (H,) item ids.
    """

    users: pa.Array
    offsets: np.ndarray
    known: np.ndarray
    time: np.ndarray
    actions: np.ndarray
    item: pa.Array

    @classmethod
    def of(cls, actions: pl.DataFrame, users: pl.Series | None = None, before_us: int | None = None) -> "ActionLog":
        """Put actions into order.

        Args:
            actions: The actions (`Partials.actions`).
            users: Whose actions; everybody's by default.
            before_us: Leave out what became known at or after this instant.
        """
        rows = actions if before_us is None else actions.filter(pl.col("known") < before_us)
        if users is not None:
            rows = rows.filter(pl.col("user_id").is_in(users.unique().implode()))
        # All columns make the order, and so the last hundred, independent of the order of the log.
        rows = rows.sort("user_id", "known", "time", "item_id", "actions")
        counts = rows.group_by("user_id", maintain_order=True).len()
        return cls(
            users=text(counts["user_id"]),
            offsets=np.concatenate([[0], np.cumsum(counts["len"].to_numpy())]).astype(np.int64),
            known=rows["known"].to_numpy(),
            time=rows["time"].to_numpy(),
            actions=rows["actions"].to_numpy(),
            item=text(rows["item_id"]),
        )

    def pointers(self, users: pa.Array, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last `HISTORY_LENGTH` actions that each request may see.

        Args:
            users: (R,) whose request it is.
            time: (R,) int64, microseconds.

        Returns:
            (R,) start and (R,) end, int64; equal where the user has no known action.
        """
        owner = self._rank(users)
        first = self.offsets[np.maximum(owner, 0)]
        end, high = first.copy(), np.where(owner >= 0, self.offsets[owner + 1], first)
        # One binary search within each request's own user, all of them at once.
        while (open_ := np.flatnonzero(end < high)).size:
            middle = (end[open_] + high[open_]) // 2
            earlier = self.known[middle] < time[open_]
            end[open_] = np.where(earlier, middle + 1, end[open_])
            high[open_] = np.where(earlier, high[open_], middle)
        return np.maximum(first, end - HISTORY_LENGTH), end

    def last_time(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(R,) float64, microseconds of the newest action that each request sees; NaN without one."""
        if not len(self.time):
            return np.full(len(end), np.nan)
        return np.where(end > start, self.time[np.maximum(end - 1, 0)].astype(np.float64), np.nan)

    def last_within(self, low_us: int, high_us: int) -> np.ndarray:
        """Indices of each user's last action that became known in [low_us, high_us), for users that have one."""
        owner = self._owner
        inside = np.flatnonzero((self.known >= low_us) & (self.known < high_us))
        is_last = np.append(owner[inside][1:] != owner[inside][:-1], True)[: len(inside)]
        return inside[is_last]

    def arrays(self, last: np.ndarray) -> dict[str, pa.Array]:
        """The `HISTORY_LENGTH` actions up to and with each given one, oldest first, as the columns of `HISTORY`."""
        owner = np.searchsorted(self.offsets, last, side="right") - 1
        first = np.maximum(self.offsets[owner], last + 1 - HISTORY_LENGTH)
        length = last + 1 - first
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
        index = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], length)

        def lists(values: pa.Array) -> pa.Array:
            return pa.ListArray.from_arrays(pa.array(offsets), values)

        return {
            "time": lists(pa.array(self.time[index])),
            "known": lists(pa.array(self.known[index])),
            "actions": lists(pa.array(self.actions[index])),
            "item": lists(self.item.take(pa.array(index))),
        }

    def owners(self, index: np.ndarray) -> pa.Array:
        """The user of each of the given actions."""
        return self.users.take(pa.array(self._owner[index]))

    @cached_property
    def _owner(self) -> np.ndarray:
        # (H,) the position of each action's user in `self.users`.
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    def _rank(self, users: pa.Array) -> np.ndarray:
        # (R,) position of each user in `self.users`, -1 for users without any action.
        return pc.fill_null(pc.index_in(users, self.users), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def text(column: pl.Series) -> pa.Array:
    """A column of text as one Arrow array of strings."""
    array = column.to_arrow().cast(pa.string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
