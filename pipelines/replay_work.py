"""The work of a replay's tasks; each writes its files whole or not at all, so that a killed replay goes on.

Shapes: Q comparable requests of a window (more than three candidates), E those of them that are its exam, C actions
that are counted: the primary one, then the negative ones.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from components.features import write_table
from components.judge import judge_bundles
from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.store import EngagementStore
from engagement.table import RankingTable, TableSpec, hash_ids, micros
from model.bundle import Bundle
from model.calibration import calibrated
from model.exam import held_out
from model.metrics import K, hits
from model.predict import score
from model.train import train
from pipelines.replay_plan import FROZEN, SCRATCH, Replay, Task
from pipelines.replay_window import Window, write_arrays

EXAM_REQUESTS = 500  # of a window, at most; the window before the first slot is a whole history


def counted_actions(spec: TableSpec) -> list[str]:
    """The actions whose hits are recorded."""
    return [spec.primary_action, *(a for a in spec.negative_actions if a != spec.primary_action)]


def work(replay: Replay, task: Task) -> None:
    """Do one task.

    Raises:
        EvergreenError: It failed; the error names strategy, seed and slot.
    """
    try:
        {"table": make_table, "model": make_model, "test": make_test}[task.kind](replay, task)
    except EvergreenError as error:
        raise EvergreenError(f"{replay.told(task)}: {error.problem}", error.remedy) from error
    except Exception as error:
        raise EvergreenError(
            f"{replay.told(task)} failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "Run the same command again, finished slots are kept; if it fails again, report it",
        ) from error


def make_table(replay: Replay, task: Task) -> None:
    """The features of every request known at the slot, and who asked in its window."""
    settings, as_of, out = replay.settings, replay.slots[task.slot], replay.directory(task)
    snapshot = EngagementStore(settings.data).snapshot(as_of)
    if snapshot.digest != replay.snapshots[task.slot]:
        raise EvergreenError("the log was changed while the replay ran", "Run it again")
    if not (out / "table.json").exists():
        write_table(settings, snapshot, replay.start, as_of, out)
    window = _cut(replay, task.slot, RankingTable.load(out))
    comparable = _comparable(window)
    counted = hits(comparable, np.zeros(comparable.rows))
    columns = [counted.actions.index(a) for a in counted_actions(window.spec)]
    found = Window(
        actions=counted_actions(window.spec),
        user_Q=hash_ids(comparable.user_id),
        exam_Q=_exam(comparable),
        random_QC=counted.expected_QA[:, columns],
        requests=window.requests,
    )
    found.save(replay.window_file(task.slot))


def make_model(replay: Replay, task: Task) -> None:
    """Train the model of a slot where there is none yet, then examine it on the held-out requests of all windows."""
    home, bundle_path = replay.directory(task), replay.artefact(task)
    if not (bundle_path.is_dir() and (home / "record.json").exists()):
        bundle, record = _trained(replay, task, home / "checkpoints")
        bundle.save(bundle_path)
        write_text(home / "record.json", json.dumps(record, indent=1))
        shutil.rmtree(home / "checkpoints", ignore_errors=True)
    exam_file = replay.exam_file(task)
    if not exam_file.exists():
        bundle = Bundle.load(bundle_path)
        write_arrays(exam_file, **{f"window_{j}": _examined(replay, bundle, j) for j in range(task.slot + 1)})


def _trained(replay: Replay, task: Task, checkpoints: Path) -> tuple[Bundle, dict[str, Any]]:
    """The model of a slot, and what it cost; where there is nothing to learn, the model before it."""
    strategy, before = replay.named(task.strategy).strategy, replay.parent(task)
    parent = Bundle.load(replay.artefact(before)) if before else None
    table = _table(replay, task.slot)
    if parent:
        table = _cut(replay, task.slot, table)
    trained_on = int((~held_out(table)).sum())
    record = {
        "strategy": task.strategy,
        "seed": task.seed,
        "as_of": replay.slots[task.slot].isoformat(),
        "requests": trained_on,
    }
    if parent and (strategy == FROZEN or not trained_on):
        cost = {"rows": 0, "seconds": 0.0, "importance_seconds": 0.0, "cpu_seconds": 0.0, "resumed": False}
        return parent, record | cost | {"digest": parent.digest}
    if parent:
        parent = calibrated(parent, table)  # as the pipeline's champion is, on the requests that it was judged on
    resumed, started = checkpoints.is_dir(), time.process_time()
    bundle = train(
        table,
        replay.recipe(task.strategy),
        strategy=strategy if parent else SCRATCH,
        parent=parent,
        seed=task.seed,
        checkpoints=checkpoints,
    )
    cost = {
        "rows": int(bundle.metrics["rows_read"]),
        "seconds": round(bundle.metrics["train_seconds"], 3),
        "importance_seconds": round(bundle.metrics["importance_seconds"], 3),
        "cpu_seconds": round(time.process_time() - started, 3),
        "resumed": resumed,  # then the seconds are those since
    }
    return bundle, record | cost | {"digest": bundle.digest}


def make_test(replay: Replay, task: Task) -> None:
    """Test the models that there were when the window began; tell what the gate would have said of the newest."""
    home = replay.directory(task)
    bundles = {age: Bundle.load(replay.artefact(model)) for age, model in replay.ages(task).items()}
    table = _table(replay, task.slot)
    window = _cut(replay, task.slot, table)
    comparable = _comparable(window)
    counts = {f"age_{age}": _hits(bundle, comparable) for age, bundle in bundles.items()}
    gate = None
    # Of one seed: a verdict costs as much as an update.
    first = task.seed == replay.seeds[0]
    if first and task.slot > 1 and task.strategy != FROZEN and window.requests:
        gate = _gate(bundles[0], bundles[1], window, _cut(replay, task.slot - 1, table), task.seed)
    record = {
        "strategy": task.strategy,
        "seed": task.seed,
        "as_of": replay.slots[task.slot].isoformat(),
        "gate": gate,
    }
    write_arrays(home / "hits.npz", **counts)
    write_text(home / "record.json", json.dumps(record, indent=1))


def _gate(
    challenger: Bundle, champion: Bundle, window: RankingTable, before: RankingTable, seed: int
) -> dict[str, Any]:
    """The gate's verdict on the newest model against the one before it, both calibrated as the pipeline does.

    Each is calibrated on the window after its training: the challenger on the one that it is judged on, the champion
    on the one before. (A model that learned nothing new was trained before both.)
    """
    if before.requests:
        champion = calibrated(champion, before)
    verdict = judge_bundles(window, calibrated(challenger, window), champion, seed)
    return {"verdict": verdict.verdict, "reason": verdict.reason}


# -- reading tables ---------------------------------------------------------------------------------------------


def _table(replay: Replay, slot: int) -> RankingTable:
    return RankingTable.load(replay.directory(Task(slot, "table")))


def _cut(replay: Replay, slot: int, table: RankingTable) -> RankingTable:
    """The requests of one window."""
    start, end = replay.window(slot)
    return table.between(micros(start), micros(end))


def _comparable(window: RankingTable) -> RankingTable:
    """The requests that a model can order in more than one way, as far as HIT@3 sees."""
    return window.select(np.flatnonzero(np.diff(window.offsets) > K))


def _exam(comparable: RankingTable) -> np.ndarray:
    """(Q,) bool: held-out requests, at most EXAM_REQUESTS, by the hash of their ids."""
    found = np.flatnonzero(held_out(comparable))
    order = hash_ids(comparable.request_id[found], seed=1)
    chosen = np.zeros(comparable.requests, bool)
    chosen[found[np.argsort(order)[:EXAM_REQUESTS]]] = True
    return chosen


def _examined(replay: Replay, bundle: Bundle, slot: int) -> np.ndarray:
    """(E, C) hits on one window's exam, read as the window's own slot knew it."""
    comparable = _comparable(_cut(replay, slot, _table(replay, slot)))
    return _hits(bundle, comparable.select(np.flatnonzero(_exam(comparable))))


def _hits(bundle: Bundle, table: RankingTable) -> np.ndarray:
    """(Q, C) hits of comparable requests, uint8."""
    counted = hits(table, score(bundle, table))
    columns = [counted.actions.index(a) for a in counted_actions(table.spec)]
    return counted.hits_QA[:, columns].astype(np.uint8)
