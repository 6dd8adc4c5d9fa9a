"""The peers' environment: a virtual environment with pinned packages, and the model files of FuxiCTR's repository.

PyPI's fuxictr 2.3.10 has the library but not the models, which are in the repository's model_zoo. No third-party code
is kept in this project: the files are fetched at a pinned commit. EVERGREEN_FUXICTR names another place to fetch from,
such as a local clone.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.ranker.data import cache
from engagement.errors import EvergreenError

PACKAGES = ("torch==2.13.0", "fuxictr==2.3.10", "lightgbm==4.7.0", "numpy==2.4.6")
REPOSITORY = "https://github.com/reczoo/FuxiCTR"
COMMIT = "0245987fdc1d43c36164ea496a02324885a8557a"
DRIVER = Path(__file__).with_name("driver.py")


def prepare(config: dict) -> None:
    """Install the environment, and fetch the model files if the config needs one, where they are not in the cache.

    Raises:
        EvergreenError: A package or the repository cannot be fetched.
    """
    _install()
    if "source" in config:
        _fetchmodels()


def run(data: Path, config: dict) -> tuple[np.ndarray, float]:
    """Train one peer and score with it.

    Args:
        data: Directory written by `arrays.write`.
        config: What `driver.py` takes; `source` is a path in FuxiCTR's repository.

    Returns:
        (S, N) scores of the evaluation window at each stage of `trace` (S = 1 without it: at the end), and CPU seconds
        of training.

    Raises:
        EvergreenError: The peer failed.
    """
    if "source" in config:
        config = {**config, "source": str(models() / config["source"])}
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "scores.npz"
        command = [str(python()), str(DRIVER), str(data), str(out), json.dumps(config)]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=room, env={**own, "OMP_NUM_THREADS": "1"}, check=False
        )
        if done.returncode != 0:
            raise EvergreenError(f"{config['model']} failed: {done.stderr[-1500:]}", "Read the message above")
        with np.load(out) as result:
            return result["scores"].astype(np.float64), float(result["seconds"])


def _install() -> None:
    if (python().parent / "ready").exists():
        return
    _room().mkdir(parents=True, exist_ok=True)
    log = _room() / "pip.log"
    with log.open("w") as out:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(python().parents[1])],
            [str(python()), "-m", "pip", "install", *PACKAGES],
        ):
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode != 0:
                raise EvergreenError(f"the peers' environment cannot be installed (see {log})", "Connect to PyPI")
    (python().parent / "ready").touch()


def _fetchmodels() -> None:
    if (models() / "model_zoo").exists():
        return
    source = os.environ.get("EVERGREEN_FUXICTR", REPOSITORY)
    models().mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(models())]
    for command in (
        ["init", "--quiet"],
        ["fetch", "--quiet", "--depth", "1", source, COMMIT],
        ["checkout", "--quiet", "FETCH_HEAD", "--", "model_zoo"],
    ):
        quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        done = subprocess.run([*git, *command], capture_output=True, text=True, env=quiet, check=False)
        if done.returncode != 0:
            raise EvergreenError(
                f"FuxiCTR's models cannot be fetched from {source} ({done.stderr.strip()[-300:]})",
                f"Connect to the network, or set EVERGREEN_FUXICTR to a clone with commit {COMMIT[:7]}",
            )


def _room() -> Path:
    return cache() / "peers"


def python() -> Path:
    """The environment's interpreter."""
    name = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:8]
    return _room() / f"environment-{name}" / "bin" / "python"


def models() -> Path:
    """The clone with the model files."""
    return _room() / f"FuxiCTR-{COMMIT[:7]}"
