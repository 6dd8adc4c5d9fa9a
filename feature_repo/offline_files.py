"""The Parquet files behind the offline store: which they are, how they are read, and how rows are added."""

import uuid
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import FileSource

from engagement.errors import EvergreenError
from engagement.index import to_us


def read(
    repo: Path | None,
    source: DataSource | None,
    columns: Iterable[str],
    event: str,
    start: datetime | None = None,
    end: datetime | None = None,
) -> pl.DataFrame:
    """Read columns of a source, without the row groups that hold no event in [start, end].

    Args:
        repo: The repository's directory; the source's path may be relative to it.
        source: Where the files are.
        columns: What to read, under the names in the files; doubles are read once.
        event: The timestamp column.
        start: First event wanted, inclusive; None for all.
        end: Last event wanted, inclusive; None for all.

    Raises:
        EvergreenError: The source is no Parquet, or has no files.
    """
    rows = _scan(repo, source)
    kind = rows.collect_schema()[event]
    if start is not None:
        rows = rows.filter(_ticks(event, kind) >= _literal(to_us(start), kind))
    if end is not None:
        rows = rows.filter(_ticks(event, kind) <= _literal(to_us(end), kind))
    return rows.select(list(dict.fromkeys(columns))).collect()


def plain(frame: pl.DataFrame) -> pa.Table:
    """Arrow with the types that Feast knows: no large, view or fixed-size variants."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.cast(pa.schema([(f.name, _plain_type(f.type)) for f in table.schema]))


def add_rows(repo: Path | None, source: DataSource | None, table: pa.Table) -> None:
    """Add rows to a source: one more file of a directory or a `*.parquet` pattern; a single file is written anew.

    Raises:
        ValueError: The columns are not those of the source, in its order.
    """
    files = _files(repo, source)
    schema = pq.read_schema(files[0])
    if table.column_names != schema.names:
        raise ValueError(f"the source has the columns {schema.names}, the rows to add {table.column_names}")
    table = table.cast(schema.remove_metadata())
    path = _place(repo, _file_source(source).path)
    if path.is_dir() or "*" in path.name:
        directory = path if path.is_dir() else path.parent
        write(directory / f"batch-{uuid.uuid4().hex}.parquet", [table])
    else:
        whole = pq.ParquetFile(path)
        write(path, [*(pa.Table.from_batches([b]).cast(table.schema) for b in whole.iter_batches()), table])


def save_dataset(repo: Path | None, uri: str, tables: Iterable[pa.Table], allow_overwrite: bool) -> None:
    """Write a saved dataset, table after table: a file if its name ends in `.parquet`, else one file in a directory.

    Raises:
        SavedDatasetLocationAlreadyExists: There is something already, and it may not be replaced.
    """
    path = _place(repo, uri)
    if path.exists() and not allow_overwrite:
        raise SavedDatasetLocationAlreadyExists(location=str(path))
    if path.suffix == ".parquet":
        write(path, tables)
        return
    old = list(path.glob("*.parquet"))
    write(path / f"{uuid.uuid4().hex}.parquet", tables)
    for file in old:
        file.unlink()


def write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema into one file, which is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    writer: pq.ParquetWriter | None = None
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
            del table  # the next one is made while this one would still be held
    finally:
        if writer:
            writer.close()
    temporary.replace(path)


def _place(repo: Path | None, uri: str) -> Path:
    path = FileSource.get_uri_for_file_path(repo, uri)
    if "://" in path:
        raise EvergreenError(f"the offline store writes to local files only, not to {path}", "Give a local path")
    return Path(path)


def _file_source(source: DataSource | None) -> FileSource:
    if not isinstance(source, FileSource):
        raise EvergreenError(f"the offline store reads Parquet files, not {type(source).__name__}", "Use a FileSource")
    return source


def _files(repo: Path | None, source: DataSource | None) -> list[Path]:
    place = _place(repo, _file_source(source).path)
    # Only the last part may be a pattern: a home directory is free to have brackets in its name.
    files = sorted(place.glob("*.parquet") if place.is_dir() else place.parent.glob(place.name))
    if not files:
        raise EvergreenError(f"the feature view source {place} has no files", "Build the features again")
    return files


def _scan(repo: Path | None, source: DataSource | None) -> pl.LazyFrame:
    path = FileSource.get_uri_for_file_path(repo, _file_source(source).path)
    if "://" in path:
        return pl.scan_parquet(path, hive_partitioning=False)
    return pl.scan_parquet(_files(repo, source), glob=False, hive_partitioning=False)


def _ticks(event: str, kind: pl.DataType) -> pl.Expr:
    return pl.col(event) if isinstance(kind, pl.Datetime) else pl.col(event).dt.timestamp("us")


def _literal(us: int, kind: pl.DataType) -> pl.Expr:
    """An instant in the type in which the files hold the times: so a row group's statistics can answer the filter."""
    if not isinstance(kind, pl.Datetime):
        return pl.lit(us)
    ticks = {"ms": us // 1000, "us": us, "ns": us * 1000}[kind.time_unit]
    return pl.lit(ticks).cast(kind)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_large_string(kind):
        return pa.string()
    return pa.binary() if pa.types.is_large_binary(kind) else kind
