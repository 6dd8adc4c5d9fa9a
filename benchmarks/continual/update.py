"""What one update of a slot takes, the Fisher included, beside training from scratch; each on one thread."""

import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.continual.homes import RANGES
from benchmarks.measure import measure
from benchmarks.ranker.data import tables
from engagement.slots import slots
from engagement.table import RankingTable, micros
from evergreen.settings import get_settings
from model.bundle import Bundle
from model.config import DEFAULT_STRATEGY, RECIPES
from model.exam import held_out
from model.train import train

REPEATS = 3
DATASETS = ("movielens", "kuairand")


def run() -> str:
    """The section's Markdown."""
    lines = [
        f"`{DEFAULT_STRATEGY}` on the last slot's window, median of {REPEATS}, beside `scratch` on all before it; wall "
        "and CPU seconds of one thread. `python -m benchmarks.continual update`",
        "",
        "| data | rows | seconds | CPU s | importance, s | rows, scratch | seconds, scratch | CPU s, scratch | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset in DATASETS:
        found = measure("benchmarks.continual.update:once", timeout=3600, dataset=dataset).result
        u, s = found["update"], found["scratch"]
        lines.append(
            f"| {dataset} | {u['rows']:,} | {u['wall']:.1f} | {u['cpu']:.1f} | {u['importance']:.1f} | {s['rows']:,} | "
            f"{s['wall']:.1f} | {s['cpu']:.1f} | 1/{s['cpu'] / u['cpu']:.1f} |"
        )
    return "\n".join(lines)


def once(dataset: str) -> dict[str, Any]:
    """Train up to the last slot but one, then update on the window after it, a few times."""
    torch.set_num_threads(1)
    table, when = tables(dataset), RANGES[dataset]
    start, end = slots(when.start, when.end)[-2:]
    base, first = _timed(_learned(table.between(0, micros(start))), "scratch", None)
    window = _learned(table.between(micros(start), micros(end + timedelta(microseconds=1))))
    updates = [_timed(window, DEFAULT_STRATEGY, base)[1] for _ in range(REPEATS)]
    return {"scratch": first, "update": {k: statistics.median(u[k] for u in updates) for k in first}}


def _learned(table: RankingTable) -> RankingTable:
    return table.select(np.flatnonzero(~held_out(table)))


def _timed(table: RankingTable, strategy: str, parent: Bundle | None) -> tuple[Bundle, dict[str, float]]:
    settings = get_settings()
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as room:
        bundle = train(table, RECIPES[settings.recipe](), strategy, parent, settings.seed, Path(room))
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return bundle, took | {"rows": table.rows, "importance": bundle.metrics["importance_seconds"]}
