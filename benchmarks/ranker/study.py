"""Feature interactions and the ablation ladder: many recipes, one table in the form of the paper's Table 3.

    python -m benchmarks.ranker.study interactions|ladder --dataset movielens --window tuning --seeds 5

Every training runs in a process of its own on one thread. Its result is one line of the cache, named by all that it
depends on, so a killed study continues where it stopped and a changed recipe or source is measured again.
(Improving feature interactions at Pinterest, arXiv 2412.01985, Table 3.)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import Kept
from benchmarks.measure import measure
from benchmarks.page import spread
from benchmarks.ranker.data import WINDOWS, cache, split, tables
from benchmarks.ranker.variants import FULL, PATCHES, interactions, ladder
from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.bundle import code_digest
from model.config import Recipe
from model.interactions.cost import parameters
from model.metrics import auc, hit3, hits
from model.predict import score
from model.train import train

SCORINGS = 3  # of the same table; their median counts as the latency


STUDIES: dict[str, Callable[[], dict[str, Recipe]]] = {"interactions": interactions, "ladder": ladder}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        dataset: `movielens` or `kuairand`.
        window: `tuning` or `test`.
        name: Of the variant.
        seed: Seed of the training.
        recipe: What is trained.
    """

    dataset: str
    window: str
    name: str
    seed: int
    recipe: Recipe

    def key(self, code: str) -> list[Any]:
        """All that the result depends on, the data's content excepted."""
        return [self.dataset, self.window, self.name, self.seed, code, self.recipe.digest()]

    def run(self) -> dict[str, Any]:
        """Train and score in a process of its own."""
        measured = measure(
            "benchmarks.ranker.study:train_once",
            timeout=6 * 3600,
            dataset=self.dataset,
            window=self.window,
            patch=self.name if self.name in PATCHES else "",
            seed=self.seed,
            recipe=self.recipe.to_json(),
        )
        return {**measured.result, "peak_mb": measured.peak_mb}


def train_once(dataset: str, window: str, patch: str, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train on the window's training requests, score its evaluation requests, in a process of its own."""
    before, after = split(dataset, window)
    return train_and_score(before, after, patch, seed, recipe)


def train_and_score(
    before: RankingTable, after: RankingTable, patch: str, seed: int, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Quality and costs of one training."""
    PATCHES.get(patch, PATCHES[FULL])()
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as checkpoints:
        try:
            bundle = train(before, Recipe.from_json(recipe), "scratch", None, seed, Path(checkpoints))
        except EvergreenError as error:
            if "diverged" not in error.problem:
                raise
            return {"diverged": True}
    train_cpu = time.process_time() - began
    seconds = []
    for _ in range(SCORINGS):
        began = time.process_time()
        scores = score(bundle, after)
        seconds.append(time.process_time() - began)
    ranker, primary = bundle.ranker(), after.spec.actions.index(after.spec.primary_action)
    return {
        "diverged": False,
        "skipped_steps": bundle.metrics["skipped_steps"],
        "hit3": hit3(hits(after, scores))[after.spec.primary_action],
        "auc": auc(after.labels[:, primary], scores[:, primary]),
        "ms_per_1k": 1e6 * statistics.median(seconds) / after.rows,
        "train_rows_per_s": before.rows * bundle.recipe.train.epochs / train_cpu,
        "parameters": parameters(ranker) - parameters(ranker.table),
    }


def results_of(
    jobs: list[Job], path: Path, code: str, processes: int, run: Callable[[Job], dict[str, Any]] = Job.run
) -> dict[str, list[dict[str, Any]]]:
    """Results by variant, in the order of the jobs; what the cache lacks is run and written to it as it ends."""
    keys, kept = {job: job.key(code) for job in jobs}, Kept(path)
    with ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(run, job): job for job in jobs if keys[job] not in kept}
        try:
            for done in as_completed(running):
                kept.add(keys[running[done]], done.result())
        except Exception:
            pool.shutdown(cancel_futures=True)  # what has not begun must not begin, and what has ended is kept
            for done, job in running.items():
                if keys[job] not in kept and not done.cancelled() and not done.exception():
                    kept.add(keys[job], done.result())
            raise
    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        found.setdefault(job.name, []).append(kept[keys[job]])
    return found


def hyper_parameters(recipe: Recipe) -> int:
    """Numbers and switches in the ranker's part of a recipe: what somebody may have to tune."""

    def leaves(value: Any) -> int:
        if isinstance(value, dict):
            return sum(leaves(v) for k, v in value.items() if k != "name")
        return sum(map(leaves, value)) if isinstance(value, list | tuple) else 1

    return leaves(recipe.to_json()["ranker"])


def table_of(recipes: dict[str, Recipe], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The Markdown table. Runs that diverged are counted, and left out of every mean."""
    lines = [
        "| variant | HIT@3 | vs first | AUC | peak MB | ms per 1k candidates | train rows/s | dense parameters "
        "| hyper-parameters | diverged runs (skipped steps) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = None
    for name, runs in results.items():
        good = [run for run in runs if not run["diverged"]]
        trouble = f"{len(runs) - len(good)} of {len(runs)} ({sum(run['skipped_steps'] for run in good)})"
        if not good:
            lines.append(f"| {name} | – | – | – | – | – | – | – | {hyper_parameters(recipes[name])} | {trouble} |")
            continue
        hit3_, auc_ = ([run[column] for run in good] for column in ("hit3", "auc"))
        mean = statistics.mean(hit3_)
        base = mean if base is None else base
        peak, latency, rows = (
            statistics.median(run[column] for run in good) for column in ("peak_mb", "ms_per_1k", "train_rows_per_s")
        )
        lines.append(
            f"| {name} | {spread(hit3_)} | {100 * (mean / base - 1):+.2f} % | {spread(auc_)} "
            f"| {peak:,.0f} | {latency:.1f} | {rows:,.0f} | {good[0]['parameters']:,} "
            f"| {hyper_parameters(recipes[name])} | {trouble} |"
        )
    return lines


def run(
    study: str,
    dataset: str = "movielens",
    window: str = "tuning",
    seeds: int = 5,
    processes: int = 2,
) -> str:
    """Measure all variants of a study and give a Markdown section."""
    recipes = STUDIES[study]()
    tables(dataset)
    # Seed by seed, so that a study that is stopped early has something on every variant.
    jobs = [Job(dataset, window, name, seed, recipes[name]) for seed in range(seeds) for name in recipes]
    results = results_of(jobs, cache() / "study.jsonl", code_digest(), processes)
    intro = (
        f"{dataset}, {window} window {WINDOWS[dataset][window].start} to {WINDOWS[dataset][window].end}, mean ± std "
        f"over {seeds} seeds; memory (of the whole process), latency and speed are medians, in CPU time on one thread: "
        f"`python -m benchmarks.ranker.study {study} --dataset {dataset} --window {window} --seeds {seeds}`."
    )
    return "\n".join([intro, "", *table_of(recipes, results)])


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--dataset", choices=list(WINDOWS), default="movielens")
    parser.add_argument("--window", choices=("tuning", "test"), default="tuning")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    print(run(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
