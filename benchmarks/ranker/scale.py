"""Rows x1, x10, x100: does time per row, or memory, grow with the table?

    python -m benchmarks.ranker.scale TABLE_DIR

TABLE_DIR is the ranking table of a dataset (MovieLens 100K: 100,000 rows). Its requests are repeated with new ids and
later times into memory-mapped tables on disk. Each scale runs in a process of its own: all that training does with
every row (weights, statistics, digest), then a fixed number of `laptop()` steps over requests drawn from the whole
table, then scores of a fixed number of rows, written to a memory-mapped file. Memory is anonymous memory, sampled:
pages of mapped files are left out, since the system takes them back when it wants.
"""

import argparse
import dataclasses
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from benchmarks.kept import Kept
from benchmarks.measure import measure
from engagement.table import RankingTable
from model.bundle import Bundle, code_digest
from model.checkpoint import Checkpoints
from model.config import Recipe, laptop
from model.data import Batcher, table_digest
from model.distributed import Ranks
from model.loader import requests_per_batch
from model.memory import used
from model.predict import score
from model.trainer import Trainer, reproducible
from model.weights import row_weights

SCALES = (1, 10, 100)
STEPS = 200  # of about 270 rows on MovieLens
SCORED = 50_000  # rows
CPU = torch.device("cpu")
_SHARED = ("history_time", "history_item", "history_actions")


def repeat(source: RankingTable, times: int, directory: Path) -> None:
    """Write the table's requests `times` over, each copy later than the one before; one copy in memory at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    later = int(source.time[-1] - source.time[0]) + 1
    for name in (f.name for f in dataclasses.fields(source) if f.name != "spec"):
        column = np.asarray(getattr(source, name))
        if name in _SHARED:
            np.save(directory / f"{name}.npy", column)
            continue
        extra = 1 if name == "offsets" else 0
        length = len(column) - extra
        dtype = np.dtype("S16") if name == "request_id" else column.dtype
        out = open_memmap(directory / f"{name}.npy", "w+", dtype, (length * times + extra, *column.shape[1:]))
        for copy in range(times):
            part = column[extra:]
            if name == "offsets":
                part = part + copy * source.rows
            elif name == "time":
                part = part + copy * later
            elif name == "request_id":
                part = np.char.add(part, f"+{copy}".encode())
            out[extra + copy * length : extra + (copy + 1) * length] = part
        out.flush()
    meta = {"spec": source.spec.to_json(), "requests": source.requests * times, "rows": source.rows * times}
    (directory / "table.json").write_text(json.dumps(meta))


class Enough(Exception):
    """The fixed number of steps is done."""


class Watch:
    """Seconds of CPU and most anonymous memory of named phases, memory sampled every few milliseconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.megabytes: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        done, peak = threading.Event(), [used(CPU)]

        def sample() -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], used(CPU))

        sampler = threading.Thread(target=sample)
        sampler.start()
        start = time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] = time.thread_time() - start
            done.set()
            sampler.join()
            self.megabytes[name] = peak[0] / 2**20


def work(table: str) -> dict:
    """All phases on one table; seconds per row and peak megabytes of each."""
    data, recipe, watch = RankingTable.load(Path(table)), laptop(), Watch()
    with reproducible(1), tempfile.TemporaryDirectory() as scratch:
        with watch.phase("every row"):
            batcher = Batcher(data, recipe.ranker, row_weights(data, recipe.train))
            trainer = Trainer(data.spec, recipe, 0, batcher, None, CPU, Ranks())
            trainer.ranker.fit_statistics(data)
            digest = table_digest(data)
        rows = _train(trainer, Path(scratch), watch)
        bundle = _bundle(trainer, data, recipe, digest)
        last = data.between(int(data.time[np.searchsorted(data.offsets, data.rows - SCORED)]), 2**62)
        out = open_memmap(Path(scratch) / "scores.npy", "w+", np.float32, (last.rows, len(data.spec.actions)))
        with watch.phase("scoring"):
            score(bundle, last, out=out)
    counts = {"every row": data.rows, "training": rows, "scoring": last.rows}
    seconds = {k: v / counts[k] for k, v in watch.seconds.items()}
    return {"rows": data.rows, "requests": data.requests, "seconds": seconds, "megabytes": watch.megabytes}


def _train(trainer: Trainer, scratch: Path, watch: Watch) -> int:
    """`STEPS` steps of the epoch that the whole table would take; returns the rows that they saw."""

    def stop(step: int, steps: int, loss: float) -> None:
        if step == STEPS:
            raise Enough

    with watch.phase("training"), suppress(Enough):
        trainer.run(Checkpoints(scratch / "kept", "scale"), stop)
    trainer.ranker.seen.copy_(trainer.table_optimizer.sums > 0)
    order = trainer.batcher.order(trainer.seed, 0)[: STEPS * requests_per_batch(trainer.batcher.table, trainer.config)]
    return int(trainer.batcher.sizes(order).sum())


def _bundle(trainer: Trainer, data: RankingTable, recipe: Recipe, digest: str) -> Bundle:
    start = datetime(1970, 1, 1, tzinfo=UTC)
    weights = trainer.ranker.state()
    return Bundle(data.spec, recipe, weights, {}, "scratch", 0, "", digest, start, start, data.rows, code_digest())


def results(source: Path, cache: Path) -> list[dict]:
    """One result a scale; those in the cache are not measured again."""
    kept, keys = Kept(cache), {scale: f"x{scale} {code_digest()}" for scale in SCALES}
    for scale in (s for s in SCALES if keys[s] not in kept):
        with tempfile.TemporaryDirectory() as directory:
            repeat(RankingTable.load(source), scale, Path(directory) / "table")
            disk = sum(p.stat().st_size for p in Path(directory).rglob("*.npy"))
            measured = measure("benchmarks.ranker.scale:work", table=str(Path(directory) / "table")).result
        kept.add(keys[scale], {"disk": disk, **measured})
    return [kept[keys[s]] for s in SCALES]


def run(source: Path, cache: Path) -> str:
    """The section of the results page."""
    rows = results(source, cache)
    first, last = rows[0]["megabytes"], rows[-1]["megabytes"]
    lines = [
        f"`python -m benchmarks.ranker.scale TABLE_DIR`: MovieLens 100K repeated to x1, x10, x100; `laptop()`, {STEPS} "
        f"steps over requests drawn from the whole table, {SCORED:,} rows scored; one thread.",
        "",
        "| rows | requests | on disk | scans, µs a row | training, µs a row | scoring, µs a row | peak in scans, MB "
        "| peak in training, MB | peak in scoring, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        cells = [f"{r['rows']:,}", f"{r['requests']:,}", f"{r['disk'] / 1e9:.2f} GB"]
        cells += [f"{1e6 * r['seconds'][p]:.2f}" for p in ("every row", "training", "scoring")]
        cells += [f"{r['megabytes'][p]:.0f}" for p in ("every row", "training", "scoring")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"From x1 to x100 the peak of training goes from {first['training']:.0f} to {last['training']:.0f} MB. What "
        "still grows: the order of an epoch, 8 bytes a request. Scores held in memory take 4 bytes an action.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "evergreen-ranker-scale.jsonl")
    arguments = parser.parse_args()
    print(run(arguments.table, arguments.cache))


if __name__ == "__main__":
    main()
