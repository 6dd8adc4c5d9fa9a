"""Run a replay's tasks on the cores: each as soon as what it reads is there.

Workers are processes of their own, with one torch thread each. They end when the replay ends, however it does: each
waits on a pipe that the replay's process alone holds open.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from engagement.errors import EvergreenError
from pipelines.replay_plan import Replay, Task

Told = Callable[[str, int, int], None]


class TaskFailed(EvergreenError):
    """A task of a replay failed."""


def run(replay: Replay, jobs: int, tell: Told) -> None:
    """Do what is outstanding, on `jobs` processes at once.

    Raises:
        TaskFailed: With the task's name; those that were finished are kept.
    """
    todo = replay.outstanding()
    if todo:
        _run(replay, todo, jobs, tell)
    # What a killed run left, too.
    for task in replay.tasks() + [Task(i, "table") for i in range(len(replay.slots))]:
        _drop(replay, task)


def _run(replay: Replay, todo: dict[Task, set[Task]], jobs: int, tell: Told) -> None:
    context = multiprocessing.get_context("spawn")
    alive, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(jobs, len(todo)), context, _begin, (replay, alive))
    try:
        _schedule(replay, todo, pool, jobs, tell)
        pool.shutdown()
    except BrokenProcessPool:
        raise TaskFailed(
            "a worker of the replay ended without a word, perhaps for want of memory",
            "Run the same command again, with fewer --jobs; finished slots are kept",
        ) from None
    finally:
        end.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _schedule(replay: Replay, todo: dict[Task, set[Task]], pool: ProcessPoolExecutor, jobs: int, tell: Told) -> None:
    waiting = {task: set(before) for task, before in todo.items()}
    readers = Counter(t for task in todo for t in replay.inputs(task))
    running: dict[Future[None], Task] = {}
    while waiting or running:
        ready = sorted((t for t, before in waiting.items() if not before), key=lambda t: t.priority)
        for task in ready[: jobs - len(running)]:
            del waiting[task]
            running[_submit(pool, task)] = task
        tell(", ".join(replay.told(t) for t in running.values()), len(todo) - len(waiting) - len(running), len(todo))
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task = running.pop(future)
            try:
                future.result()
            except EvergreenError as error:
                raise TaskFailed(str(error)) from error
            for before in waiting.values():
                before.discard(task)
            _tidy(replay, task, readers)
    tell("done", len(todo), len(todo))


def _submit(pool: ProcessPoolExecutor, task: Task) -> Future[None]:
    """Hand a task to a worker, perhaps a new one, which never hears Ctrl-C: the replay's process answers it."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it, from its first instant
    try:
        return pool.submit(_work, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _tidy(replay: Replay, task: Task, readers: Counter[Task]) -> None:
    """Let go what no task will read any more."""
    readers.subtract(replay.inputs(task))
    for read in [*replay.inputs(task), task]:
        if readers[read] <= 0:
            _drop(replay, read)


def _drop(replay: Replay, task: Task) -> None:
    """Remove a table, or a bundle if it is neither the first nor the newest of its lineage."""
    if task.kind != "test" and task not in replay.kept():
        shutil.rmtree(replay.artefact(task), ignore_errors=True)


_REPLAY: list[Replay] = []  # of this worker


def _begin(replay: Replay, alive: Connection) -> None:
    """Start a worker."""
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    _REPLAY.append(replay)


def _end_with(alive: Connection) -> None:
    try:
        alive.recv_bytes()
    except (EOFError, OSError):
        os._exit(75)


def _work(task: Task) -> None:
    from pipelines.replay_work import work

    work(_REPLAY[0], task)
