"""Files that are whole or absent: every write goes to a temporary name first and is renamed into place."""

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engagement.errors import EvergreenError

ROW_GROUP = 131_072  # rows; small enough to read a slice of a day, large enough to compress


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; once it returns, a power cut does not undo it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process id alone: two pods on one volume may have the same.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def flush(files: Iterable[Path]) -> None:
    """Bring files, and the directories that name them, onto the disk.

    A new directory is named by the one above it, which is therefore brought too.
    """
    directories: set[Path] = set()
    for file in files:
        _sync(file)
        directories |= {file.parent, file.parent.parent}
    for directory in directories:
        _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_part(directory: Path, table: pa.Table, stem: str = "part-") -> tuple[Path, str, int]:
    """Write a table as `<stem><sha16>.parquet`, named by its own bytes; the same table gives the same file.

    Returns:
        The path, the hex SHA-256 and the size in bytes of the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".writing.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)
    return name_part(temporary, directory, stem)


def name_part(temporary: Path, directory: Path, stem: str = "part-") -> tuple[Path, str, int]:
    """Move a finished file to its content-addressed name; returns what `write_part` does."""
    directory.mkdir(parents=True, exist_ok=True)
    digest, size = sha256(temporary), temporary.stat().st_size
    path = directory / f"{stem}{digest[:16]}.parquet"
    temporary.replace(path)
    return path, digest, size


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, with every page's checksum verified.

    Raises:
        EvergreenError: The file is missing, truncated or corrupt; the error names it.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> EvergreenError:
    """The error for a Parquet file of the store that cannot be read."""
    reason = "it is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:160]
    return EvergreenError(
        f"{path} cannot be read ({reason})",
        "Run `evergreen data check`, then import the dataset again",
    )


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
