"""How much memory training takes, and how many requests of a batch fit a device."""

import ctypes
import re
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from engagement.errors import EvergreenError

TARGET = 0.60  # of the device: the peak that a chosen batch size stays under
LIMIT = 0.75  # a run whose peak would pass this share is refused
_MB = 2**20


def used(device: torch.device) -> int:
    """Bytes in use: on a GPU the peak since `forget`, on a CPU what this process holds now.

    Pages of memory-mapped tables are left out: the system takes them back when it wants.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    # Other systems than Linux tell only the most that the process ever had.
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Peak:
    """The most memory that training had in use; `note` is called where a step holds the most.

    Attributes:
        bytes: So far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.forget()

    def forget(self) -> None:
        """Begin to measure anew."""
        self.bytes = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what earlier steps freed and the allocator kept is no use of what comes

    def note(self) -> None:
        """Take the present use into account."""
        self.bytes = max(self.bytes, used(self.device))

    @property
    def megabytes(self) -> float:
        """The peak in MiB."""
        return self.bytes / _MB


def choose_batch(peak_of: Callable[[int], int], total: int, most: int) -> int:
    """Number of requests in a batch whose peak stays within `TARGET` of a device's memory.

    The peak grows about linearly with the batch, so two small trials tell where the target lies. The size found is
    tried too, and made smaller until it is within. Sizes are rounded so that small differences between two
    measurements of the same device choose the same.

    Args:
        peak_of: Peak bytes of a training step with that many requests.
        total: Bytes of the device.
        most: The size that is wanted; never more.

    Raises:
        EvergreenError: Even one request passes `LIMIT`.
    """
    alone = peak_of(1)
    if alone > LIMIT * total:
        raise EvergreenError(
            f"training needs {alone / _MB:,.0f} MB for one request, more than {LIMIT:.0%} of the device's "
            f"{total / _MB:,.0f} MB",
            "Choose a recipe with fewer buckets or a shorter history, or a larger device",
        )
    few = min(8, most)
    slope = max(1.0, (peak_of(few) - alone) / max(1, few - 1))
    size = _rounded(max(1, min(most, int(1 + (TARGET * total - alone) / slope))), most)
    while size > 1 and peak_of(size) > TARGET * total:
        size = _rounded(max(1, min(size - 1, int(size * 0.9))), most)
    return size


def _rounded(size: int, most: int) -> int:
    # To three binary digits; a size that was asked for stays what it is.
    return size if size == most else size - size % max(1, 1 << max(0, size.bit_length() - 3))
