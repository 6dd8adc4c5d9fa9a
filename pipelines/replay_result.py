"""The numbers of a finished replay, as plain JSON data.

Shapes: Q comparable requests of a window, E those that are its exam, C counted actions, B data and resamples of users;
I models and J windows of a lineage.
"""

import json
from datetime import timedelta
from typing import Any

import numpy as np

from engagement.store import EngagementStore
from model import continual_metrics as cm
from pipelines.replay_plan import AGES, FROZEN, SCRATCH, Replay, Task
from pipelines.replay_window import Window

FINETUNE = "finetune"
WEEK = timedelta(days=7)


class Hits:
    """All hits of a replay, by strategy, averaged over seeds, as sums in resamples of users."""

    def __init__(self, replay: Replay, windows: list[Window]) -> None:
        self.replay, self.windows = replay, windows
        self.users = cm.Users([w.user_Q for w in windows], seed=replay.seeds[0])

    def tested(self, label: str, action: int = 0) -> dict[tuple[int, int], cm.Sums]:
        """By (window, age of the model in slots): hits on all comparable requests of the window."""
        found: dict[tuple[int, int], cm.Sums] = {}
        for k in range(1, len(self.windows)):
            ages = self.replay.ages(Task(k, "test", label, self.replay.seeds[0]))
            names = [f"age_{age}" for age in ages]
            tests = [Task(k, "test", label, seed) for seed in self.replay.seeds]
            hits_QM = np.stack(self._columns(tests, names, action), 1)
            found |= {(k, age): s for age, s in zip(ages, self.users.sums(k, hits_QM), strict=True)}
        return found

    def examined(self, label: str) -> dict[tuple[int, int], cm.Sums]:
        """By (model, window): hits on the window's exam."""
        found: dict[tuple[int, int], cm.Sums] = {}
        hits: list[list[np.ndarray]] = [[] for _ in self.windows]
        for i in range(len(self.windows)):
            names = [f"window_{j}" for j in range(i + 1)]
            models = [self.replay.model(label, seed, i) for seed in self.replay.seeds]
            for j, hits_E in enumerate(self._columns(models, names, 0)):
                hits[j].append(hits_E)
        for j, window in enumerate(self.windows):
            sums = self.users.sums(j, np.stack(hits[j], 1), window.exam_Q)
            found |= {(j + n, j): s for n, s in enumerate(sums)}
        return found

    def by_seed(self, label: str) -> list[float | None]:
        """HIT@3 of each seed's newest models over all windows."""
        requests = sum(len(w.user_Q) for w in self.windows[1:])
        totals = []
        for seed in self.replay.seeds:
            tasks = [Task(k, "test", label, seed) for k in range(1, len(self.windows))]
            totals.append(sum(int(self._load(t, ["age_0"])[0][:, 0].sum()) for t in tasks))
        return [round(t / requests, 6) if requests else None for t in totals]

    def random(self, action: int = 0) -> float | None:
        """HIT@3 of a random order over all windows but the first."""
        values = np.concatenate([w.random_QC[:, action] for w in self.windows[1:]])
        return round(float(values.mean()), 6) if len(values) else None

    def _columns(self, by_seed: list[Task], names: list[str], action: int) -> list[np.ndarray]:
        """Hits by name, averaged over the seeds' tasks."""
        seeds = [self._load(task, names) for task in by_seed]
        return [np.mean([one[n][:, action] for one in seeds], axis=0) for n in range(len(names))]

    def _load(self, task: Task, names: list[str]) -> list[np.ndarray]:
        path = self.replay.directory(task) / "hits.npz" if task.kind == "test" else self.replay.exam_file(task)
        with np.load(path) as file:
            return [file[name] for name in names]


def collect(replay: Replay) -> dict[str, Any]:
    """Everything that a replay found."""
    manifest = EngagementStore(replay.settings.data).manifest
    windows = [Window.load(replay.window_file(k)) for k in range(len(replay.slots))]
    hits = Hits(replay, windows)
    actions = windows[0].actions
    tested = {label: hits.tested(label) for label in replay.strategies}
    overall = {label: _newest(sums) for label, sums in tested.items()}
    result: dict[str, Any] = {
        "dataset": manifest.name,
        "exposure": manifest.exposure,
        "primary_action": manifest.primary_action,
        "actions": actions,
        "data": replay.snapshots[-1],
        "code": replay.code,
        "recipe": replay.settings.recipe,
        "recipe_digest": replay.base.digest(),
        "seeds": list(replay.seeds),
        "slots": [t.isoformat() for t in replay.slots],
        "windows": [_window(replay, k, w) for k, w in enumerate(windows)],
        "random_hit3": {a: hits.random(n) for n, a in enumerate(actions)},
    }
    costs = {label: _cost(replay, label) for label in replay.strategies}
    result["strategies"] = {
        label: _strategy(replay, hits, label, actions, tested[label], overall, costs) for label in replay.strategies
    }
    if FROZEN in tested:
        result["frozen"] = _stale(replay, tested)
    return result


