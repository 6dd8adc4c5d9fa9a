"""The quarantine: every row that could not be used, as it was given, with the reason."""

from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from engagement.errors import EvergreenError
from engagement.files import name_part
from engagement.validate import BAD, MAX_BAD_SHARE


class Quarantine:
    """The bad rows of one import, written as they are found.

    Args:
        temporary: File to write while the import runs.
    """

    def __init__(self, temporary: Path) -> None:
        self._temporary = temporary
        self._writer: pq.ParquetWriter | None = None
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, bad: pl.DataFrame) -> None:
        """Take rows in the columns of `validate.BAD`."""
        if not bad.height:
            return
        for table, reason, rows in bad.group_by("table", "reason").len().iter_rows():
            self._counts[table, reason] += rows
        self._write(bad)

    def add_file(self, table: str, file: str, reason: str) -> None:
        """Take note of a file that cannot be read; how many rows it had is not known, so none is counted."""
        entry = {"table": table, "reason": "unreadable_file", "file": file, "row_number": None, "row": reason}
        self._write(pl.DataFrame([entry], schema=BAD))

    def _write(self, bad: pl.DataFrame) -> None:
        arrow = bad.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, arrow.schema, compression="zstd")
        self._writer.write_table(arrow)

    def counts(self, table: str) -> dict[str, int]:
        """Rows by reason, the most frequent first."""
        found = {reason: rows for (name, reason), rows in self._counts.items() if name == table}
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))

    def close(self, directory: Path) -> Path | None:
        """Name the file by its content and move it to `directory`; None where every row was good."""
        if self._writer is None:
            return None
        self._writer.close()
        return name_part(self._temporary, directory, stem="")[0]

    def judge(self, read: dict[str, int], kept: Path | None) -> None:
        """Stop an import with too many bad rows, by the rule of `MAX_BAD_SHARE`.

        Args:
            read: Rows given, by table.
            kept: Where the bad rows can be looked at.

        Raises:
            EvergreenError: One table has more than the allowed share of bad rows.
        """
        for table, rows in read.items():
            counts = {reason: n for reason, n in self.counts(table).items() if reason != "changed"}
            bad = sum(counts.values())
            if bad > MAX_BAD_SHARE * rows:
                by_reason = ", ".join(f"{reason} {n:,}" for reason, n in counts.items())
                raise EvergreenError(
                    f"{bad:,} of {rows:,} rows of {table} are bad ({by_reason}), more than {MAX_BAD_SHARE:.0%}",
                    f"Nothing was imported: look at them in {kept}, correct the data and import again",
                )
