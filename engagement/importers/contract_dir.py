"""Any directory in the contract, read as a stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engagement.contract import Dataset, Manifest, Remarks
from engagement.errors import EvergreenError
from engagement.validate import MAX_BAD_SHARE, required_columns

BATCH_ROWS = 262_144


def read(path: Path) -> Dataset:
    """A dataset from a directory with `manifest.json`, `engagements/`, `items/` and perhaps `users/`.

    Files are read in the order of their names. The schemas of all files are looked at before the first row. A damaged
    file is left out as a whole and told in the remarks: its rows come when it is delivered again.

    Raises:
        EvergreenError: The directory, a table or a column is missing, or more than `MAX_BAD_SHARE` of a table's files
            are damaged; the error names the last one. Damage that shows only further in raises while the
            engagements are read.
    """
    path = Path(path)
    if not path.is_dir():
        raise EvergreenError(f"there is no directory {path}", "Name a directory in the contract")
    manifest = Manifest.load(path)
    engagements, items = _files(path / "engagements"), _files(path / "items")
    for room, files in (("engagements", engagements), ("items", items)):
        if not files:
            raise EvergreenError(f"{path / room} holds no Parquet file", "Deliver at least one")
    needed, remarks = required_columns(manifest), Remarks()
    wanted = [*needed, "created_timestamp", "position"]
    log = _Files("engagements", engagements, remarks)
    ignored = {n for schema in log.schemas(needed) for n in schema.names} - set(wanted)
    if ignored:
        remarks.notes.append(f"ignored columns of engagements: {', '.join(sorted(ignored))}")
    users = _Files("users", _files(path / "users"), remarks)
    return Dataset(
        manifest=manifest,
        engagements=log.stream(wanted),
        items=_Files("items", items, remarks).whole(
            ["item_id", "created_timestamp", *manifest.item_features], ["embedding"]
        ),
        users=users.whole(["user_id", "event_timestamp", *manifest.user_features], []),
        remarks=remarks,
    )


class _Files:
    """The Parquet files of one table, without those that turn out damaged."""

    def __init__(self, room: str, files: list[Path], remarks: Remarks) -> None:
        self._room, self._files, self._remarks = room, files, remarks
        self._damaged: set[Path] = set()

    def schemas(self, needed: list[str]) -> Iterator[pa.Schema]:
        """The schema of each file."""
        for file in self._files:
            with self._leaving_out(file):
                yield _checked_schema(file, needed)

    def stream(self, wanted: list[str]) -> Iterator[pa.Table]:
        """The rows in batches; a file is read through before its first batch, so that it counts whole or not at all."""
        for file in self._files:
            if file in self._damaged:
                continue
            with self._leaving_out(file):
                for _ in _batches(file, wanted):
                    pass
                yield from _batches(file, wanted)

    def whole(self, needed: list[str], optional: list[str]) -> pa.Table:
        """All rows; an empty table without columns where there is no file."""
        tables = []
        for file in self._files:
            with self._leaving_out(file):
                schema = _checked_schema(file, needed)
                with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                    table = opened.read([*needed, *(n for n in optional if n in schema.names)])
                tables.append(table.replace_schema_metadata(None))
        if not tables:
            return pa.table({})
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise EvergreenError(
                f"the files of {self._files[0].parent} disagree in a column's type ({_line(error)})",
                "Write them all with the same schema",
            ) from error

    @contextmanager
    def _leaving_out(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            self._damaged.add(file)
            self._remarks.unreadable.append((self._room, str(file), _line(error)))
            if len(self._damaged) > MAX_BAD_SHARE * len(self._files):
                raise EvergreenError(
                    f"{file} cannot be read ({_line(error)}), and so {len(self._damaged)} of {len(self._files)} files "
                    f"of {self._room}, more than {MAX_BAD_SHARE:.0%}",
                    "Nothing was imported: deliver the file again or take it away, then import again",
                ) from error


def _files(directory: Path) -> list[Path]:
    return sorted(f for f in directory.rglob("*.parquet") if f.is_file() and not f.name.startswith("."))


def _checked_schema(file: Path, needed: list[str]) -> pa.Schema:
    schema = pq.read_schema(file)
    missing = [n for n in needed if n not in schema.names]
    if missing:
        named = ", ".join(f"'{n}'" for n in missing)
        raise EvergreenError(f"{file} lacks the column {named}", "Add it, or correct the manifest")
    return schema


def _batches(file: Path, wanted: list[str]) -> Iterator[pa.Table]:
    named = {b"file": str(file).encode()}
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        present = [n for n in wanted if n in opened.schema_arrow.names]
        for batch in opened.iter_batches(BATCH_ROWS, columns=present):
            yield pa.Table.from_batches([batch]).replace_schema_metadata(named)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
