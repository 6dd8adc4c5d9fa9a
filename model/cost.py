"""What a model costs to serve, measured on the exported model: saved, loaded afresh, asked request by request."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engagement.table import RankingTable
from model.bundle import WEIGHTS, Bundle
from model.columns import narrowed
from model.data import Batcher
from model.memory import Peak, used
from model.metrics import K

REQUESTS = 24  # scored by every model, each of them `ROUNDS` times; the quicker counts
ROUNDS = 2
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """One model's.

    Attributes:
        milliseconds: CPU time to score one request, median.
        weights: Bytes of the weights file.
        peak: Bytes that the process grew by at most while the model was loaded and scored its first requests.
    """

    milliseconds: float
    weights: int
    peak: int


def measure_cost(directories: Sequence[Path], table: RankingTable) -> list[Cost]:
    """Measure saved models side by side, on one thread.

    They take turns at every request, and the order of turns alternates, so that a machine that slows down does so for
    all of them.

    Args:
        directories: Of saved bundles.
        table: Requests to score; those with the most usual numbers of candidates count, by the median.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        some = _requests(table)
        _Loaded(directories[0], table)(some[0])  # whatever the first model ever loaded brings with it
        peaks = [_peak(d, table, some[:3]) for d in directories]
        times_MQ = _times([_Loaded(d, table) for d in directories], some)
    finally:
        torch.set_num_threads(threads)
    medians = np.median(times_MQ, axis=1) * 1000
    sizes = [(d / WEIGHTS).stat().st_size for d in directories]
    return [Cost(float(m), s, p) for m, s, p in zip(medians, sizes, peaks, strict=True)]


class _Loaded:
    """A saved model, ready to score one request of a table."""

    def __init__(self, directory: Path, table: RankingTable) -> None:
        bundle = Bundle.load(directory)
        self.ranker = bundle.ranker()
        self.batcher = Batcher(narrowed(table, bundle.spec), self.ranker.config)

    def __call__(self, request: int) -> None:
        with torch.inference_mode():
            self.ranker.calibration(self.ranker(self.batcher.of_requests(np.array([request]))))


def _requests(table: RankingTable) -> np.ndarray:
    comparable = np.flatnonzero(np.diff(table.offsets) > K)
    some = comparable if len(comparable) else np.arange(table.requests)
    return some[np.linspace(0, len(some) - 1, min(REQUESTS, len(some))).astype(int)]


def _peak(directory: Path, table: RankingTable, requests: np.ndarray) -> int:
    peak = Peak(_CPU)
    before = used(_CPU)
    model = _Loaded(directory, table)
    for request in requests:
        model(request)
        peak.note()
    return max(0, peak.bytes - before)


def _times(models: list[_Loaded], requests: np.ndarray) -> np.ndarray:
    """(models, requests) seconds of CPU time."""
    times_RMQ = np.zeros((ROUNDS, len(models), len(requests)))
    for turn in range(ROUNDS):
        for q, request in enumerate(requests):
            for m in range(len(models)) if (q + turn) % 2 else reversed(range(len(models))):
                start = time.thread_time()
                models[m](request)
                times_RMQ[turn, m, q] = time.thread_time() - start
    return times_RMQ.min(0)
