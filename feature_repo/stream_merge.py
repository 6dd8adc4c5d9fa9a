"""Merging streamed actions into the users' histories: pure functions over frames.

An action is named by (user, time, item): a request shows an item once, at one instant. Of several records of one
action the masks are OR-ed and the newest `known` counts, as in the log, which keeps an action as it was last known.
A history is its user's last `HISTORY_LENGTH` actions by (known, time, item). Both rules give the same result for any
order, any split into batches and any repetition, because an action that left a full history is older than all that
stayed, and would leave it again.

Users are numbers here, their places in a sorted list of ids: sorting and joining millions of actions is then cheap.
U users, N new actions, H actions in histories.
"""

import numpy as np
import polars as pl
import pyarrow as pa

from engagement.contract import TIMESTAMP
from feature_repo.features import ARROW, HISTORY, HISTORY_LENGTH

ACTIONS = pl.Schema(
    {"user": pl.UInt32, "known": pl.Int64, "time": pl.Int64, "item": pl.String, "actions": pl.Int64}
)  # instants in microseconds; bit `a` of `actions` is set for the a-th declared action
KEY = ["user", "time", "item"]
ORDER = ["user", "known", "time", "item"]
LATENESS_US = 3_600_000_000
"""A new action is too late when known < newest known of its user - LATENESS_US; exactly an hour behind is in time."""


def unrolled(rows: pa.Table) -> pl.DataFrame:
    """The stored histories as one frame of actions.

    Args:
        rows: (U,) the columns of `HISTORY`, a row a user; null where a user has none.
    """
    lists = pl.DataFrame({n: pl.from_arrow(rows.column(n)) for n, _ in HISTORY}).with_row_index("user")
    actions = lists.drop_nulls("item").explode([n for n, _ in HISTORY], empty_as_null=False)
    return actions.select(ACTIONS.names())


def too_late(old: pl.DataFrame, new: pl.DataFrame) -> pl.Series:
    """Which new actions come more than the lateness behind the newest action that their user had before them.

    What changes nothing is never too late, so that a batch that is read again after a crash is judged as it was the
    first time: an action that the history holds already, or one older than all of a full history.

    Args:
        old: (H,) the stored histories.
        new: (N,) actions in the order in which they arrived.

    Returns:
        (N,) booleans.
    """
    stored = old.group_by("user").agg(
        newest=pl.col("known").max(),
        # Up to here, a full history either leaves an action out or has let it in before.
        settled=pl.when(pl.len() >= HISTORY_LENGTH).then(pl.col("known").min()),
    )
    before = pl.col("known").cum_max().shift(1).over("user")
    judged = new.with_row_index("row").with_columns(before=before).join(stored, on="user", how="left")
    behind = judged.filter(
        pl.col("known") < pl.max_horizontal("before", "newest") - LATENESS_US,
        (pl.col("known") > pl.col("settled")).fill_null(True),
    )
    late: list[int] = []
    if behind.height:
        timely = new.with_row_index("row").join(behind, on="row", how="anti")
        there = [
            old.select(*KEY, held="actions", at=pl.lit(-1, pl.Int64)),
            timely.select(*KEY, held="actions", at=pl.col("row").cast(pl.Int64)),
        ]
        found = behind.join(pl.concat(there), on=KEY).filter(
            pl.col("at") < pl.col("row"), (pl.col("actions") | pl.col("held")) == pl.col("held")
        )
        late = behind.join(found, on="row", how="anti")["row"].to_list()
    return pl.int_range(new.height, eager=True).is_in(late)


def merge(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """The histories after the new actions, sorted by user, known, time and item.

    Args:
        old: (H,) the stored histories.
        new: (N,) actions in any order; one action may be there several times.
    """
    # Only actions that arrive can meet another record of themselves: everything else is passed on as it is.
    again = old.join(new, on=KEY, how="semi")
    met = pl.concat([again, new]).group_by(KEY).agg(pl.col("known").max(), pl.col("actions").bitwise_or())
    kept = old.join(new, on=KEY, how="anti") if again.height else old
    merged = pl.concat([kept, met.select(ACTIONS.names())]).sort(ORDER)
    return merged.filter(pl.int_range(pl.len(), 0, -1).over("user") <= HISTORY_LENGTH)


def rows(users: pl.Series, histories: pl.DataFrame) -> pa.Table:
    """Rows of the view `user_history`, one a user who has a history.

    A row is true from one microsecond after its newest action became known: who reads "at or before" then sees an
    action strictly after it became known. The materialisation of the log dates its rows in the same way.

    Args:
        users: (U,) their ids.
        histories: (H,) as `merge` gives them.
    """
    counts = histories["user"].rle().struct.unnest()
    ends = np.cumsum(counts["len"].to_numpy().astype(np.int64))
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    visible = pa.array(histories["known"].to_numpy()[ends - 1] + 1).cast(TIMESTAMP)
    found = {
        "user_id": _plain(users.gather(counts["value"])),
        "event_timestamp": visible,
        "created_timestamp": visible,
    }
    for name, kind in HISTORY:
        found[name] = pa.ListArray.from_arrays(offsets, _plain(histories[name]).cast(ARROW[kind].value_type))
    return pa.table(found)


def _plain(column: pl.Series) -> pa.Array:
    array = column.to_arrow(compat_level=pl.CompatLevel.oldest())
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return array.cast(pa.string()) if pa.types.is_large_string(array.type) else array
