"""Who asked in one window of a replay: what every model's hits on it are counted over.

Shapes: Q comparable requests (more than three candidates), C counted actions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Window:
    """One window.

    Attributes:
        actions: The counted actions: the primary one, then the negative ones.
        user_Q: uint64 hashes; requests of one user share one.
        exam_Q: bool, the requests that are the window's exam.
        random_QC: Hits that a random order has in expectation.
        requests: Requests of the window, comparable or not.
    """

    actions: list[str]
    user_Q: np.ndarray
    exam_Q: np.ndarray
    random_QC: np.ndarray
    requests: int

    def save(self, path: Path) -> None:
        """Write it."""
        arrays = {"user_Q": self.user_Q, "exam_Q": self.exam_Q, "random_QC": self.random_QC}
        write_arrays(path, actions=np.array(self.actions), requests=np.array(self.requests), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Window":
        """Read what `save` wrote."""
        with np.load(path) as file:
            return cls(
                actions=file["actions"].tolist(),
                user_Q=file["user_Q"],
                exam_Q=file["exam_Q"],
                random_QC=file["random_QC"],
                requests=int(file["requests"]),
            )


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays by name into one file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes a name for a switch
    temporary.replace(path)
