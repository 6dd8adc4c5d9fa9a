"""Last step: the run's result in one file, from what the steps left."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from components.base import step
from components.plan import TRAINED, Plan
from evergreen.settings import Settings


def result_of(settings: Settings, plan: Plan, version: str, went_live: str) -> dict[str, Any]:
    """What one retrain did: what `status`, the table at the end and a script read."""
    run = plan.directory(settings)
    gate, train = (json.loads((run / name).read_text()) for name in ("gate.json", TRAINED))
    rollout = settings.serving / "rollouts" / f"{version}.json"
    return {
        **json.loads(plan.to_json()),
        "version": version,
        "outcome": went_live,
        "gate": gate,
        "drift": json.loads((run / "drift" / "drift.json").read_text()),
        "rollout": json.loads(rollout.read_text()) if went_live != "held" else None,
        "train": train.pop(gate["chosen"]),
        "not_chosen": train,
        "finished_at": settings.clock().isoformat(),
    }


def results(runs: Path) -> list[dict[str, Any]]:
    """Results of all finished runs, in the order of their instants."""
    found = [json.loads(p.read_text()) for p in runs.glob("*/result.json")]
    return sorted(found, key=lambda r: (datetime.fromisoformat(r["as_of"]), r["finished_at"]))


@step
def conclude(plan: str, version: str, went_live: str) -> None:
    """Write the run's result; from then on the run is done and is not repeated."""
    import json

    from components.base import begin
    from components.conclude import result_of
    from components.plan import Plan
    from engagement.files import write_text
    from monitoring.trigger import take

    settings, p = begin(), Plan.from_json(plan)
    write_text(
        p.directory(settings) / "result.json",
        json.dumps(result_of(settings, p, version, went_live), indent=1),
    )
    if p.reason == "drift":
        take(settings.monitoring)  # after the result: killed in between, the request is served again, not lost
