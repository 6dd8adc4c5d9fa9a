"""A process that ends itself when the one that started it is gone."""

import os
import threading
import time

PARENT_PID = "EVERGREEN_PARENT_PID"


def watch_parent() -> None:
    """End this process as soon as the one that the environment names as its parent is gone."""
    parent = os.environ.get(PARENT_PID)
    if parent and int(parent) != os.getpid():
        threading.Thread(target=_die_with, args=(int(parent),), daemon=True).start()


def _die_with(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os._exit(75)
        time.sleep(0.2)
