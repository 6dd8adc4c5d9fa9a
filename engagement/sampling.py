"""Candidates for requests of which only the positives were logged.

Each request draws from its own stream of numbers, `splitmix64(hash(request_id) + k * GOLDEN)` for k = 0, 1, 2, ...
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). A counter-based stream needs
no state, so neither the order of requests nor their batching changes what a request gets, and a million requests are
drawn as one array.
"""

import numpy as np
import polars as pl
import xxhash

CANDIDATES = 20
"""Rows that a completed request has in total; one with as many positives or more gets no sampled row."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEW_ALIVE = 4 * CANDIDATES  # up to here all items are ranked; beyond, drawing again on a repeat is cheaper


def draw(request_hash: np.ndarray, wanted: np.ndarray, alive: np.ndarray, taken: pl.DataFrame) -> pl.DataFrame:
    """Draw distinct items for every request, uniformly from those alive and not taken.

    Args:
        request_hash: (R,) uint64, the seed of each request.
        wanted: (R,) int64, how many to draw.
        alive: (R,) int64, the request may draw from items 0 .. alive - 1.
        taken: Columns `request` and `item` (int64): what each request already has.

    Returns:
        Columns `request` and `item` (int64), in the order drawn; fewer than wanted where too few are alive.
    """
    few = alive <= _FEW_ALIVE
    pending = [np.flatnonzero(few & (wanted > 0)), np.flatnonzero(~few & (wanted > 0))]
    drawn, width = [], 2 * CANDIDATES
    if len(pending[0]):
        drawn.append(_first_distinct(_ranked(request_hash, alive, pending[0]), wanted, taken)[0])
    rest = pending[1]
    while len(rest):
        # The first `wanted` distinct numbers of an endless stream: a longer look cannot change what was found.
        numbers = _stream(request_hash[rest], width)
        item = _scale(numbers, alive[rest][:, None])
        rows = pl.DataFrame({"request": np.repeat(rest, width), "item": item.ravel(), "k": np.tile(np.arange(width), len(rest))})
        found, counts = _first_distinct(rows, wanted, taken)
        whole = rest[counts.reindex(rest) >= np.minimum(wanted[rest], alive[rest] - _FEW_ALIVE // 4)] if False else None
        drawn.append(found)
        break
    return pl.concat(drawn)
