"""Files that are never seen half written, and directories whose content can be checked."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

SEAL = SIGNATURE, REGISTRATION = "model.sig", "registration.json"  # what registration adds to a bundle (`signing.py`)


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file atomically and durably; makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no file, or no whole one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def directory_digest(directory: Path) -> str:
    """Hex SHA-256 over the relative paths and the bytes of all files of a directory, its seal aside."""
    total = hashlib.sha256()
    seal = {directory / name for name in SEAL}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p not in seal):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return total.hexdigest()
