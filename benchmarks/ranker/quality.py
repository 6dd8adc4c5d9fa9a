"""Ranking quality beside the peers: `python -m benchmarks.ranker.quality --dataset movielens --window tuning`.

Every model trains on the same requests and scores the same candidates. Each run is a process of its own with one
thread. Results go to a file with one line a run, from which a killed benchmark continues.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from benchmarks.kept import Kept
from benchmarks.measure import measure
from benchmarks.page import spread
from benchmarks.ranker import models
from benchmarks.ranker.data import WINDOWS, cache, split, tables
from engagement.table import RankingTable
from model.metrics import auc, calibration_error, grouped_auc, hit3, hits, log_loss, random_hit3

DEFAULT = ("popularity", "popularity_30d", *models.configs.NAMES, "ours:laptop")
SEEDS, PROCESSES, TIMEOUT = 5, 2, 7200.0
COLUMNS = {  # digits
    "hit3": ("HIT@3", 4),
    "auc": ("AUC", 4),
    "gauc": ("GAUC", 4),
    "log_loss": ("log-loss", 4),
    "ece": ("ECE", 4),
    "seconds": ("train, CPU s", 0),
}


def one(dataset: str, window: str, model: str, seed: int) -> dict[str, float]:
    """Train and measure one model with one seed."""
    score_N, seconds = models.scores(model, dataset, window, seed)
    _, evaluation = split(dataset, window)
    return {**qualities(evaluation, score_N, models.is_probability(model)), "seconds": seconds}


def qualities(evaluation: RankingTable, score_N: np.ndarray, probability: bool) -> dict[str, float]:
    """The numbers of some scores; log-loss and ECE only for probabilities."""
    label_N = models.labels(evaluation)
    row = {
        "hit3": hit3(hits(evaluation, score_N))[evaluation.spec.primary_action],
        "auc": auc(label_N, score_N),
        "gauc": grouped_auc(label_N, score_N, evaluation.user_id[evaluation.request_of_row]),
    }
    if probability:
        row |= {"log_loss": log_loss(label_N, score_N), "ece": calibration_error(label_N, score_N)}
    return row


def run(
    dataset: str = "movielens",
    window: str = "test",
    chosen: tuple[str, ...] = DEFAULT,
    seeds: int = SEEDS,
    processes: int = PROCESSES,
) -> str:
    """Measure what is not measured yet; returns the section in Markdown."""
    tables(dataset)
    for model in chosen:
        models.prepare(model, dataset, window)
    wanted = [(model, seed) for model in chosen for seed in range(seeds if models.has_seeds(model) else 1)]
    keys = {job: f"{dataset} {window} {job[0]} {job[1]} {models.digest(job[0], dataset)}" for job in wanted}
    kept = Kept(cache() / "quality.jsonl")
    # Threads only wait: each measurement is a process of its own.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(processes) as pool:
        waiting = {}
        for model, seed in (job for job in wanted if keys[job] not in kept):
            arguments: dict[str, Any] = {"dataset": dataset, "window": window, "model": model, "seed": seed}
            done = pool.submit(measure, "benchmarks.ranker.quality:one", timeout=TIMEOUT, **arguments)
            waiting[done] = model, seed
        for done in as_completed(waiting):
            job, measured = waiting[done], done.result()
            kept.add(keys[job], {**measured.result, "peak_mb": round(measured.peak_mb)})
            print(f"{job[0]} seed {job[1]}: HIT@3 {measured.result['hit3']:.4f}", file=sys.stderr, flush=True)
    rows = {model: [kept[keys[job]] for job in wanted if job[0] == model] for model in chosen}
    return _section(dataset, window, rows)


def _section(dataset: str, window: str, rows: dict[str, list[dict]]) -> str:
    training, evaluation = split(dataset, window)
    counted = hits(evaluation, np.zeros(evaluation.rows))
    primary = evaluation.spec.primary_action
    lines = [
        f"Trained on {training.requests:,} requests with {training.rows:,} candidates before "
        f"{WINDOWS[dataset][window].start}, measured on {evaluation.requests:,} requests with {evaluation.rows:,} "
        f"candidates until {WINDOWS[dataset][window].end} ({window} window of {dataset}); HIT@3 of `{primary}` over "
        f"the {len(counted.requests):,} requests with more than three candidates. "
        f"`python -m benchmarks.ranker.quality --dataset {dataset} --window {window}`",
        "",
        f"| model | {' | '.join(title for title, _ in COLUMNS.values())} | seeds |",
        f"|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for model, runs in rows.items():
        cells = [spread([r[name] for r in runs if name in r], digits) for name, (_, digits) in COLUMNS.items()]
        lines.append(f"| {model} | {' | '.join(cells)} | {len(runs)} |")
    lines += [
        "",
        f"Mean ± standard deviation over seeds. A random order has HIT@3 {random_hit3(counted)[primary]:.4f}. GAUC: "
        "AUC within each user who has both labels, weighted by the user's candidates. ECE: 15 bins of equal mass. "
        "LambdaMART's scores only order, so they have no log-loss.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=list(WINDOWS), default="movielens")
    parser.add_argument("--window", choices=["tuning", "test"], default="test")
    parser.add_argument("--models", nargs="+", choices=models.names(), default=DEFAULT, metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    given = parser.parse_args()
    print(run(given.dataset, given.window, tuple(given.models), given.seeds, given.processes))
