"""What every step shares: how it is declared, how it starts, how it tells its progress.

A step is a lightweight Python component: KFP ships the source of the function, the image holds these packages.
So a step's body imports what it needs and stays a few lines around functions that a test calls directly. PyTorch is
imported in functions only: the command line reads every step to compile a pipeline, and would wait seconds for it.
"""

import json
import os
import threading
from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.watch import watch_parent
from evergreen.settings import Settings, get_settings

# One image for every step; the tag is replaced at release (docs/kubernetes.md).
IMAGE = os.environ.get("EVERGREEN_IMAGE", "evergreen-python:0.1.0")


def step(function: Callable[..., Any]) -> Any:
    """Declare a KFP step. Nothing is installed at run time: the image, or this environment, has everything.

    Inside a running step KFP loads a small `dsl` without `component`; the function is wanted as it is there.
    """
    if not hasattr(dsl, "component"):
        return function
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)


PROGRESS = "::evergreen::"
_step_runs = threading.Event()  # set in a step's own process; elsewhere `tell` has nobody to tell


def begin() -> Settings:
    """Start a step: settings from the environment, and a watch on the process that started the pipeline.

    The local runner's children outlive a `kill -9` of their parent. An orphan that goes on writing would meet
    the next run at the same files, so each step ends itself when the pipeline's process is gone.
    """
    _step_runs.set()
    watch_parent()
    return get_settings()


def tell(text: str, done: int = 0, total: int = 0) -> None:
    """Print one line of progress that the command line turns into a bar."""
    if _step_runs.is_set():
        print(f"{PROGRESS}{json.dumps({'text': text, 'done': done, 'total': total})}", flush=True)
