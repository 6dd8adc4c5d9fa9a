"""The sample of a window that drift is judged on: raw features, predicted scores and labels, one row a candidate.

The same table, at most `rules.REFERENCE_ROWS` rows of it, travels with a model as `reference.parquet`: a later check
then needs no old data, only the new window.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from monitoring import rules

SCORE, LABEL = "score_", "label_"
IDS = ("request_id", "user_id", "item_id")  # never compared as categories, only for churn


def sample_frame(
    sample: pa.Table,
    table: RankingTable,
    scores: np.ndarray,
    limit: int = rules.REFERENCE_ROWS,
    seed: int = 0,
) -> pa.Table:
    """Join raw feature values with what the model predicted and what happened.

    Args:
        sample: Raw feature values by feature name, with `request_id`, `item_id` and `row` (the row's index in `table`).
        table: The ranking table that the sample was drawn from.
        scores: (N, A) predicted probabilities for every row of `table`, in the order of `table.spec.actions`.
        limit: Most rows to keep; whole requests, in the order of a seeded hash of their id.
        seed: Seed of that order.

    Returns:
        The columns of `sample` without `row`, `user_id`, and `score_<action>` (float64) and `label_<action>` (bool)
        for each action, in the sample's order.

    Raises:
        EvergreenError: The sample, the table and the scores do not belong together.
    """
    rows = sample["row"].to_numpy().astype(np.int64)
    if scores.shape != (table.rows, len(table.spec.actions)) or (len(rows) and rows.max() >= table.rows):
        raise EvergreenError(
            f"scores {scores.shape} and sample rows do not fit a table of {table.rows} rows and "
            f"{len(table.spec.actions)} actions",
            "Score the table that the sample was drawn from",
        )
    frame = sample.drop_columns(["row"])
    if "user_id" not in frame.column_names:
        users = np.char.decode(table.user_id[table.request_of_row[rows]].astype(np.bytes_), "utf-8")
        frame = frame.append_column("user_id", pa.array(users.tolist(), pa.string()))
    for a, action in enumerate(table.spec.actions):
        frame = frame.append_column(SCORE + action, pa.array(scores[rows, a].astype(np.float64)))
        frame = frame.append_column(LABEL + action, pa.array(table.labels[rows, a].astype(bool)))
    return take_requests(frame, limit, seed)


def take_requests(frame: pa.Table, limit: int, seed: int = 0) -> pa.Table:
    """At most `limit` rows: whole requests in the order of a seeded hash of their id (one too large is cut)."""
    if frame.num_rows <= limit:
        return frame
    requests = frame["request_id"].cast(pa.string()).combine_chunks().dictionary_encode()
    hashes = np.array(
        [xxhash.xxh3_64_intdigest(r.encode(), seed=seed) for r in requests.dictionary.to_pylist()],
        dtype=np.uint64,
    )
    codes = requests.indices.to_numpy()
    sizes = np.bincount(codes, minlength=len(hashes))
    order = np.argsort(hashes, kind="stable")
    kept = order[: np.searchsorted(np.cumsum(sizes[order]), limit, side="right")]
    chosen = np.isin(codes, kept) if len(kept) else codes == order[0]
    return frame.filter(pa.array(chosen)).slice(0, limit)


def users_of(frame: pa.Table) -> np.ndarray:
    """(N,) the unit that rows are dependent within: the user, or the request where no user is known."""
    for name in ("user_id", "request_id"):
        if name in frame.column_names:
            return np.asarray(frame[name].cast(pa.string()).fill_null("").to_pylist())
    return np.arange(frame.num_rows).astype(str)


def numbers(column: pa.ChunkedArray, transform: str = "none") -> np.ndarray:
    """(N,) float64 with NaN for what is missing, infinite or no number, after the declared transform."""
    try:
        values = column.cast(pa.float64()).to_numpy().astype(np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.full(len(column), np.nan)
    values = np.where(np.isfinite(values), values, np.nan)
    return np.log1p(np.maximum(values, 0)) if transform == "log1p" else values


def texts(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) strings, None where the value is missing."""
    return np.asarray(column.cast(pa.string()).to_pylist(), dtype=object)


def unseen(reference: pa.ChunkedArray, current: pa.ChunkedArray) -> float:
    """Share of the current rows with a value that no reference row has; lists count if one of their values is new."""
    if not len(current):
        return 0.0
    if not pa.types.is_list(current.type) and not pa.types.is_large_list(current.type):
        known = current.drop_null()
        new = pc.invert(pc.is_in(known.cast(pa.string()), value_set=_values(reference)))
        return (pc.sum(new).as_py() or 0) / len(current)
    rows = pc.list_parent_indices(current.combine_chunks())
    values = pc.list_flatten(current.combine_chunks()).cast(pa.string())
    new = pc.invert(pc.is_in(values, value_set=_values(reference)))
    return pc.count_distinct(rows.filter(new)).as_py() / len(current)


def _values(column: pa.ChunkedArray) -> pa.Array:
    flat = column.combine_chunks()
    if pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = pc.list_flatten(flat)
    return flat.cast(pa.string()).unique()
