"""Candidates for requests of which only the positives were logged.

Each request draws from its own stream of numbers, `splitmix64(hash(request_id) + k * GOLDEN)` for k = 0, 1,
2, ... (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). A counter-based
stream needs no state, so neither the order of requests nor their batching changes what a request gets, and
many requests are drawn as one array.
"""

import numpy as np
import polars as pl
import xxhash

CANDIDATES = 20
"""Rows that a completed request has in total; one with as many positives or more gets no sampled row."""

_FEW_ALIVE = 4 * CANDIDATES  # up to here all items are put in order; beyond, drawing again after a repeat is cheaper
_AT_ONCE = 50_000  # requests; bounds the memory of one array of draws


def complete(rows: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """The sampled rows that bring each request to `CANDIDATES` rows.

    They carry the time of the request (its earliest row), become known with its earliest known row, copy its
    context and hold no action.

    Args:
        rows: All rows of the requests, in the stored columns.
        items: Columns `item_id` and `created_timestamp` of all items, sorted by (created_timestamp, item_id).

    Returns:
        Sampled rows in the columns of `rows`, at most `CANDIDATES` less the rows that a request has.
    """
    first = rows.sort("event_timestamp", "item_id").group_by("request_id", maintain_order=True)
    requests = first.agg(
        pl.all().exclude("created_timestamp").first(),
        pl.col("created_timestamp").min(),
        pl.len().alias("_size"),
    ).with_row_index("_request")
    place = items.select("item_id").with_row_index("_item")
    taken = rows.join(requests.select("request_id", "_request"), on="request_id").join(place, on="item_id")
    created = items["created_timestamp"].dt.timestamp("us").to_numpy()
    alive = np.searchsorted(created, requests["event_timestamp"].dt.timestamp("us").to_numpy(), side="right")
    seeds = np.array([xxhash.xxh3_64_intdigest(r.encode()) for r in requests["request_id"]], dtype=np.uint64)
    wanted = np.maximum(CANDIDATES - requests["_size"].to_numpy().astype(np.int64), 0)
    drawn = draw(seeds, wanted, alive, taken.select(pl.col("_request", "_item").cast(pl.Int64)))
    booleans = [n for n, kind in rows.schema.items() if kind == pl.Boolean and n != "sampled"]
    whole = requests.drop("item_id").with_columns(pl.col("_request").cast(pl.Int64)).join(drawn, on="_request")
    whole = whole.join(place.with_columns(pl.col("_item").cast(pl.Int64)), on="_item")
    blank = whole.with_columns(pl.lit(False).alias(n) for n in booleans)
    return blank.with_columns(sampled=pl.lit(True), position=pl.lit(None, pl.Int16)).select(rows.columns)


def draw(seeds: np.ndarray, wanted: np.ndarray, alive: np.ndarray, taken: pl.DataFrame) -> pl.DataFrame:
    """Draw distinct items for every request, uniformly from those alive and not taken.

    Args:
        seeds: (R,) uint64, one a request.
        wanted: (R,) int64, how many to draw, at most `CANDIDATES`.
        alive: (R,) int64, request r draws from items 0 .. alive[r] - 1.
        taken: Columns `_request` and `_item` (int64): what each request already has.

    Returns:
        Columns `_request` and `_item` (int64); fewer than wanted only where fewer are alive and free.
    """
    drawn = [pl.DataFrame(schema={"_request": pl.Int64, "_item": pl.Int64})]
    for start in range(0, len(seeds), _AT_ONCE):
        batch = np.arange(start, min(start + _AT_ONCE, len(seeds)))
        batch = batch[(wanted[batch] > 0) & (alive[batch] > 0)]
        few = batch[alive[batch] <= _FEW_ALIVE]
        if len(few):
            drawn.append(_first(few, _ordered(seeds[few], alive[few]), wanted, taken))
        rest, width = batch[alive[batch] > _FEW_ALIVE], 2 * CANDIDATES
        while len(rest):
            found = _first(rest, _stream(seeds[rest], alive[rest], width), wanted, taken)
            counts = np.bincount(found["_request"].to_numpy() - start, minlength=_AT_ONCE)[rest - start]
            # A longer look at the same stream begins with the same items, so only the unfinished look again.
            drawn.append(
                found.join(pl.DataFrame({"_request": rest[counts == wanted[rest]]}), on="_request", how="semi")
            )
            rest, width = rest[counts < wanted[rest]], 4 * width
    return pl.concat(drawn)


def _first(requests: np.ndarray, items: np.ndarray, wanted: np.ndarray, taken: pl.DataFrame) -> pl.DataFrame:
    """The first `wanted` distinct free items of each row of `items` (R, K), where -1 is no item."""
    table = pl.DataFrame({"_request": np.repeat(requests, items.shape[1]), "_item": items.ravel()})
    free = table.filter(pl.col("_item") >= 0).join(taken, on=["_request", "_item"], how="anti", maintain_order="left")
    free = free.unique(maintain_order=True, keep="first")
    rank = pl.int_range(pl.len()).over("_request")
    limits = pl.DataFrame({"_request": requests, "_wanted": wanted[requests]})
    return free.with_columns(_rank=rank).join(limits, on="_request").filter(pl.col("_rank") < pl.col("_wanted"))[:, :2]


def _stream(seeds: np.ndarray, alive: np.ndarray, width: int) -> np.ndarray:
    """(R, width) int64: the first `width` numbers of each request's stream, scaled to 0 .. alive - 1."""
    # The upper 53 bits make a double in [0, 1); its bias over 2**32 items is below 2**-21.
    unit = (_splitmix64(seeds, width) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (unit * alive[:, None]).astype(np.int64)


def _ordered(seeds: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """(R, _FEW_ALIVE) int64: the items 0 .. alive - 1 of each request in random order, then -1."""
    keys = _splitmix64(seeds, _FEW_ALIVE)
    absent = np.arange(_FEW_ALIVE) >= alive[:, None]
    order = np.lexsort((keys, absent), axis=1)
    return np.where(np.take_along_axis(absent, order, axis=1), -1, order)


def _splitmix64(seeds: np.ndarray, width: int) -> np.ndarray:
    """(R, width) uint64."""
    steps = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = seeds[:, None] + steps
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
