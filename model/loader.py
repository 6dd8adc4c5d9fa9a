"""The batches of a training run, step by step; on a GPU cut a little ahead of the trainer.

What a step gets depends on the seed and the step alone, so neither a thread nor a restart changes it.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from engagement.table import RankingTable
from model.config import TrainConfig
from model.data import Batch, Batcher, Share, hide
from model.distributed import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """What one process computes in one step.

    Attributes:
        batch: Its requests, with what training hides hidden.
        share: Its share of the whole batch's rows: means over rows count this much.
    """

    batch: Batch
    share: float


def requests_per_batch(table: RankingTable, config: TrainConfig) -> int:
    """How many requests hold `rows_per_batch` candidates on average."""
    return max(1, round(config.rows_per_batch * table.requests / table.rows))


class Loader:
    """Cuts this process's part of every batch.

    Args:
        batcher: Of the training table.
        config: Batch size and what is hidden.
        seed: Seed of the order and of what is hidden.
        ranks: This process among those of the run.

    Attributes:
        per_epoch: Steps in an epoch.
    """

    def __init__(self, batcher: Batcher, config: TrainConfig, seed: int, ranks: Ranks) -> None:
        self.batcher, self.config, self.seed, self.ranks = batcher, config, seed, ranks
        self.requests_per_batch = requests_per_batch(batcher.table, config)
        self.per_epoch = -(-batcher.table.requests // self.requests_per_batch)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def part(self, step: int) -> Part:
        """This process's part of the batch of a step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.batcher.order(self.seed, epoch)
        size = self.requests_per_batch
        whole = self._order[place * size : (place + 1) * size]
        first, last, counts = self.ranks.span(len(whole))
        starts = np.concatenate([[0], np.cumsum(self.batcher.sizes(whole))])
        share = Share(len(whole), first, int(starts[-1]), int(starts[first]))
        generator = torch.Generator().manual_seed(mix(self.seed, step + 1))
        batch = hide(self.batcher.of_requests(whole[first:last]), self.config, generator, share)
        return Part(batch, len(batch.rows) / share.rows if counts else 0.0)


def ahead(make: Callable[[int], T], steps: range, depth: int) -> Generator[T, None, None]:
    """`make(step)` for every step, up to `depth` of them made by one thread before they are asked for.

    An error in `make` is raised where its result is asked for. Closing the iterator, or an error, ends the thread.
    With depth 0 there is none: on a CPU the trainer itself wants the cores.
    """
    if not depth:
        yield from map(make, steps)
        return
    ready: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "loader", initializer=torch.set_num_threads, initargs=(1,)) as thread:
        try:
            for step in steps:
                ready.append(thread.submit(make, step))
                if len(ready) > depth:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def mix(seed: int, step: int, *stream: int) -> int:
    """The seed of everything random in one step, or in one epoch on another stream."""
    return int(np.random.SeedSequence([seed, step, *stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))