def _strategy(
    replay: Replay,
    hits: Hits,
    label: str,
    actions: list[str],
    tested: dict[tuple[int, int], cm.Sums],
    overall: dict[str, cm.Sums],
    costs: dict[str, dict[str, float]],
) -> dict[str, Any]:
    mean_B = overall[label].mean_B
    hit3 = {actions[0]: cm.estimate(mean_B)}
    for n, action in enumerate(actions[1:], 1):
        hit3[action] = cm.estimate(_newest(hits.tested(label, n)).mean_B)
    others = {name: overall[name].mean_B for name in (FINETUNE, SCRATCH) if name in overall}
    ages = cm.comparable_ages(AGES, len(replay.slots) - 1)
    fresh = {} if label == FROZEN else cm.freshness(tested, ages)
    hits_BIJ, requests_BJ = cm.matrix(hits.examined(label), len(replay.slots))
    R_BIJ = cm.ratings(hits_BIJ, requests_BJ)
    both = len(others) == 2
    return {
        "hit3": hit3,
        "hit3_by_seed": hits.by_seed(label),
        "by_window": [_round(tested[k, 0].mean_B[0]) for k in range(1, len(replay.slots))],
        "against": {name: cm.estimate(cm.relative(mean_B, other_B)) for name, other_B in others.items()},
        "gap_closed": cm.gap_closed(mean_B, others[FINETUNE], others[SCRATCH]) if both else None,
        "freshness": [{"age": a, **(cm.estimate(v_B) or {})} for a, v_B in fresh.items()],
        "aged": [{"age": a, **(cm.estimate(cm.relative(v_B, fresh[0])) or {})} for a, v_B in fresh.items()],
        "matrix": [[_round(v) for v in row[: i + 1]] for i, row in enumerate(R_BIJ[0])],
        "backward_transfer": cm.estimate(cm.backward_transfer(R_BIJ)),
        "forgetting": cm.estimate(cm.forgetting(R_BIJ)),
        "history_lost": cm.estimate(-cm.relative(hits_BIJ[:, -1, 0], hits_BIJ[:, 0, 0])),
        "memory": [{"lag": lag, **(cm.estimate(v_B) or {})} for lag, v_B in cm.memory(hits_BIJ).items()],
        "stability": cm.estimate(cm.stability(R_BIJ)),
        "cost": costs[label] | _ratios(costs[label], costs.get(SCRATCH)),
        "gate": _gates(replay, label),
    }


def _newest(tested: dict[tuple[int, int], cm.Sums]) -> cm.Sums:
    return cm.pooled([sums for (_, age), sums in tested.items() if age == 0])


def _window(replay: Replay, k: int, window: Window) -> dict[str, Any]:
    start, end = replay.window(k)
    return {
        "start": start.isoformat(),
        "end": end.isoformat(),
        "requests": window.requests,
        "comparable_requests": len(window.user_Q),
        "exam_requests": int(window.exam_Q.sum()),
    }


def _records(replay: Replay, label: str) -> list[dict[str, Any]]:
    """What each update of a strategy cost, over all seeds; the first model is shared and no update."""
    tasks = [replay.model(label, seed, i) for seed in replay.seeds for i in range(1, len(replay.slots))]
    return [json.loads((replay.directory(t) / "record.json").read_text()) for t in tasks]


def _cost(replay: Replay, label: str) -> dict[str, float]:
    """Means of one update. Those that a kill interrupted know only their last part, and are left out."""
    records = _records(replay, label)
    whole = [r for r in records if not r["resumed"]] or records
    names = ("seconds", "importance_seconds", "cpu_seconds", "rows")
    return {name: round(float(np.mean([r[name] for r in whole])), 3) for name in names} | {"updates": len(whole)}


def _ratios(cost: dict[str, float], scratch: dict[str, float] | None) -> dict[str, float | None]:
    """Cost as a share of training from scratch."""
    names = ("cpu_seconds", "rows")
    return {f"{n}_to_scratch": _round(cost[n] / scratch[n]) if scratch and scratch[n] else None for n in names}


def _gates(replay: Replay, label: str) -> dict[str, Any]:
    """What the gate would have said, of the first seed's models."""
    tasks = [Task(k, "test", label, seed) for seed in replay.seeds for k in range(1, len(replay.slots))]
    records = [json.loads((replay.directory(t) / "record.json").read_text()) for t in tasks]
    said = [{"as_of": r["as_of"], "seed": r["seed"], **r["gate"]} for r in records if r["gate"]]
    count = {verdict: sum(s["verdict"] == verdict for s in said) for verdict in ("promote", "hold")}
    return count | {"verdicts": said}


def _stale(replay: Replay, tested: dict[str, dict[tuple[int, int], cm.Sums]]) -> list[dict[str, Any]]:
    """What a model loses that is never updated, by whole weeks since its training, against the strategies that are."""
    found = []
    weeks = [(replay.window(k)[0] - replay.slots[0]) // WEEK for k in range(1, len(replay.slots))]
    for week in sorted(set(weeks)):
        windows = [k for k, w in enumerate(weeks, 1) if w == week]
        mean_B = {label: cm.pooled([sums[k, 0] for k in windows]).mean_B for label, sums in tested.items()}
        lost = {s: cm.estimate(cm.relative(mean_B[FROZEN], v_B)) for s, v_B in mean_B.items() if s != FROZEN}
        found.append({"days": 7 * week, "hit3": cm.estimate(mean_B[FROZEN]), "against": lost})
    return found


def _round(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
