"""Any directory in the contract, read as a stream."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engagement.contract import Dataset, Manifest, Remarks
from engagement.errors import EvergreenError
from engagement.validate import required_columns

BATCH_ROWS = 262_144


def read(path: Path) -> Dataset:
    """A dataset from a directory with `manifest.json`, `engagements/`, `items/` and perhaps `users/`.

    Files are read in the order of their names. The schemas of all files are looked at before the first row.

    Raises:
        EvergreenError: The directory, a file or a column is missing, or a file cannot be read; the error
            names it. A file whose damage shows only further in raises while the engagements are read.
    """
    path = Path(path)
    if not path.is_dir():
        raise EvergreenError(f"there is no directory {path}", "Name a directory in the contract")
    manifest = Manifest.load(path)
    engagements, items = _files(path / "engagements"), _files(path / "items")
    for room, files in (("engagements", engagements), ("items", items)):
        if not files:
            raise EvergreenError(f"{path / room} holds no Parquet file", "Deliver at least one")
    needed = required_columns(manifest)
    wanted = [*needed, "created_timestamp", "position"]
    ignored: set[str] = set()
    for file in engagements:
        ignored |= set(_checked_schema(file, needed).names) - set(wanted)
    notes = [f"ignored columns of engagements: {', '.join(sorted(ignored))}"] if ignored else []
    return Dataset(
        manifest=manifest,
        engagements=_stream(engagements, wanted),
        items=_whole(items, ["item_id", "created_timestamp", *manifest.item_features], ["embedding"]),
        users=_whole(_files(path / "users"), ["user_id", "event_timestamp", *manifest.user_features], []),
        remarks=Remarks(notes=notes),
    )


def _files(directory: Path) -> list[Path]:
    return sorted(f for f in directory.rglob("*.parquet") if f.is_file() and not f.name.startswith("."))


def _checked_schema(file: Path, needed: list[str]) -> pa.Schema:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error
    missing = [n for n in needed if n not in schema.names]
    if missing:
        named = ", ".join(f"'{n}'" for n in missing)
        raise EvergreenError(f"{file} lacks the column {named}", "Add it, or correct the manifest")
    return schema


def _stream(files: list[Path], wanted: list[str]) -> Iterator[pa.Table]:
    for file in files:
        named = {b"file": str(file).encode()}
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                present = [n for n in wanted if n in opened.schema_arrow.names]
                for batch in opened.iter_batches(BATCH_ROWS, columns=present):
                    yield pa.Table.from_batches([batch]).replace_schema_metadata(named)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from error


def _whole(files: list[Path], needed: list[str], optional: list[str]) -> pa.Table:
    tables = []
    for file in files:
        schema = _checked_schema(file, needed)
        try:
            table = pq.ParquetFile(file, page_checksum_verification=True).read(
                [*needed, *(n for n in optional if n in schema.names)]
            )
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from error
        tables.append(table.replace_schema_metadata(None))
    if not tables:
        return pa.table({})
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise EvergreenError(
            f"the files of {files[0].parent} disagree in a column's type ({' '.join(str(error).split())[:160]})",
            "Write them all with the same schema",
        ) from error


def _unreadable(file: Path, error: Exception) -> EvergreenError:
    reason = " ".join(str(error).split())[:160]
    return EvergreenError(
        f"{file} cannot be read ({reason})",
        "Nothing was imported: deliver the file again or take it away, then import again",
    )
