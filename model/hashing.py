"""From ids to rows of the one embedding table: double hashing, so that new users and items need no rebuild.

An id is a 63-bit hash of its feature's name and its value. Two rows of the table, each half a vector wide, make up its
vector (double hashing: Zhang et al. 2020, arXiv 2007.14523, there as a sum of two rows; side by side, a row that two
ids share spoils only half of either's vector, at the same memory).
"""

import torch
from torch import Tensor

MISSING_ROW = 0  # always zero, never trained


def rows_of(ids: Tensor, buckets: int) -> Tensor:
    """The two rows of each id.

    Args:
        ids: (...) int64: hashes; 0 where there is no value, negative where the id is hidden.
        buckets: Rows of the table, at most 2^31.

    Returns:
        (..., 2) int64 in [1, buckets), or `MISSING_ROW` twice for ids that are not positive.
    """
    free = buckets - 1  # the quotient and the remainder of a uniform 63-bit number are independent
    rows = torch.stack([ids % free, torch.div(ids, free, rounding_mode="floor") % free], -1) + 1
    return rows.masked_fill((ids <= 0)[..., None], MISSING_ROW)
