"""Runs a function in several processes of one group, as `torchrun` does, without importing torch in each of them."""

import multiprocessing
import os
import time
from collections.abc import Callable

from model.distributed import joined
from serving.processes import free_port


def _member(rank: int, size: int, port: int, function: Callable, arguments: tuple) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in group.items()})
    with joined():
        function(*arguments)


def together(size: int, function: Callable, *arguments) -> list[int]:
    """Call `function(*arguments)` in `size` processes; returns their exit codes. When one dies, all end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["model.train", "tests.unit.model_synth"])
    port = free_port()
    members = [context.Process(target=_member, args=(r, size, port, function, arguments)) for r in range(size)]
    for member in members:
        member.start()
    while any(m.is_alive() for m in members) and not any(m.exitcode for m in members):
        time.sleep(0.02)
    for member in members:
        if any(m.exitcode for m in members):
            member.kill()
        member.join()
    return [m.exitcode for m in members]
