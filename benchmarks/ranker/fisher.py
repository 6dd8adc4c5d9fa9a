"""The exact per-sample Fisher of the laptop's ranker: a loop over single samples beside ours, one core, taking turns.

    python -m benchmarks.ranker.fisher

The loop makes one backward pass a sample and adds up the squares of the gradients; it runs on some of the rows only,
and seconds are given for each row. Both are compared on the same rows.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.ranker.data import split
from model.config import TrainConfig, laptop
from model.data import Batcher
from model.fisher import measure, sample_rows
from model.gemm import keep_memory
from model.loss import label_weights, task_loss
from model.optim import dense_parameters
from model.ranker import Ranker
from model.train import train
from model.weights import row_weights

REQUESTS, ROWS, LOOP_ROWS, RUNS = 2000, 2048, 64, 5


def loop(ranker: Ranker, batcher: Batcher, rows: np.ndarray, config: TrainConfig) -> dict[str, Tensor]:
    """The Fisher by its definition, of the dense weights by name and of the table's rows as `table`."""
    matrix, dense = label_weights(ranker.spec, config), dense_parameters(ranker)
    total = {name: torch.zeros_like(p) for name, p in dense.items()}
    touched, squares = [], []
    for row in rows:
        batch = batcher.of_rows(np.array([row]))
        ranker.zero_grad(set_to_none=True)
        task_loss(ranker(batch), batch.labels_NA, batch.weight_N, matrix).backward()
        for name, p in dense.items():
            if p.grad is not None:
                total[name] += p.grad.square()
        gradient: Tensor = ranker.table.weight.grad.coalesce()  # type: ignore[union-attr]
        touched.append(gradient.indices()[0])
        squares.append(gradient.values().square())
    found, slot = torch.unique(torch.cat(touched), return_inverse=True)
    values_PD = torch.cat(squares)
    total["table"] = values_PD.new_zeros(len(found), values_PD.shape[1]).index_add(0, slot, values_PD)
    return {name: value.detach() / len(rows) for name, value in total.items()}


def differences(ranker: Ranker, batcher: Batcher, rows: np.ndarray, config: TrainConfig) -> tuple[float, float]:
    """Largest difference in units of the largest value of its tensor; and of all values, the one that is most wrong.

    Values below a millionth of their tensor's largest are left out of the second: rounding is all that they are.
    """
    expected, ours = loop(ranker, batcher, rows, config), measure(ranker, batcher, rows, config)
    given = ours.dense | {"table": ours.table_UD[ours.table_UD.any(1)]}
    of_tensor, of_value = 0.0, 0.0
    for name, value in expected.items():
        value, found = (v[v.any(1)] if name == "table" else v for v in (value, given[name]))
        largest = float(value.abs().max())
        if largest:
            of_tensor = max(of_tensor, float((found - value).abs().max()) / largest)
            real = value > 1e-6 * largest
            of_value = max(of_value, float(((found - value).abs() / value)[real].max()))
    return of_tensor, of_value


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each, in turns; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(RUNS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def run() -> str:
    """The section of the results page."""
    torch.set_num_threads(1)
    keep_memory()
    lines = [
        f"`laptop()` after one epoch of {REQUESTS:,} requests; the loop on {LOOP_ROWS} rows, ours on {ROWS}; CPU time "
        f"on one core, medians of {RUNS} turns: `python -m benchmarks.ranker.fisher`. Differences on the loop's rows, "
        "relative to the largest value of the tensor, and to the value itself.",
        "",
        "| data | loop, ms a row | ours, ms a row | ratio | difference | of a value |",
        "|---|---|---|---|---|---|",
    ]
    for data in ("movielens", "kuairand"):
        lines.append(f"| {data} | {case(data)} |")
    return "\n".join(lines)


def case(data: str) -> str:
    """The cells of one data set's line."""
    whole, recipe = split(data, "tuning")[0], laptop()
    table = whole.select(np.arange(whole.requests - REQUESTS, whole.requests))
    config = dataclasses.replace(recipe.train, epochs=1, fisher_rows=1)
    with tempfile.TemporaryDirectory() as room:
        bundle = train(table, dataclasses.replace(recipe, train=config), "scratch", None, 0, Path(room))
    ranker = bundle.ranker().requires_grad_(True)
    batcher, rows = Batcher(table, ranker.config, row_weights(table, config)), sample_rows(table, ROWS, 0)
    few = rows[:: ROWS // LOOP_ROWS]
    found = seconds(
        {
            "loop": lambda: loop(ranker, batcher, few, config),
            "ours": lambda: measure(ranker, batcher, rows, config),
        }
    )
    each, ours = found["loop"] / len(few) * 1e3, found["ours"] / len(rows) * 1e3
    of_tensor, of_value = differences(ranker, batcher, few, config)
    return f"{each:.2f} | {ours:.3f} | {each / ours:.0f} | {of_tensor:.0e} | {of_value:.0e}"


if __name__ == "__main__":
    print(run())
