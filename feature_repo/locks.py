"""Locks that the system takes back from a process that dies, shared or for one alone."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PAUSE = 0.05  # seconds between two looks at a lock that another holds


@contextlib.contextmanager
def held(path: Path, shared: bool, stopped: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold a lock file while inside.

    Args:
        path: The file; made with its directory, never removed.
        shared: Hold it beside others that share it, but not beside one that holds it alone.
        stopped: Give up waiting when this is true.

    Yields:
        Whether it is held; False only after `stopped`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        while not (got := _try(file.fileno(), shared)) and not stopped():
            time.sleep(_PAUSE)
        yield got  # closing the file gives the lock back


def _try(file: int, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
