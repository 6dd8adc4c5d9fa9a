"""Data parallel training by `torchrun`: what the processes of one run tell each other.

Every process holds the whole model, computes its share of each batch's requests, and applies the sum of all gradients.
Whatever is random is drawn for the whole batch, so a run of several processes goes where one process would go (to
rounding; dropout inside layers is each process's own). One process alone has no process group and says nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from engagement.errors import EvergreenError


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started with this one, if it did; NCCL on GPUs, Gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: Its number; 0 writes the files.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """As the process group says; rank 0 of 1 where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def span(self, length: int) -> tuple[int, int, bool]:
        """Which of `length` things this process takes: the first, one past the last, and whether they are its own.

        A process for which there is none gets the first one and must not count it: so all of them run the same
        operations, which collective communication needs.
        """
        first, last = length * self.rank // self.size, length * (self.rank + 1) // self.size
        return (first, last, True) if first < last else (0, 1, False)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over processes, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes one after another; their first dimensions may differ."""
        if self.size == 1:
            return values
        own = torch.tensor([len(values)], device=values.device)
        lengths = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(lengths, own)
        counts = [int(n) for n in torch.cat(lengths).tolist()]
        padded = values.new_zeros(max(counts), *values.shape[1:])
        padded[: len(values)] = values
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    def sum_rows(self, gradient: Tensor) -> Tensor:
        """Sum of sparse gradients over processes, coalesced."""
        gradient = gradient.coalesce()
        if self.size == 1:
            return gradient
        rows, values = self.gather(gradient.indices()[0]), self.gather(gradient.values())
        return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False).coalesce()

    def union(self, values: Tensor) -> Tensor:
        """The different values that any process has, ascending."""
        return torch.unique(self.gather(torch.unique(values)))

    def agree(self, number: int, device: torch.device) -> None:
        """Check that all processes have the same number of steps behind them.

        Raises:
            EvergreenError: They do not.
        """
        numbers = set(self.gather(torch.tensor([number], device=device)).tolist())
        if len(numbers) > 1:
            raise EvergreenError(
                f"the processes of this run found different checkpoints (after steps {sorted(numbers)})",
                "Give all of them one shared directory for checkpoints",
            )

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the processes have."""
        return int(self.gather(torch.tensor([number], device=device)).min())
