"""Everything that is compared: baselines, peers and our recipes, behind one function."""

import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.ranker.data import cache, split, table_path
from benchmarks.ranker.peers import arrays, configs, environment
from engagement.table import RankingTable
from model.bundle import code_digest
from model.config import RECIPES
from model.metrics import ranking_score
from model.predict import score
from model.train import train

OURS = "ours:"
# Weight of the overall rate, in impressions; of 5, 20 and 50 the best on the tuning windows.
SMOOTHING = 20


def names() -> tuple[str, ...]:
    """All models."""
    return ("popularity", "popularity_30d", *configs.NAMES, *(OURS + recipe for recipe in RECIPES))


def is_peer(model: str) -> bool:
    """Whether the model needs the peers' environment."""
    return model in configs.NAMES


def has_seeds(model: str) -> bool:
    """Whether runs with other seeds differ."""
    return not model.startswith("popularity")


def is_probability(model: str) -> bool:
    """Whether scores are probabilities (LambdaMART's only order)."""
    return model != "lambdamart"


def prepare(model: str, dataset: str, window: str) -> None:
    """Install and build what a peer needs. One process does this before several train."""
    if is_peer(model):
        environment.prepare(configs.config(model, dataset))
        arrays_path(dataset, window)


def digest(model: str, dataset: str) -> str:
    """Names the code and the configuration that a result depends on (12 hex digits)."""
    parts = [json.loads((table_path(dataset) / "table.json").read_text())["digest"]]
    if model.startswith(OURS):
        parts += [code_digest(), RECIPES[model.removeprefix(OURS)]().digest()]
    elif is_peer(model):
        parts += [_source(environment.DRIVER), _source(Path(arrays.__file__)), *environment.PACKAGES]
        parts += [json.dumps(configs.config(model, dataset), sort_keys=True)]
    else:
        parts += [_source(Path(__file__))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def scores(model: str, dataset: str, window: str, seed: int) -> tuple[np.ndarray, float]:
    """Train and score the evaluation window.

    Returns:
        (N,) scores of the primary action, and CPU seconds of training.
    """
    if is_peer(model):
        stages, seconds = environment.run(
            arrays_path(dataset, window), {**configs.config(model, dataset), "seed": seed}
        )
        return stages[-1], seconds
    training, evaluation = split(dataset, window)
    if model.startswith(OURS):
        return _ours(model.removeprefix(OURS), training, evaluation, seed)
    start = time.process_time()
    found = _popularity(training, evaluation) if model == "popularity" else _recent_rate(training, evaluation)
    return found, time.process_time() - start


def labels(table: RankingTable) -> np.ndarray:
    """(N,) labels of the primary action, as numbers."""
    return ranking_score(table.spec, table.labels).astype(np.float64)


def _ours(recipe: str, training: RankingTable, evaluation: RankingTable, seed: int) -> tuple[np.ndarray, float]:
    with tempfile.TemporaryDirectory() as room:
        start = time.process_time()
        bundle = train(training, RECIPES[recipe](), "scratch", None, seed, Path(room))
        seconds = time.process_time() - start
    return ranking_score(evaluation.spec, score(bundle, evaluation)).astype(np.float64), seconds


def _popularity(training: RankingTable, evaluation: RankingTable) -> np.ndarray:
    """Rate of the primary action of each item in the training window, drawn to the overall rate."""
    label, (item, place) = labels(training), np.unique(training.item_id, return_inverse=True)
    shown, acted = np.bincount(place), np.bincount(place, weights=label)
    rate = (acted + SMOOTHING * label.mean()) / (shown + SMOOTHING)
    found = np.minimum(np.searchsorted(item, evaluation.item_id), len(item) - 1)
    return np.where(item[found] == evaluation.item_id, rate[found], label.mean())


def _recent_rate(training: RankingTable, evaluation: RankingTable) -> np.ndarray:
    """The table's own feature: rate of the primary action of each item in the 30 days before the request."""
    columns = [f.name for f in evaluation.spec.of("candidate", hashed=False)]
    rate = evaluation.item_num[:, columns.index(f"item_stats__rate_{evaluation.spec.primary_action}_30d")]
    return np.where(np.isnan(rate), labels(training).mean(), rate).astype(np.float64)


def arrays_path(dataset: str, window: str) -> Path:
    """The split as arrays for the peers, written when it is not in the cache."""
    table = json.loads((table_path(dataset) / "table.json").read_text())["digest"]
    key = hashlib.sha256(f"{_source(Path(arrays.__file__))}{table}".encode()).hexdigest()[:8]
    path = cache() / "arrays" / f"{dataset}-{window}-{key}"
    if not (path / "meta.json").exists():
        arrays.write(*split(dataset, window), path)
    return path


def _source(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
