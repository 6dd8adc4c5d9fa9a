"""Writing a directory so that a reader sees all of it or nothing, and noticing when a file was changed since."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from engagement.errors import EvergreenError


def write_directory(target: Path, files: dict[str, bytes]) -> None:
    """Write `files` as directory `target`, in place of what was there.

    A kill at any moment leaves the old directory, the new one, or none; never a mixture.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    stale = target.with_name(f".{target.name}.{os.getpid()}.old")
    for leftover in target.parent.glob(f".{target.name}.*"):  # of a process that was killed right here
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    for name, data in files.items():
        (fresh / name).write_bytes(data)
    if target.exists():
        target.replace(stale)
    fresh.replace(target)
    shutil.rmtree(stale, ignore_errors=True)


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        EvergreenError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvergreenError(f"cannot read {path} ({error.strerror})", "Restore it, or train again") from error


def sha(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def canonical(data: dict) -> str:
    """JSON text that is equal for equal data; what digests are taken of."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def stamped(card: dict) -> bytes:
    """A directory's card as JSON, with a checksum of all that it says."""
    return json.dumps({**card, "checksum": sha(canonical(card).encode())}, indent=1).encode()


def read_card(path: Path) -> dict:
    """What `stamped` wrote, without the checksum.

    Raises:
        EvergreenError: The file cannot be read.
        ValueError: It is no JSON, or says something else than what was written.
        KeyError: It has no checksum.
    """
    card: dict = json.loads(read(path))
    checksum = card.pop("checksum")
    if sha(canonical(card).encode()) != checksum:
        raise ValueError("its checksum is not what it should be")
    return card
