"""From raw feature values to the columns of the ranking table: the one path for training and for serving.

Raw values are Arrow arrays by feature name, one entry a row. Shapes: n rows (requests or candidates), C hashed and D
numeric columns of that level.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engagement.table import MISSING, Feature, Level, TableSpec, hash_id

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
SERVED = 4_000  # distinct texts of a served request at most; a training table has more
Raw = Mapping[str, pa.Array | np.ndarray]  # doubles also as (n,) with NaN for null
_SMALL_INTS = pa.array([str(v) for v in range(24)])
# The same items, tags and categories come up in one served request after another.
_remembered = lru_cache(maxsize=100_000)(hash_id)


def request_values(time: np.ndarray, last_action: np.ndarray) -> dict[str, pa.Array]:
    """Features of a request that follow from its time.

    Args:
        time: (R,) int64, microseconds, when each request is ranked.
        last_action: (R,) float64, microseconds of the newest action in the request's history; NaN without one.
    """
    return {
        "hour_of_day": _text_of_small_ints((time // HOUR_US) % 24),
        "day_of_week": _text_of_small_ints((time // DAY_US + 3) % 7),  # 1970-01-01 was a Thursday; Monday is 0
        "days_since_action": pa.array((time - last_action) / DAY_US, from_pandas=True),
    }


def candidate_values(time: np.ndarray, created_us: pa.Array) -> dict[str, pa.Array]:
    """Features of a candidate that follow from the request's time.

    Args:
        time: (N,) int64, microseconds, when each candidate's request is ranked.
        created_us: (N,) int64, microseconds, when the item became available; null where unknown.
    """
    age = age_days(time, pc.fill_null(created_us, 0).to_numpy(zero_copy_only=False))
    return {"item_age_days": pa.array(age, mask=pc.is_null(created_us).to_numpy(zero_copy_only=False))}


def age_days(time: np.ndarray, created_us: np.ndarray) -> np.ndarray:
    """(N,) float64; of the arguments of `candidate_values`."""
    return np.maximum(time - created_us, 0) / DAY_US


def blank(spec: TableSpec, level: Level, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, C) int64 hashes and (n, D) float32 numbers of one level, without any value yet."""
    hashed = np.full((rows, spec.width(level, hashed=True)), MISSING, np.int64)
    return hashed, np.full((rows, spec.width(level, hashed=False)), np.nan, np.float32)


def encode(spec: TableSpec, level: Level, raw: Raw, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash and transform the features of one level.

    Args:
        spec: The declaration.
        level: `request` or `candidate`.
        raw: Raw values by feature name; a feature that is not there has no value anywhere.
        rows: Number of rows, n.

    Returns:
        (n, C) int64 hashes and (n, D) float32 numbers, columns in the order of the declaration.
    """
    hashed, numbers = blank(spec, level, rows)
    fill(spec, level, raw, hashed, numbers)
    return hashed, numbers


def fill(spec: TableSpec, level: Level, raw: Raw, hashed: np.ndarray, numbers: np.ndarray) -> None:
    """Write the columns of the features that have raw values, and no others; the arguments are those of `encode`."""
    logs: list[int] = []
    with np.errstate(over="ignore"):
        for block, features in ((hashed, spec.of(level, hashed=True)), (numbers, spec.of(level, hashed=False))):
            at = 0
            for feature in features:
                if feature.name in raw:
                    block[:, at : at + feature.width] = _ENCODERS[feature.kind](feature, raw[feature.name])
                    if feature.transform == "log1p":
                        logs.append(at)
                at += feature.width
    if logs:
        numbers[:, logs] = np.log1p(np.maximum(numbers[:, logs], 0.0))
    # An infinity, or a double beyond float32, would poison a whole batch; it counts as no value.
    numbers[np.isinf(numbers)] = np.nan


def hashes(field: str, values: pa.Array) -> np.ndarray:
    """(n,) int64 hashes of text, `MISSING` for null; each distinct value is hashed once."""
    coded = values.dictionary_encode() if not pa.types.is_dictionary(values.type) else values
    texts = coded.dictionary.to_pylist()
    digest = _remembered if len(texts) <= SERVED else hash_id
    known = [MISSING if v is None else digest(field, v) for v in texts]
    lookup = np.array([*known, MISSING], np.int64)
    return lookup[pc.fill_null(coded.indices, len(known)).to_numpy(zero_copy_only=False)]


def _categorical(feature: Feature, values: pa.Array) -> np.ndarray:
    return hashes(feature.name, values)[:, None]


def _categories(feature: Feature, values: pa.Array) -> np.ndarray:
    out = np.full((len(values), feature.width), MISSING, np.int64)
    row = pc.list_parent_indices(values).to_numpy(zero_copy_only=False).astype(np.int64)
    column = np.arange(len(row)) - np.searchsorted(row, row)
    kept = column < feature.width
    out[row[kept], column[kept]] = hashes(feature.name, pc.list_flatten(values))[kept]
    return out


def _numeric(feature: Feature, values: pa.Array | np.ndarray) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values[:, None]
    return pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)[:, None]


def _embedding(feature: Feature, values: pa.Array) -> np.ndarray:
    out = np.full((len(values), feature.width), np.nan, np.float32)
    whole = pc.fill_null(pc.equal(pc.list_value_length(values), feature.width), False)
    flat = pc.list_flatten(values.filter(whole)).to_numpy(zero_copy_only=False)
    out[whole.to_numpy(zero_copy_only=False)] = flat.reshape(-1, feature.width)
    return out


def _text_of_small_ints(values: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(values, pa.int64()), _SMALL_INTS)


_ENCODERS = {
    "categorical": _categorical,
    "categories": _categories,
    "numeric": _numeric,
    "embedding": _embedding,
}
