"""Replay: retrain slot after slot over history, without registry or rollout, to see what a strategy would have done.

Each slot is the same code as a live retrain with an older instant: the challenger learns what is new since its
champion's training window, both are judged on the later requests up to the slot, and the gate decides who goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from components.features import write_table
from components.judge import judge_bundles
from components.plan import Plan, code_version, draw_plan, name_run
from components.train import split, train_challenger
from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.slots import slots
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from engagement.table import RankingTable
from evergreen.settings import Settings
from model.bundle import Bundle

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Lineage:
    """One strategy's champion so far."""

    strategy: str
    bundle: Path | None = None
    trained_to: datetime | None = None
    digest: str = ""


def replay(settings: Settings, start: datetime, end: datetime, strategies: list[str], tell: Told) -> dict[str, Any]:
    """Retrain at every slot in [start, end] with each strategy.

    Finished slots are kept under the home, so a killed replay goes on where it was.

    Returns:
        `slots`: one record a slot and strategy; `summary`: totals by strategy.

    Raises:
        EvergreenError: No slot lies in the range, or there is no data.
    """
    store = EngagementStore(settings.data)
    instants = slots(start, end)
    if not instants:
        raise EvergreenError(
            f"no slot lies between {start} and {end}",
            "Slots are Monday and Thursday 03:00 UTC; widen the range",
        )
    lineages = [Lineage(s) for s in strategies]
    records: list[dict[str, Any]] = []
    for i, as_of in enumerate(instants):
        snapshot = store.snapshot(as_of)
        for j, lineage in enumerate(lineages):
            tell(
                f"{as_of:%a %Y-%m-%d} {lineage.strategy}",
                i * len(lineages) + j,
                len(instants) * len(lineages),
            )
            record, lineages[j] = replay_slot(settings, snapshot, lineage)
            records.append(record)
    manifest = store.manifest
    return {
        "dataset": manifest.name,
        "exposure": manifest.exposure,
        "primary_action": manifest.primary_action,
        "code": code_version(),
        "recipe": settings.recipe,
        "seed": settings.seed,
        "slots": records,
        "summary": {
            s: summarise([r for r in records if r["strategy"] == s], manifest.primary_action) for s in strategies
        },
    }


def replay_slot(settings: Settings, snapshot: Snapshot, lineage: Lineage) -> tuple[dict[str, Any], Lineage]:
    """One slot of one strategy; returns its record and the lineage that the next slot starts from."""
    try:
        plan = _plan(settings, snapshot, lineage)
        home = settings.root / "replay" / plan.run_key
        if not (home / "record.json").exists():
            _run_slot(settings, snapshot, plan, lineage, home)
    except EvergreenError as error:
        return _empty_record(snapshot.as_of, lineage.strategy, str(error)), lineage
    record = json.loads((home / "record.json").read_text())
    if record["gate"]["verdict"] == "promote":
        bundle = home / "bundle"
        lineage = Lineage(lineage.strategy, bundle, plan.train_end, Bundle.load(bundle).digest)
    return record, lineage


def _plan(settings: Settings, snapshot: Snapshot, lineage: Lineage) -> Plan:
    name = name_run(settings, snapshot, lineage.strategy)
    return draw_plan(
        settings,
        snapshot,
        run_key=f"{name}-{hashlib.sha256(lineage.digest.encode()).hexdigest()[:8]}",
        strategy=lineage.strategy,
        reason="replay",
        champion=(lineage.digest, lineage.digest),
        trained_to=lineage.trained_to,
    )


def _run_slot(settings: Settings, snapshot: Snapshot, plan: Plan, lineage: Lineage, home: Path) -> None:
    table = home / "table"
    write_table(settings, snapshot, plan.train_start, plan.as_of, table)
    train_table, evidence = split(plan, RankingTable.load(table))
    champion = Bundle.load(lineage.bundle) if lineage.bundle else None
    challenger = train_challenger(plan, train_table, evidence, champion, home / "checkpoints")
    verdict = judge_bundles(plan, evidence, challenger, champion)
    challenger.save(home / "bundle")
    record = {
        "as_of": plan.as_of.isoformat(),
        "strategy": plan.strategy,
        "train_start": plan.train_start.isoformat(),
        "train_end": plan.train_end.isoformat(),
        "train_rows": train_table.rows,
        "train_seconds": round(challenger.metrics["train_seconds"] + challenger.metrics["importance_seconds"], 3),
        "requests": verdict.requests,
        "skipped_requests": verdict.skipped_requests,
        "metrics": verdict.metrics,
        "gate": {"verdict": verdict.verdict, "reason": verdict.reason},
    }
    write_text(home / "record.json", json.dumps(record, indent=1))
    shutil.rmtree(table)


def _empty_record(as_of: datetime, strategy: str, reason: str) -> dict[str, Any]:
    """A slot that could not be trained or judged: told, not left out."""
    return {
        "as_of": as_of.isoformat(),
        "strategy": strategy,
        "train_rows": 0,
        "train_seconds": 0.0,
        "requests": 0,
        "skipped_requests": 0,
        "metrics": {"champion": None, "challenger": None},
        "gate": {"verdict": "hold", "reason": reason},
    }


def summarise(records: list[dict[str, Any]], primary: str) -> dict[str, Any]:
    """Totals of one strategy; HIT@3 is weighted by requests over the slots that could be judged."""
    judged = [r for r in records if r["requests"]]
    both = [r for r in judged if r["metrics"]["champion"]]

    def mean(rows: list[dict[str, Any]], who: str) -> float | None:
        total = sum(r["requests"] for r in rows)
        hits = sum(r["metrics"][who]["hit3"][primary] * r["requests"] for r in rows)
        return round(hits / total, 6) if total else None

    return {
        "slots": len(records),
        "judged": len(judged),
        "promoted": sum(r["gate"]["verdict"] == "promote" for r in records),
        "held": sum(r["gate"]["verdict"] == "hold" for r in records),
        "requests": sum(r["requests"] for r in judged),
        f"hit3_{primary}_challenger": mean(judged, "challenger"),
        f"hit3_{primary}_champion": mean(both, "champion"),
        f"hit3_{primary}_challenger_where_champion": mean(both, "challenger"),
        "train_rows": sum(r["train_rows"] for r in records),
        "train_seconds": round(sum(r["train_seconds"] for r in records), 3),
    }
