"""How the peers' settings were found: `python -m benchmarks.ranker.peers.tune --dataset movielens --models dcnv2`.

Trains every setting of the grid on the tuning window with one seed and measures it after each epoch (or number of
trees). The best has the highest HIT@3 + AUC, the two numbers on which we compare; `configs.py` holds what was chosen.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from benchmarks.measure import measure
from benchmarks.ranker import models, quality
from benchmarks.ranker.data import WINDOWS, cache, split
from benchmarks.ranker.peers import configs, environment

WINDOW = "tuning"


def one(dataset: str, config: dict) -> list[dict]:
    """Quality of one setting at each stage."""
    stages, seconds = environment.run(models.arrays_path(dataset, WINDOW), {**config, "seed": 0})
    _, evaluation = split(dataset, WINDOW)
    probability = models.is_probability(config["model"])
    return [{**quality.qualities(evaluation, score_N, probability), "seconds": seconds} for score_N in stages]


def run(dataset: str, chosen: tuple[str, ...] = configs.NAMES, processes: int = 2) -> str:
    """Measure what is not measured yet; returns a Markdown table, best setting of each model first."""
    for model in chosen:
        models.prepare(model, dataset, WINDOW)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda config: (config, _measured(dataset, config)), _settings(chosen)))
    lines = ["| model | setting | stage | HIT@3 | AUC | GAUC | CPU s |", "|---|---|---|---|---|---|---|"]
    for model in chosen:
        stages = [
            (config, stage, row)
            for config, rows in found
            if config["model"] == model
            for stage, row in zip(_stages(config), rows, strict=True)
        ]
        for config, stage, row in sorted(stages, key=lambda s: -s[2]["hit3"] - s[2]["auc"]):
            numbers = " | ".join(f"{row[name]:.4f}" for name in ("hit3", "auc", "gauc"))
            lines.append(f"| {model} | {_words(config)} | {stage} | {numbers} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def _stages(config: dict) -> list[int]:
    return config["trace"] if isinstance(config["trace"], list) else list(range(1, config["epochs"] + 1))


def _words(config: dict) -> str:
    flat = {**config, **config["options"]}
    return " ".join(f"{k}={v}" for k, v in flat.items() if k not in ("model", "trace", "source", "options"))


def _settings(chosen: tuple[str, ...]) -> list[dict]:
    return [{"model": model, **config} for model in chosen for config in configs.GRID[model]]


def _measured(dataset: str, config: dict) -> list[dict]:
    key = hashlib.sha256(json.dumps([dataset, config], sort_keys=True).encode()).hexdigest()[:16]
    path = cache() / "tuning" / f"{key}.json"
    if not path.exists():
        result = measure("benchmarks.ranker.peers.tune:one", timeout=7200, dataset=dataset, config=config).result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=list(WINDOWS), default="movielens")
    parser.add_argument("--models", nargs="+", choices=configs.NAMES, default=configs.NAMES)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    print(run(given.dataset, tuple(given.models), given.processes))
