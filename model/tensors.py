"""Tensors as bytes, and back when they are those that were written."""

from pathlib import Path

import safetensors
from safetensors.torch import load, save
from torch import Tensor

from engagement.errors import EvergreenError
from model.files import read, sha


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes; equal tensors give equal bytes."""
    return save({name: tensors[name].contiguous() for name in sorted(tensors)})


def unpack(path: Path, sha256: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        EvergreenError: The file is missing, unreadable, or not the one whose SHA-256 is given.
    """
    data = read(path)
    if sha(data) != sha256:
        raise EvergreenError(f"{path} was changed or damaged after it was written", "Restore it, or train again")
    try:
        return load(data)
    except safetensors.SafetensorError as error:
        raise EvergreenError(f"{path} is no readable safetensors file ({error})", "Train again") from error
