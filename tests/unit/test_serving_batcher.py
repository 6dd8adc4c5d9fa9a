"""Requests that wait for the model are merged; nobody waits for a timer, and nobody suffers for another."""

import asyncio
import threading

import pytest

from serving.batcher import Batcher, Run


class Worker:
    """Remembers its batches; `gate` holds it up, and a request "bad" fails."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, batch):
        self.batches.append(list(batch))
        self.gate.wait(5)
        if "bad" in batch:
            raise ValueError("bad")
        return [given.upper() for given in batch]


async def held(worker: Worker, batcher: Batcher) -> asyncio.Task:
    """A first request that keeps the worker busy until the gate opens."""
    worker.gate.clear()
    first = asyncio.create_task(batcher("first"))
    while not worker.batches:
        await asyncio.sleep(0.001)
    return first


def test_lone_request_runs_alone_and_at_once():
    worker, runs = Worker(), list[Run]()
    batcher = Batcher(worker, len, 100, runs.append)
    assert asyncio.run(batcher("a")) == "A"
    assert worker.batches == [["a"]] and [(r.requests, len(r.waited)) for r in runs] == [(1, 1)]


def test_requests_that_become_ready_together_are_one_run():
    async def ask():
        return await asyncio.gather(*(batcher(x) for x in "abc"))

    worker = Worker()
    batcher = Batcher(worker, len, 100)
    assert asyncio.run(ask()) == ["A", "B", "C"]
    assert worker.batches == [["a", "b", "c"]]


def test_what_comes_while_the_worker_is_busy_is_its_next_batch_in_order():
    async def ask():
        first = await held(worker, batcher)
        rest = [asyncio.create_task(batcher(x)) for x in "abcd"]
        await asyncio.sleep(0)
        worker.gate.set()
        return await asyncio.gather(first, *rest)

    worker = Worker()
    batcher = Batcher(worker, len, 100)
    assert asyncio.run(ask()) == ["FIRST", "A", "B", "C", "D"]
    assert worker.batches == [["first"], ["a", "b", "c", "d"]]


@pytest.mark.parametrize(("most", "batches"), [(4, [["aa", "bb"], ["cc"]]), (3, [["aa"], ["bb"], ["cc"]])])
def test_batch_has_at_most_the_rows_of_the_limit(most, batches):
    async def ask():
        return await asyncio.gather(*(batcher(x) for x in ("aa", "bb", "cc")))

    worker = Worker()
    batcher = Batcher(worker, len, most)
    asyncio.run(ask())
    assert worker.batches == batches


def test_request_above_the_limit_of_rows_goes_alone():
    async def ask():
        return await asyncio.gather(*(batcher(x) for x in ("a", "bbbbbb", "c")))

    worker = Worker()
    batcher = Batcher(worker, len, 3)
    assert asyncio.run(ask()) == ["A", "BBBBBB", "C"]
    assert worker.batches == [["a"], ["bbbbbb"], ["c"]]


def test_bad_request_of_a_batch_fails_alone():
    async def ask():
        return await asyncio.gather(*(batcher(x) for x in ("a", "bad", "c")), return_exceptions=True)

    batcher = Batcher(Worker(), len, 100)
    first, bad, last = asyncio.run(ask())
    assert (first, last) == ("A", "C") and isinstance(bad, ValueError)


def test_request_that_was_given_up_is_never_run_and_holds_up_nobody():
    async def ask():
        first = await held(worker, batcher)
        gone, kept = asyncio.create_task(batcher("gone")), asyncio.create_task(batcher("kept"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        worker.gate.set()
        assert await kept == "KEPT" and await first == "FIRST"
        return await batcher("later")

    worker = Worker()
    batcher = Batcher(worker, len, 100)
    assert asyncio.run(ask()) == "LATER"
    assert worker.batches == [["first"], ["kept"], ["later"]]


def test_worker_that_answers_too_few_is_an_error_for_all_and_not_silence():
    async def ask():
        return await asyncio.wait_for(asyncio.gather(batcher("a"), batcher("b"), return_exceptions=True), 5)

    batcher = Batcher(lambda batch: [], len, 100)
    assert [type(a) for a in asyncio.run(ask())] == [ValueError, ValueError]
