"""Step 6: the challenger in MLflow, with its evidence and its lineage."""

import json
from pathlib import Path
from typing import Any

from kfp import dsl

from components.base import step
from components.plan import TRAINED, Plan
from components.train import origin
from evergreen.settings import Settings
from monitoring.verdict import DriftVerdict


def numbers_of(gate: dict[str, Any], drift: DriftVerdict, train: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows as metrics of the run."""
    rival = {"rival": gate["rival"]["metrics"]["challenger"]} if gate["rival"] else {}
    hit3 = {
        f"{who}_hit3_{action}": value
        for who, measured in (gate["metrics"] | rival).items()
        if measured
        for action, value in measured["hit3"].items()
        if value is not None
    }
    trained = {f"train_{k}": float(train[k]) for k in ("rows", "requests", "loss", "train_seconds")}
    return {**hit3, **trained, "evidence_requests": float(gate["requests"]), "drift_share": drift.share}


def register(settings: Settings, plan: Plan, bundle: Path, files: list[Path]) -> str:
    """Register the chosen contender once, whatever the verdict; returns its version.

    Args:
        settings: The home.
        plan: The run.
        bundle: Directory of the chosen contender.
        files: The gate's evidence and report, the drift verdict and page; kept with the MLflow run.
    """
    from components.train import champion_bundle
    from model.bundle import Bundle
    from model.gate import tags_of
    from serving.mlflow_runs import DatasetRef
    from serving.registry import GATE, UPDATES, Registry

    run = plan.directory(settings)
    gate, train = (json.loads((run / f).read_text()) for f in ("gate.json", TRAINED))
    drift = DriftVerdict.load(run / "drift" / "drift.json")
    card, champion = Bundle.load(bundle), champion_bundle(settings, plan)
    known = {f.name for f in (champion or card).spec.features}
    lineage = {
        "as_of": plan.as_of.isoformat(),
        "train_start": (plan.update_start if card.parent else plan.train_start).isoformat(),
        "train_end": plan.train_end.isoformat(),
        "snapshot": plan.snapshot,
        "data_digest": card.data,
        "code_version": plan.code,
        "parent_version": plan.champion,
        "strategy": card.strategy,
        "chosen": origin(card),
        "also_scratch": plan.also_scratch,
        UPDATES: str(card.updates),
        "added_features": ", ".join(f.name for f in card.spec.features if f.name not in known),
        "recipe": plan.recipe,
        "seed": str(plan.seed),
        "asked_by": plan.reason,
        GATE: gate["verdict"],
        "gate_reason": gate["reason"],
        "drifted": str(drift.drifted).lower(),
    }
    return Registry(settings).register(
        bundle,
        plan.run_key,
        params={**json.loads(plan.to_json()), **card.recipe.to_json()},
        metrics=numbers_of(gate, drift, train[origin(card)]),
        tags=lineage | tags_of(gate),
        datasets=[DatasetRef("engagement", plan.snapshot[:36], str(settings.data))],
        artifacts=files,
    )


@step
def register_model(
    plan: str,
    bundle: dsl.Input[dsl.Model],
    evidence: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.Markdown],
    drift: dsl.Input[dsl.Artifact],
) -> str:
    """Register the challenger; returns its version."""
    from pathlib import Path

    from components.base import begin
    from components.plan import Plan
    from components.register import register

    settings, p = begin(), Plan.from_json(plan)
    run = p.directory(settings)
    return register(settings, p, Path(bundle.path), [run / "gate.json", run / "gate.md", run / "drift" / "drift.html"])
