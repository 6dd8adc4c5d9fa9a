"""Run a pipeline here, from the same compiled YAML that a cluster gets.

`kfp.local` runs each step as a process of this environment. Three of its habits are corrected here: it prints
everything to stdout (captured into one log a run), it tells a failure's cause only there (the last EvergreenError
is raised again), and it skips a branch with a mere warning when it cannot resolve its condition (made an error).
"""

import builtins
import contextlib
import io
import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from components.base import PROGRESS
from components.watch import PARENT_PID
from engagement.errors import EvergreenError
from evergreen.settings import Settings

Progress = Callable[[str, str, int, int], None]  # step, text, done, total

KEPT_RUNS = 48  # newest runs of each pipeline whose files and logs stay: an hourly check would leave 38 GB a year

_STARTED = re.compile(r"Executing task (?:\x1b\[[0-9;]*m)*'([\w-]+)'")
_CAUSE = re.compile(r"(?:EvergreenError|NothingNew): (.*)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Ran:
    """A finished pipeline: its log, and the wall seconds from each step's start to the next."""

    log: Path
    seconds: dict[str, float]


class _Tee(io.TextIOBase):
    """Writes what the runner prints to the log and turns progress lines into calls."""

    def __init__(self, log: io.TextIOBase, progress: Progress | None) -> None:
        self.log, self.progress, self.step, self.tail = log, progress, "", ""
        self.started: list[tuple[str, float]] = []

    def seconds(self) -> dict[str, float]:
        """Wall seconds by step, in the order in which they ran."""
        ends = [t for _, t in self.started[1:]] + [time.monotonic()]
        return {step: round(end - start, 1) for (step, start), end in zip(self.started, ends, strict=True)}

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        *lines, self.tail = (self.tail + text).split("\n")
        for line in lines:
            self._read(line)
        return len(text)

    def _read(self, line: str) -> None:
        if started := _STARTED.search(line):
            self.step = started.group(1)
            self.started.append((self.step, time.monotonic()))
            self._tell(self.step, "", 0, 0)
        elif PROGRESS in line:
            with contextlib.suppress(ValueError):
                told = json.loads(_ANSI.sub("", line.split(PROGRESS, 1)[1]))
                self._tell(self.step, told["text"], told["done"], told["total"])

    def _tell(self, *what: Any) -> None:
        if self.progress:
            self.progress(*what)


class _Unresolved(logging.Handler):
    """Remembers the warnings after which the local runner silently skips a branch."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "Could not resolve" in text or "Condition evaluation failed" in text:
            self.seen.append(text)


def run(pipeline: Any, settings: Settings, progress: Progress | None = None, **arguments: Any) -> Ran:
    """Compile one pipeline and run it to its end.

    Finished steps are taken from the cache when the same run is asked for again, so a killed run resumes.

    Raises:
        EvergreenError: A step failed; the message is the step's own, or points to the log.
    """
    from kfp import compiler, components, local

    settings.pipeline_root.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    name = pipeline.name
    _forget_old(settings.pipeline_root, name)
    log_path = settings.pipeline_root / "logs" / f"{name}-{stamp}.log"
    log_path.parent.mkdir(exist_ok=True)
    compiled = log_path.with_suffix(".yaml")
    compiler.Compiler().compile(pipeline, str(compiled))
    _without_retries(compiled)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(settings.pipeline_root),
        raise_on_error=True,
        enable_caching=True,
    )
    os.environ[PARENT_PID] = str(os.getpid())
    os.environ["EVERGREEN_HOME"] = str(settings.root)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the core from the next process
    os.environ["PYTHONWARNINGS"] = "ignore"  # libraries' deprecations, which the user cannot act on
    warnings.filterwarnings("ignore", module=r"kfp\.")  # "cpu_request has no effect locally", once a task
    unresolved, plain_print = _Unresolved(), builtins.print
    logging.getLogger().addHandler(unresolved)
    try:
        with log_path.open("w") as log:
            tee = _Tee(log, progress)  # type: ignore[arg-type]
            with contextlib.redirect_stdout(tee):  # type: ignore[type-var]
                components.load_component_from_file(str(compiled))(**arguments)
    except Exception as error:
        raise _told(error, log_path) from error
    finally:
        logging.getLogger().removeHandler(unresolved)
        builtins.print = plain_print  # the runner's loop threads leave a patched print behind
    if unresolved.seen:
        raise EvergreenError(f"pipeline {name} skipped a branch: {unresolved.seen[0]}", f"See {log_path}")
    return Ran(log_path, tee.seconds())


def _forget_old(root: Path, name: str) -> None:
    """Remove what older runs of a pipeline left; first from the cache, so that no later run asks for it."""
    stamped = f"{name}-[0-9]*"
    old = {p.name for p in sorted(p for p in root.glob(stamped) if p.is_dir())[: 1 - KEPT_RUNS]}
    for entry in (root / ".kfp_cache").glob("*.json") if old else ():
        if any(f"/{run}/" in entry.read_text() for run in old):
            entry.unlink()
    for run in old:
        shutil.rmtree(root / run, ignore_errors=True)
    for form in ("log", "yaml"):
        for path in sorted((root / "logs").glob(f"{stamped}.{form}"))[: 1 - KEPT_RUNS]:
            path.unlink()


def _without_retries(compiled: Path) -> None:
    """Retries are for lost pods; here they would only delay a failure by their backoff of minutes."""
    documents = list(yaml.safe_load_all(compiled.read_text()))
    components = documents[0]["components"].values()
    for dag in [documents[0]["root"]["dag"], *(c["dag"] for c in components if "dag" in c)]:
        for task in dag["tasks"].values():
            task.pop("retryPolicy", None)
    compiled.write_text(yaml.safe_dump_all(documents, sort_keys=True))


def _told(error: Exception, log_path: Path) -> EvergreenError:
    causes = _CAUSE.findall(_ANSI.sub("", log_path.read_text()))
    if causes:
        return EvergreenError(causes[-1].strip())
    return EvergreenError(_ANSI.sub("", str(error)).strip().rstrip("."), f"See {log_path}")
