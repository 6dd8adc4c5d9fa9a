"""The ledger: who changed what serves, when and why, one JSON line each, only ever appended to.

Each line holds the digest of the one before, so that a line that was changed or taken out later shows. Homes of
earlier releases begin with lines that have no digest: they are kept and passed over, and the chain begins after them.
"""

import getpass
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from engagement.errors import EvergreenError


class Ledger:
    """The ledger of one home.

    Args:
        path: The file; made at the first entry.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[Any, list[dict[str, Any]]] = (None, [])  # file as it was when it was read, and its entries

    def append(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Write one entry, durably; adds `at`, `by`, `pid`, `before` (digest of the line before) and `digest`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_suffix(".lock")):
            entries = self.entries()
            line = {
                "at": datetime.now(UTC).isoformat(),
                "by": getpass.getuser(),
                "pid": os.getpid(),
                **entry,
                "before": entries[-1]["digest"] if entries else "",
            }
            line["digest"] = _digest(line)
            self._write(json.dumps(line).encode())
        return line

    def entries(self) -> list[dict[str, Any]]:
        """All entries, oldest first. A line that a crash of the machine tore is passed over.

        Raises:
            EvergreenError: A line was changed, or one was taken out.
        """
        try:
            file = self._path.stat()
        except FileNotFoundError:
            return []
        now = (file.st_ino, file.st_size, file.st_mtime_ns)  # a reconciler asks every other second, for years
        if self._read[0] != now:
            self._read = (now, self._verified())
        return list(self._read[1])

    def _verified(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, text in enumerate(self._path.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if not found and "digest" not in line and "before" not in line:
                continue
            before = found[-1]["digest"] if found else ""
            if line.get("digest") != _digest(line) or line.get("before") != before:
                problem = f"line {number} of the ledger {self._path} was changed, or one before it was taken out"
                raise EvergreenError(problem, "Compare it with the runs of the MLflow experiment `promotions`")
            found.append(line)
        return found

    def _write(self, data: bytes) -> None:
        handle = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, b"\n" * torn + data + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(line: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in line.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
