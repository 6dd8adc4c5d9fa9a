"""Checkpoints of a training run: atomic, verified, and tied to the run that wrote them."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engagement.errors import EvergreenError
from model.files import read, sha, write_directory
from model.tensors import pack, unpack

_STATE, _COUNTERS = "state.safetensors", "counters.json"
_NAME = re.compile(r"step-\d{9}")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one directory.

    Attributes:
        directory: Where they are kept; nothing else may live there.
        key: Names the run by all its inputs. Checkpoints of another run in the same place are thrown away.
    """

    directory: Path
    key: str

    def save(self, step: int, tensors: dict[str, Tensor], counters: dict) -> None:
        """Write a checkpoint, then remove the older ones."""
        state = pack(tensors)
        card = {"key": self.key, "step": step, "sha256": sha(state), "counters": counters}
        target = self.directory / f"step-{step:09d}"
        write_directory(target, {_STATE: state, _COUNTERS: json.dumps(card).encode()})
        self._remove(keep=target)

    def latest(self) -> tuple[int, dict[str, Tensor], dict] | None:
        """The newest whole checkpoint of this run: (step, tensors, counters). A damaged one is passed over."""
        for path in sorted(self.directory.glob("step-*"), reverse=True):
            try:
                card = json.loads(read(path / _COUNTERS))
                if card["key"] == self.key:
                    return card["step"], unpack(path / _STATE, card["sha256"]), card["counters"]
            except (EvergreenError, ValueError, KeyError):
                continue
        return None

    def clear(self) -> None:
        """Remove all of them: the run is finished."""
        self._remove(keep=None)

    def _remove(self, keep: Path | None) -> None:
        if not self.directory.exists():
            return
        for path in self.directory.iterdir():
            # A kill while a checkpoint is written leaves `.step-000000100.<pid>.new`.
            if path != keep and _NAME.search(path.name):
                shutil.rmtree(path, ignore_errors=True)
