"""An import's rows on their way into the store: on disk, split so that one piece at a time fits into memory.

First by request (everything that decides about a row needs its whole request and nothing else), then by day.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa

from engagement.reading import frame

DAY_US = 86_400_000_000
BUCKETS = 64
FLUSH_ROWS = 250_000  # validated rows that wait in memory for being split
GROUP_ROWS = 1_000_000  # rows that settling yields at once; a bucket that yields more is settled alone


class RequestSpill:
    """Rows split by the hash of their request into `BUCKETS` files."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._waiting: list[pl.DataFrame] = []
        self._rows = [0] * BUCKETS
        self._schema: pa.Schema | None = None

    def add(self, rows: pl.DataFrame) -> None:
        """Take rows; all calls must have the same columns."""
        self._waiting.append(rows)
        if sum(w.height for w in self._waiting) >= FLUSH_ROWS:
            self._flush()

    def groups(self, growth: int = 1) -> Iterator[pl.DataFrame]:
        """Finish writing; then all rows, in groups that hold every row of a request, until each was given once.

        Args:
            growth: Rows that one row may become while it is settled.
        """
        self._flush()
        for writer in self._writers.values():
            writer.close()
        group: list[int] = []
        for bucket in sorted(self._writers):
            if group and growth * (sum(self._rows[b] for b in group) + self._rows[bucket]) > GROUP_ROWS:
                yield self._load(group)
                group = []
            group.append(bucket)
        if group:
            yield self._load(group)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = pl.concat(self._waiting)
        self._waiting = []
        hashed = rows.with_columns(_bucket=request_hash(rows["request_id"]) % BUCKETS)
        for (bucket,), piece in hashed.partition_by("_bucket", as_dict=True, include_key=False).items():
            number, table = int(bucket), piece.to_arrow(compat_level=pl.CompatLevel.oldest())
            self._schema = self._schema or table.schema
            if number not in self._writers:
                self._writers[number] = pa.ipc.new_stream(self._path(number), self._schema)
            self._writers[number].write_table(table.cast(self._schema))
            self._rows[number] += int((piece["_row"] >= 0).sum())

    def _load(self, buckets: list[int]) -> pl.DataFrame:
        tables = []
        for bucket in buckets:
            with pa.ipc.open_stream(self._path(bucket)) as stream:
                tables.append(stream.read_all())
            self._path(bucket).unlink()
        return frame(pa.concat_tables(tables))

    def _path(self, bucket: int) -> Path:
        return self._directory / f"bucket-{bucket:02d}.arrow"


class TimeSpill:
    """Settled rows as memory-mapped files sorted by time: any span is cut out without reading the rest."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._files: list[tuple[pa.Table, pl.Series]] = []

    def add(self, rows: pl.DataFrame) -> None:
        """Take the settled rows of one group."""
        ordered = rows.sort("event_timestamp")
        path = self._directory / f"group-{len(self._files):04d}.arrow"
        table = ordered.to_arrow(compat_level=pl.CompatLevel.oldest())
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        times = ordered["event_timestamp"].dt.timestamp("us")
        self._files.append((pa.ipc.open_file(pa.memory_map(str(path))).read_all(), times))

    def days(self) -> dict[int, int]:
        """Rows by day (days since 1970), in order."""
        counts: dict[int, int] = {}
        for _, times in self._files:
            for day, rows in (times // DAY_US).value_counts().iter_rows():
                counts[day] = counts.get(day, 0) + rows
        return dict(sorted(counts.items()))

    def between(self, start: int, end: int) -> pl.DataFrame:
        """Rows with start <= event_timestamp < end, microseconds, in no order."""
        slices = []
        for table, times in self._files:
            low, high = times.search_sorted(pl.Series([start, end]), side="left")
            if high > low:
                slices.append(table.slice(low, high - low))
        return frame(pa.concat_tables(slices)) if slices else pl.DataFrame()


def request_hash(request_id: pl.Series) -> pl.Series:
    """UInt64, the same within one version of polars; decides where rows are worked on, never what becomes of them."""
    return request_id.hash(seed=0)
