"""What a served model finds by id, in numpy: rows of the embedding table, content vectors, popularity.

Shapes: B requests, C candidates, L actions, A action types, W hashed columns, R rows that training saw, I items,
U users, K items with a known popularity, V width of a content vector, ... any leading dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engagement.table import hash_id
from model.columns import ITEM_FEATURE

NO_VALUE, UNKNOWN = 0, 1
"""Rows of the graph's table, both zero: of "no value", and of an id that training never saw. Its own rows follow."""


class TableRows:
    """From ids to rows of the graph's table: `model.hashing.rows_of`, then the place among the rows training saw.

    Args:
        rows_R: The rows that training saw, ascending.
        buckets: Rows of the whole table.
    """

    def __init__(self, rows_R: np.ndarray, buckets: int) -> None:
        # A place for every row, not a search among the keys: it is read for thousands of ids a request, and takes a
        # small part of what the table itself would.
        self._place = np.zeros(buckets - 1, np.int32)
        self._place[rows_R - 1] = np.arange(UNKNOWN + 1, UNKNOWN + 1 + len(rows_R))

    def find(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Write the two rows of each id (...) to `out` (..., 2), int64, contiguous."""
        out.fill(NO_VALUE)
        given = np.flatnonzero(ids)  # most places for categories are empty
        high, low = np.divmod(ids.reshape(-1)[given], len(self._place))
        first, second = self._place[low], self._place[high % len(self._place)]
        # An id is known by both of its rows (`Ranker.seen`).
        unknown = (first == 0) | (second == 0)
        first[unknown] = second[unknown] = UNKNOWN
        rows = out.reshape(-1, 2)
        rows[given, 0], rows[given, 1] = first, second


@dataclass(frozen=True)
class ContentLookup:
    """Content vectors of the final version, and the ridge regression that folds a history into them.

    Attributes:
        item_keys: (I,) int64, ascending.
        item_IV: (I + 1, V) float32; the last row is zero, for unknown items.
        bias_I: (I + 1,) float32, likewise.
        user_keys: (U,) int64, ascending.
        user_UV: (U + 1, V) float32, likewise.
        mean: Mean value of a row.
        values_A: What each action is worth.
        ridge: Strength of the regression.
        level_prior: Rows at the mean value that a user starts with.
    """

    item_keys: np.ndarray
    item_IV: np.ndarray
    bias_I: np.ndarray
    user_keys: np.ndarray
    user_UV: np.ndarray
    mean: np.float32
    values_A: np.ndarray
    ridge: np.float32
    level_prior: np.float32

    def items(self, ids: np.ndarray) -> np.ndarray:
        """Places of items (...) in `item_IV` and `bias_I`."""
        return find(self.item_keys, ids)

    def users(self, ids: np.ndarray) -> np.ndarray:
        """Places of users (...) in `user_UV`."""
        return find(self.user_keys, ids)

    def fold_in(
        self, place_BL: np.ndarray, types_BLA: np.ndarray, mask_BL: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`model.content.fold_in` of histories: the users' vectors (B, V) and levels (B,)."""
        item_BLV = self.item_IV[place_BL]
        seen_BLV = item_BLV * mask_BL[..., None]
        value_BL = np.clip(types_BLA @ self.values_A, -1, 1)
        rest_BL = (value_BL - self.mean - self.bias_I[place_BL]) * mask_BL
        level_B = rest_BL.sum(1) / (mask_BL.sum(1, dtype=np.float32) + self.level_prior)
        rest_BL = (rest_BL - level_B[:, None]) * mask_BL
        seen_BVL = seen_BLV.swapaxes(1, 2)
        # One factor without the mask, which changes nothing: numpy gives a product of a matrix with itself to a routine
        # that wakes other threads for it.
        gram_BVV = seen_BVL @ item_BLV + self.ridge * np.eye(seen_BLV.shape[-1], dtype=np.float32)
        return np.linalg.solve(gram_BVV, seen_BVL @ rest_BL[..., None])[..., 0], level_B


@dataclass(frozen=True)
class Popularity:
    """How often each action followed where an item was shown, smoothed.

    Attributes:
        keys: (K,) int64 hashes of item ids, ascending.
        rates_KA: (K + 1, A) float32; the last row holds the mean rates, for items never shown.
    """

    keys: np.ndarray
    rates_KA: np.ndarray

    def of(self, item_ids: Sequence[str]) -> np.ndarray:
        """(C, A) float32."""
        return self.rates_KA[find(self.keys, np.array([hash_id(ITEM_FEATURE, i) for i in item_ids], np.int64))]


def find(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Place of each id among the ascending keys; `len(keys)` where it is not there."""
    if not len(keys):
        return np.zeros(ids.shape, np.int64)
    place = keys.searchsorted(ids)
    return np.where(keys.take(place, mode="clip") == ids, place, len(keys))


def lookups_of(arrays: Mapping[str, np.ndarray], buckets: int) -> tuple[TableRows, ContentLookup, Popularity]:
    """The three of them, from the arrays of an export."""
    content = ContentLookup(
        item_keys=arrays["item_keys"],
        item_IV=arrays["item_IV"],
        bias_I=arrays["bias_I"],
        user_keys=arrays["user_keys"],
        user_UV=arrays["user_UV"],
        mean=np.float32(arrays["mean"]),
        values_A=arrays["values_A"],
        ridge=np.float32(arrays["ridge"]),
        level_prior=np.float32(arrays["level_prior"]),
    )
    popularity = Popularity(arrays["popular_keys"], arrays["popular_rates"])
    return TableRows(arrays["table_rows"], buckets), content, popularity
