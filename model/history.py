"""The recent actions that requests see, newest first, padded to the longest: one way for training and for serving.

Shapes: B requests, L actions.
"""

from typing import NamedTuple

import numpy as np

from engagement.table import RankingTable

HOUR_US = 3_600_000_000


class Recent(NamedTuple):
    """Padding is zero in all of them.

    Attributes:
        item_BL: int64 hashes of the items.
        bits_BL: int64, what each action was: bit `a` set for action `a`.
        hours_BL: float32 age of each action at the request.
        mask_BL: True for real actions.
    """

    item_BL: np.ndarray
    bits_BL: np.ndarray
    hours_BL: np.ndarray
    mask_BL: np.ndarray


def recent(table: RankingTable, requests: np.ndarray, most: int, least: int) -> Recent:
    """The newest actions of some requests.

    Args:
        table: Holds them.
        requests: Indices, B of them.
        most: Actions of a request at most.
        least: L is as long as the longest history, but not less than this.
    """
    start, end = table.history_start[requests], table.history_end[requests]
    longest = int(np.max(end - start, initial=0))
    length = min(most, max(longest, least))
    index = end[:, None] - 1 - np.arange(length)
    mask = index >= start[:, None]
    index = np.where(mask, index, 0)
    if not len(table.history_time):
        empty = np.zeros(index.shape, np.int64)
        return Recent(empty, empty, empty.astype(np.float32), mask)
    age = np.maximum(table.time[requests][:, None] - table.history_time[index], 0)
    return Recent(
        np.where(mask, table.history_item[index], 0),
        np.where(mask, table.history_actions[index], 0),
        np.where(mask, age / HOUR_US, 0).astype(np.float32),
        mask,
    )
