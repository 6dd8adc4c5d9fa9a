"""Rollouts in processes of their own, forked from a server that has done the imports, and what they leave."""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evergreen.settings import Settings
from tests.fault.serving_light import light_plane, light_rollout
from tests.serving_lab import service_port

BEHAVIOURS = {
    "1": {},
    "2": {},
    "fails": {"fails": "model yields non-finite scores"},
    "lies": {"answers_as": "other"},
    "constant": {"constant": True},
    "forgets": {"drops_last": True},
    "dead": {"refuses_to_start": True},
    "hangs": {"hangs": 60},
}
VERSION = {name: str(i + 1) for i, name in enumerate(BEHAVIOURS)}
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "serving.rollout",
    "serving.promoter",
    "aiohttp.web",
]
CONTEXT.set_forkserver_preload([*IMPORTED, __name__])


def requests() -> list:
    from serving.protocol import RankRequest
    from serving.traffic import Asked

    at = datetime(2024, 1, 1, tzinfo=UTC)
    items = [tuple(f"i{(r * 7 + c) % 50}" for c in range(5)) for r in range(20)]
    return [Asked(RankRequest(f"r{i}", f"u{i % 12}", row, {}, at), frozenset(row[:1])) for i, row in enumerate(items)]


def in_child(work: Any, *arguments: Any) -> tuple[int, Any]:
    """Run a function in a fresh process: its exit code, and what it returned or how it failed."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(there, work, *arguments))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        result = None
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, result


def _work(pipe: Any, work: Any, *arguments: Any) -> None:
    try:
        pipe.send(work(*arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
        sys.exit(1)


def child(work: Any, *arguments: Any) -> Any:
    code, result = in_child(work, *arguments)
    assert code == 0, result
    return result


# --- what runs in children ---------------------------------------------------------------------------------------


def make_home(home: Path) -> None:
    """A registry with all versions, the first one champion."""
    from serving import mlflow_runs
    from serving.registry import Registry

    mlflow_runs._signature = lambda bundle: None  # it would read a bundle, which these are not
    registry = Registry(Settings(home=home))
    for name, behaviour in BEHAVIOURS.items():
        directory = home / "made" / name
        directory.mkdir(parents=True)
        (directory / "behaviour.json").write_text(json.dumps(behaviour))
        assert registry.register(directory, f"key-{name}") == VERSION[name]
    registry.promote("1")


def roll(home: Path, version: str, permanent: bool = False, die_at: int = 0, again: bool = False) -> dict:
    """One rollout, in a process that kills itself before its `die_at`-th transition (0: never)."""
    settings, registry = open_home(home, permanent)
    points = count_transitions(die_at)
    result = light_rollout(settings, registry).run(version, requests(), again=again)
    return {**json.loads(result.to_json()), "points": len(points), "names": points}


def open_home(home: Path, permanent: bool = False) -> tuple[Settings, Any]:
    """Settings and registry; `permanent`: under `evergreen up`."""
    from serving.registry import Registry
    from serving.stack import serve_champion

    settings = Settings(home=home)
    registry = Registry(settings)
    if permanent and not light_plane(settings, registry).permanent:
        settings = settings.model_copy(update={"gateway_port": service_port()})
        serve_champion(light_plane(settings, registry), registry)
    return settings, registry


def count_transitions(die_at: int) -> list[str]:
    """Make everything that leaves a trace count itself, and die before the given one."""
    from serving.gateway import Gateway
    from serving.processes import Processes
    from serving.registry import Registry
    from serving.replay import ReplayTraffic
    from serving.rollout_state import Journal

    seen: list[str] = []
    traces = [
        (Journal, "move"),
        (Journal, "save"),
        (Journal, "take_up"),
        (Journal, "record"),
        (Registry, "promote"),
        (Registry, "reject"),
        (Registry, "tag"),
        (Gateway, "_publish_routes"),
        (Processes, "start"),
        (Processes, "keep"),
        (Processes, "stop"),
        (ReplayTraffic, "look"),
    ]
    for owner, name in traces:
        real = getattr(owner, name)

        def counted(*args, real=real, label=f"{owner.__name__}.{name}", **kwargs):
            seen.append(label)
            if len(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counted)
    return seen


def look(home: Path) -> dict:
    """What registry and ledger say."""
    from serving.registry import Registry
    from serving.rollout_state import Journal

    registry = Registry(Settings(home=home))
    ledger = Journal(Settings(home=home).serving).transitions()
    return {
        "aliases": registry.aliases(),
        "tags": {v.version: v.tags.get("rollout", "") for v in registry.versions()},
        "ends": [line["to"] for line in ledger if line["to"] in ("champion", "rolled_back")],
    }


def finish(home: Path, version: str, permanent: bool) -> dict:
    """Run the rollout again, tell all there is to tell afterwards, and stop everything."""
    from serving.stack import serving_state

    result = roll(home, version, permanent)
    state = serving_state(Settings(home=home))
    runs = sorted(state["processes"])
    stop(home)
    ended = {k: result[k] for k in ("outcome", "serving_version")}
    return look(home) | ended | {"serves": (state["champion"], state["challenger"]), "runs": runs}


def stop(home: Path) -> list[str]:
    from serving.processes import Processes

    return Processes(Settings(home=home)).stop_all()
