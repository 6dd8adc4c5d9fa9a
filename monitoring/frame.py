"""The sample of a window that drift is judged on: raw features, predictions and labels, one row a candidate.

The same table, at most `rules.REFERENCE_ROWS` rows of it, travels with a model as `reference.parquet`: a
later check then needs no old data, only the new window.
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
        sample: Raw feature values by feature name, with `request_id`, `item_id` and `row` (index in `table`).
        table: The ranking table that the sample was drawn from.
        scores: (N, A) predicted probabilities of every row of `table`, in the order of `table.spec.actions`.
        limit: Most rows to keep: whole requests, in the order of a seeded hash of their id.
        seed: Seed of that order.

    Returns:
        The columns of `sample` without `row`, then `user_id`, and for each action `score_<action>` (float64)
        and `label_<action>` (bool), in the sample's order.

    Raises:
        EvergreenError: The sample, the table and the scores do not belong together.
    """
    rows = sample["row"].to_numpy().astype(np.int64)
    actions = table.spec.actions
    inside = not len(rows) or (rows.min() >= 0 and rows.max() < table.rows)
    if scores.shape != (table.rows, len(actions)) or not inside:
        raise EvergreenError(
            f"scores of shape {scores.shape} and the sampled rows do not fit a table of {table.rows} rows "
            f"and {len(actions)} actions",
            "Score the table that the sample was drawn from",
        )
    frame = sample.drop_columns(["row"])
    if "user_id" not in frame.column_names:
        users = np.char.decode(table.user_id[table.request_of_row[rows]].astype(np.bytes_), "utf-8")
        frame = frame.append_column("user_id", pa.array(users.tolist(), pa.string()))
    for a, action in enumerate(actions):
        frame = frame.append_column(SCORE + action, pa.array(scores[rows, a].astype(np.float64)))
        frame = frame.append_column(LABEL + action, pa.array(table.labels[rows, a].astype(bool)))
    return take_requests(frame, limit, seed)


def take_requests(frame: pa.Table, limit: int, seed: int = 0) -> pa.Table:
    """At most `limit` rows: whole requests in the order of a seeded hash of their id (a huge one is cut)."""
    if frame.num_rows <= limit:
        return frame
    requests = frame["request_id"].cast(pa.string()).combine_chunks().dictionary_encode()
    names = [name.encode() for name in requests.dictionary.to_pylist()]
    hashes = np.array([xxhash.xxh3_64_intdigest(name, seed=seed) for name in names], dtype=np.uint64)
    codes = requests.indices.to_numpy()
    order = np.argsort(hashes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(hashes))[order])
    kept = order[: max(1, int(np.searchsorted(ends, limit, side="right")))]
    return frame.filter(pa.array(np.isin(codes, kept))).slice(0, limit)


def users_of(frame: pa.Table) -> np.ndarray:
    """(N,) the unit within which rows depend on each other: the user, or the request if no user is known."""
    name = "user_id" if "user_id" in frame.column_names else "request_id"
    return np.asarray(frame[name].cast(pa.string()).fill_null("").to_pylist(), dtype=str)


def numbers(column: pa.ChunkedArray, transform: str = "none") -> np.ndarray:
    """(N,) float64 after the declared transform, NaN for what is missing, infinite or no number."""
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
    """Share of current rows with a value that no reference row has (a list: with one such value in it)."""
    rows, values = _values(current)
    new = pc.invert(pc.is_in(values, value_set=_values(reference)[1].unique()))
    return pc.count_distinct(rows.filter(new)).as_py() / max(1, len(current))


def _values(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """The values that are there, as strings, and the row that each comes from."""
    flat = column.combine_chunks()
    rows = pa.array(np.arange(len(flat)))
    if pa.types.is_nested(flat.type):
        rows, flat = pc.list_parent_indices(flat).cast(pa.int64()), pc.list_flatten(flat)
    known = flat.is_valid()
    return rows.filter(known), flat.filter(known).cast(pa.string())
