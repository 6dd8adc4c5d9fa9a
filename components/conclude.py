"""Last step: the run's result in one file, from what the steps left."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from components.base import step
from components.plan import TRAINED, Plan
from components.quality import REPORT, TESTS
from evergreen.settings import Settings


def result_of(settings: Settings, plan: Plan, version: str, went_live: str) -> dict[str, Any]:
    """What one retrain did: what `status`, the table at the end and a script read.

    Args:
        settings: The home.
        plan: The run.
        version: What was registered; empty where the data was bad, so that nothing was trained.
        went_live: `champion`, `rolled_back` or `held`.
    """
    run = plan.directory(settings)
    data = json.loads((run / TESTS).read_text())
    found = _trained(settings, run, version, went_live) if version else _held(data)
    return {
        **json.loads(plan.to_json()),
        "version": version,
        "outcome": went_live,
        "data": {**data, "report": str(run / REPORT)},
        **found,
        "finished_at": settings.clock().isoformat(),
    }


def _trained(settings: Settings, run: Path, version: str, went_live: str) -> dict[str, Any]:
    gate, train = (json.loads((run / name).read_text()) for name in ("gate.json", TRAINED))
    rollout = settings.serving / "rollouts" / f"{version}.json"
    return {
        "gate": gate,
        "drift": json.loads((run / "drift" / "drift.json").read_text()),
        "rollout": json.loads(rollout.read_text()) if went_live != "held" else None,
        "train": train.pop(gate["chosen"]),
        "not_chosen": train,
    }


def _held(data: dict[str, Any]) -> dict[str, Any]:
    """Of a run that was held for its data: a gate at which nobody stood, in the form of every other one."""
    gate = {
        "verdict": "hold",
        "reason": data["reason"],
        "requests": 0,
        "skipped_requests": 0,
        "primary_action": data["primary_action"],
        "metrics": dict.fromkeys(("champion", "challenger", "random")),
        "difference": None,
        "rules": [],
        "slices": [],
        "chosen": "",
        "rival": None,
    }
    return {"gate": gate, "drift": None, "rollout": None, "train": None, "not_chosen": {}}


def held_for_data(result: dict[str, Any]) -> bool:
    """Whether a run ended because its data was bad: asked for again, it looks at the data again."""
    return result["outcome"] == "held" and not result["version"]


def results(runs: Path) -> list[dict[str, Any]]:
    """Results of all finished runs, in the order of their instants."""
    found = [json.loads(p.read_text()) for p in runs.glob("*/result.json")]
    return sorted(found, key=lambda r: (datetime.fromisoformat(r["as_of"]), r["finished_at"]))


@step
def conclude(plan: str, version: str, went_live: str) -> None:
    """Write the run's result; from then on the run is done and is not repeated, unless its data was bad."""
    import json

    from components.base import begin
    from components.conclude import result_of
    from components.plan import EARLY, Plan
    from engagement.files import write_text
    from monitoring.trigger import take

    settings, p = begin(), Plan.from_json(plan)
    write_text(
        p.directory(settings) / "result.json",
        json.dumps(result_of(settings, p, version, went_live), indent=1),
    )
    if p.reason in EARLY:
        take(settings.monitoring)  # after the result: killed in between, the request is served again, not lost
