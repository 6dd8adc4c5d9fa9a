"""A stream consumer in a process of its own, for tests that kill it; started by the fork server, which has Feast."""

import multiprocessing
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["feast", "feature_repo.stream", "feature_repo.online_store", "redis"])


def start(root: Path, store: str, url: str, max_records: int = 200) -> ForkServerProcess:
    """`stream.run` with small batches, so that a kill hits one in the middle; stderr goes to `root/../stream.log`."""
    process = _CONTEXT.Process(target=_run, args=(root, store, url, max_records), daemon=True)
    process.start()
    return process


def _run(root: Path, store: str, url: str, max_records: int) -> None:
    import logging

    from feature_repo import stream

    sys.stderr = (root.parent / "stream.log").open("a", buffering=1)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    stream.MAX_RECORDS = max_records
    stream.run(root, store, url)
