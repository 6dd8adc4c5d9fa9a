"""Names of hashed categories, from the raw values that lie beside a ranking table."""

import pyarrow as pa
import pyarrow.compute as pc

from engagement.table import TableSpec, hash_id
from monitoring.sketch import IDS

MOST_NAMES = 1_000
"""Names kept of a column, those of the most frequent values."""


def names_of(sample: pa.Table, spec: TableSpec) -> dict[str, dict[int, str]]:
    """Names of frequent categories by column, then by hash; ids stay unnamed.

    Args:
        sample: Raw feature values by feature name, as `feature_repo` writes them beside a table (`sample.parquet`).
        spec: What the table's columns mean.
    """
    found = {}
    for feature in spec.features:
        if feature.hashed and feature.name not in IDS and feature.name in sample.column_names:
            values = sample[feature.name].combine_chunks()
            flat = pc.list_flatten(values) if pa.types.is_nested(values.type) else values
            counted = pc.value_counts(flat.cast(pa.string()).drop_null()).to_pylist()
            most = sorted(counted, key=lambda c: (-c["counts"], c["values"]))[:MOST_NAMES]
            found[feature.name] = {hash_id(feature.name, c["values"]): c["values"] for c in most}
    return found
