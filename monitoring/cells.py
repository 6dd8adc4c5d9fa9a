"""Many sketches in one compact Parquet file: one for each cell of the reference.

What the cells of a column have in common, its buckets or hashes, is written once; a cell has places in that list.
Cells are cut to what all of them together need: a column keeps the categories that are most frequent over all cells,
and a vocabulary is kept below the bound of the whole, so that `joined` over all cells gives what it gave before.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.errors import EvergreenError
from monitoring.counts import OTHER, Counts, added, kept, most_frequent
from monitoring.sketch import Sketch, Vocabulary, joined
from monitoring.vectors import Vectors

CELL_CATEGORIES = 1_000  # kept of each column, the same for all cells
CELL_VECTORS = 256  # kept of each embedding and cell
Cell = tuple[str, int]
Row = dict[str, Any]
T = TypeVar("T")
_SHARED: Cell = ("", -1)  # of the rows that hold what all cells have in common
_SCHEMA = pa.schema(
    [
        ("week", pa.string()),
        ("cell", pa.int32()),
        ("part", pa.string()),  # size, column, vocabulary, norms or vectors
        ("name", pa.string()),
        ("keys", pa.list_(pa.int64())),  # shared: buckets or hashes; of a cell: places among them, ascending
        ("counts", pa.list_(pa.float64())),  # of vectors: their sum
        ("whole", pa.list_(pa.int64())),  # size: requests, rows; vocabulary: bound; vectors: count, missing
        ("sample", pa.list_(pa.float32())),
    ]
)
_LISTS = ("keys", "counts", "whole", "sample")


def save_cells(path: Path, cells: Mapping[Cell, Sketch]) -> None:
    """Write sketches by cell; the same cells give the same bytes."""
    table = pa.Table.from_pylist(list(_rows(dict(sorted(cells.items())))), _SCHEMA)
    lists = {name: f"{name}.list.element" for name in _LISTS}
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=9,
        use_dictionary=["week", "part", "name", lists["counts"]],
        column_encoding={lists["keys"]: "DELTA_BINARY_PACKED", lists["sample"]: "BYTE_STREAM_SPLIT"},
        write_statistics=False,
        write_page_checksum=True,
    )


def load_cells(path: Path) -> dict[Cell, Sketch]:
    """Read what `save_cells` wrote.

    Raises:
        EvergreenError: There is no such file, or it is damaged.
    """
    try:
        return _cells(_read(pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True)))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EvergreenError(
            f"no readable sketches in {path} ({error})", "Retrain: a new model brings its own"
        ) from error


def _row(cell: Cell, part: str, name: str, **lists: np.ndarray) -> Row:
    return {"week": cell[0], "cell": cell[1], "part": part, "name": name, **dict.fromkeys(_LISTS, ()), **lists}


def _rows(cells: Mapping[Cell, Sketch]) -> Iterator[Row]:
    for cell, held in cells.items():
        yield _row(cell, "size", "", whole=np.array([held.requests, held.rows]))
    vocabularies = _by_name({cell: held.vocabularies for cell, held in cells.items()})
    for name, counts in _by_name({cell: held.columns for cell, held in cells.items()}).items():
        yield from _count_rows("column", name, _frequent(counts) if name in vocabularies else counts)
    for name, words in vocabularies.items():
        yield from _vocabulary_rows(name, words)
    for name, vectors in _by_name({cell: held.vectors for cell, held in cells.items()}).items():
        yield from _count_rows("norms", name, {cell: own.norms for cell, own in vectors.items()})
        for cell, own in vectors.items():
            sample = own.sample[:: max(1, -(-len(own.sample) // CELL_VECTORS))]
            whole = np.array([own.count, own.missing])
            yield _row(cell, "vectors", name, counts=own.total, whole=whole, sample=sample.ravel())


def _by_name(cells: Mapping[Cell, Mapping[str, T]]) -> dict[str, dict[Cell, T]]:
    names = sorted({name for held in cells.values() for name in held})
    return {name: {cell: held[name] for cell, held in cells.items() if name in held} for name in names}


def _frequent(parts: Mapping[Cell, Counts]) -> dict[Cell, Counts]:
    # What some cells know only among the others is counted too: what became frequent gets in as the cells renew.
    frequent = most_frequent(added(held.without(OTHER) for held in parts.values()), CELL_CATEGORIES)
    return {cell: kept(held, frequent) for cell, held in parts.items()}


def _count_rows(part: str, name: str, parts: Mapping[Cell, Counts]) -> Iterator[Row]:
    shared = np.unique(np.concatenate([held.keys for held in parts.values()]))
    yield _row(_SHARED, part, name, keys=shared)
    for cell, held in parts.items():
        yield _row(cell, part, name, keys=np.searchsorted(shared, held.keys), counts=held.counts)


def _vocabulary_rows(name: str, parts: Mapping[Cell, Vocabulary]) -> Iterator[Row]:
    shared = joined(parts.values())
    yield _row(_SHARED, "vocabulary", name, keys=shared.hashes, whole=np.array([shared.bound]))
    for cell, held in parts.items():
        yield _row(cell, "vocabulary", name, keys=np.flatnonzero(np.isin(shared.hashes, held.hashes)))


def _read(table: pa.Table) -> Iterator[Row]:
    heads = table.select(["week", "cell", "part", "name"]).to_pylist()
    columns = {name: table[name].combine_chunks() for name in _LISTS}
    flat = {name: (np.asarray(column.offsets), np.asarray(column.values)) for name, column in columns.items()}
    for i, head in enumerate(heads):
        yield head | {name: values[at[i] : at[i + 1]] for name, (at, values) in flat.items()}


def _cells(rows: Iterable[Row]) -> dict[Cell, Sketch]:
    sizes: dict[Cell, list[int]] = {}
    found: dict[str, dict[Cell, dict]] = {p: defaultdict(dict) for p in ("column", "vocabulary", "norms", "vectors")}
    shared: dict[tuple[str, str], Row] = {}
    for row in rows:
        cell, part, name = (row["week"], row["cell"]), row["part"], row["name"]
        if cell == _SHARED:
            shared[part, name] = row
        elif part == "size":
            sizes[cell] = row["whole"].tolist()
        elif part == "vectors":
            count, missing = row["whole"].tolist()
            sample = row["sample"].reshape(-1, len(row["counts"]))
            found[part][cell][name] = Vectors(count, missing, row["counts"], found["norms"][cell][name], sample)
        else:
            keys, bound = shared[part, name]["keys"][row["keys"]], shared[part, name]["whole"]
            found[part][cell][name] = (
                Vocabulary(keys, int(bound[0])) if part == "vocabulary" else Counts(keys, row["counts"])
            )
    parts = [found[part] for part in ("column", "vocabulary", "vectors")]
    return {
        cell: Sketch(requests, candidates, *(dict(part[cell]) for part in parts))
        for cell, (requests, candidates) in sizes.items()
    }
