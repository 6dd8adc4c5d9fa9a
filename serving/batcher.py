"""Merges requests that wait for the model into one run of it, on one worker thread.

There is no timer: a request that finds the worker idle starts at once, so a lone one waits for nobody; those that come
while it works are its next batch. The time that merging costs is thus the rest of the present run and no more.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Run:
    """One run of the worker, for the metrics.

    Attributes:
        requests: How many were merged.
        waited: Seconds that each of them waited for the worker.
        seconds: How long it took.
    """

    requests: int
    waited: Sequence[float]
    seconds: float


@dataclass(frozen=True)
class _Waiting(Generic[In, Out]):
    given: In
    size: int
    since: float
    answer: "asyncio.Future[Out]"


class Batcher(Generic[In, Out]):
    """Runs `work` for batches of what is given to it, one after another.

    Args:
        work: A batch to its answers, in order; called on the worker thread.
        size: Rows of one request.
        most_rows: Rows that are run at once; a request that has more goes alone.
        observe: Told of every run, on the event loop.
    """

    def __init__(
        self,
        work: Callable[[list[In]], Sequence[Out]],
        size: Callable[[In], int],
        most_rows: int,
        observe: Callable[[Run], None] = lambda run: None,
    ) -> None:
        self._work, self._size, self._most_rows, self._observe = work, size, most_rows, observe
        self._queue: deque[_Waiting[In, Out]] = deque()
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def __call__(self, given: In) -> Out:
        """The answer to one request.

        Raises:
            Exception: What `work` raises for this request alone; another request of the batch does not matter. One
                that is cancelled while it waits is never run.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting[In, Out](given, self._size(given), time.perf_counter(), loop.create_future())
        self._queue.append(waiting)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._start, loop)  # after the other requests that became ready in this turn of the loop
        return await waiting.answer

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._next()
        if not batch:
            self._busy = False
            return
        start = time.perf_counter()
        done = loop.run_in_executor(self._thread, self._run, [w.given for w in batch])
        done.add_done_callback(lambda future: self._deliver(loop, batch, start, future.result()))

    def _next(self) -> list[_Waiting[In, Out]]:
        """The oldest requests that still want an answer, within the limit of rows."""
        batch: list[_Waiting[In, Out]] = []
        rows = 0
        while self._queue:
            if self._queue[0].answer.done():  # cancelled
                self._queue.popleft()
                continue
            rows += self._queue[0].size
            if batch and rows > self._most_rows:
                break
            batch.append(self._queue.popleft())
        return batch

    def _run(self, batch: list[In]) -> Sequence[Out | Exception]:
        """Answers, or what went wrong with each: a batch that fails is run again one by one."""
        try:
            answers = self._work(batch)
            if len(answers) != len(batch):
                raise ValueError(f"{len(answers)} answers for {len(batch)} requests")
            return answers
        except Exception as error:
            return [error] if len(batch) == 1 else [answer for given in batch for answer in self._run([given])]

    def _deliver(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Waiting[In, Out]],
        start: float,
        answers: Sequence[Out | Exception],
    ) -> None:
        self._start(loop)  # the worker first: it works while the answers are written
        self._observe(Run(len(batch), [start - w.since for w in batch], time.perf_counter() - start))
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)
