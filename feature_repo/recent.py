"""What became known since an instant lies in few files of a view: the others need not be read to publish it."""

import contextlib
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource


@contextlib.contextmanager
def recent(repo: Path | None, source: DataSource, start: datetime) -> Iterator[DataSource | None]:
    """A source without the files whose rows had all become known before an instant, by the statistics in the files.

    A key's newest row of the rest is no answer where an older file holds a newer one; a store in which the newer row
    stays takes no harm from it.

    Args:
        repo: The repository's directory; the source's path may be relative to it.
        source: Any source; only a pattern or a directory of local Parquet files becomes smaller.
        start: First instant of interest.

    Yields:
        The smaller source; None when no file is left.
    """
    path = FileSource.get_uri_for_file_path(repo, source.path) if isinstance(source, FileSource) else "://"
    place = Path(path)
    if "://" in path or not (place.is_dir() or "*" in place.name):
        yield source
        return
    files = sorted(place.glob("*.parquet") if place.is_dir() else place.parent.glob(place.name))
    stored = {new: old for old, new in source.field_mapping.items()}
    names = [stored.get(n, n) for n in (source.timestamp_field, source.created_timestamp_column) if n]
    chosen = [f for f in files if _reaches(f, names, start)]
    if not files or len(chosen) == len(files):
        yield source
    elif not chosen:
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="recent-") as links:
            for i, file in enumerate(chosen):
                (Path(links) / f"{i:06d}.parquet").symlink_to(file.resolve())
            yield FileSource(
                name=source.name,
                path=links,
                file_format=ParquetFormat(),
                timestamp_field=source.timestamp_field,
                created_timestamp_column=source.created_timestamp_column,
                field_mapping=source.field_mapping,
            )


def _reaches(file: Path, names: list[str], start: datetime) -> bool:
    """Whether one of a file's times may lie at or after an instant."""
    with pq.ParquetFile(file) as parquet:
        data = parquet.metadata
        columns = [i for i in range(data.num_columns) if data.schema.column(i).name in names]
        for group in range(data.num_row_groups):
            for column in columns:
                statistics = data.row_group(group).column(column).statistics
                if statistics is None or not statistics.has_min_max:
                    return True
                newest = statistics.max
                if (newest if newest.tzinfo else newest.replace(tzinfo=UTC)) >= start:
                    return True
        return False
