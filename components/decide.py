"""Monitor steps: check the serving model against the world, and decide whether to retrain early."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from kfp import dsl

from components.base import step
from engagement.errors import EvergreenError
from engagement.slots import next_slot
from engagement.store import EngagementStore
from evergreen.settings import Settings
from monitoring.trigger import Decision, decide, pending
from monitoring.verdict import DriftVerdict


def check_directory(settings: Settings, as_of: datetime) -> Path:
    """Where the check at an instant keeps its page, its verdict and its decision."""
    return settings.monitoring / "checks" / f"{as_of:%Y%m%dT%H%M%S}"


def check_champion(settings: Settings, as_of: datetime, table_dir: Path) -> DriftVerdict:
    """Compare what was shown between the champion's training and `as_of` with its training window.

    Raises:
        EvergreenError: There is no champion, or `as_of` is not later than its training.
    """
    from components.drift import check_window
    from components.features import write_table
    from components.parity import served_parity, skew_of
    from serving.registry import Registry

    registry = Registry(settings)
    champion = registry.champion()
    if champion is None:
        raise EvergreenError("there is no champion to check", "Run `evergreen retrain` first")
    start = datetime.fromisoformat(champion.tags["train_end"])
    if start >= as_of:
        raise EvergreenError(f"the champion was trained on data up to {start:%Y-%m-%d %H:%M}", "Choose a later --as-of")
    snapshot = EngagementStore(settings.data).snapshot(as_of)
    write_table(settings, snapshot, start, as_of, table_dir)
    parity = served_parity(settings, snapshot, as_of)
    served_by = (champion.version, registry.fetch(champion.version))
    skew = skew_of(parity) if parity else None
    return check_window(settings, served_by, table_dir, (start, as_of), check_directory(settings, as_of), skew)


def decide_at(settings: Settings, verdict: DriftVerdict) -> Decision:
    """The decision for a check; the same check again gives the same one."""
    as_of = datetime.fromisoformat(verdict.as_of)
    return decide(verdict, settings.monitoring, next_slot(as_of))


def still_wanted(settings: Settings, decision: Decision) -> bool:
    """Whether the early retrain that a decision asked for has not been done yet."""
    waiting = pending(settings.monitoring)
    return decision.action == "retrain" and waiting is not None and waiting.key == decision.key


def decision_at(settings: Settings, as_of: datetime) -> dict[str, Any]:
    """What the check at an instant found and started."""
    directory = check_directory(settings, as_of)
    return {name: json.loads((directory / f"{name}.json").read_text()) for name in ("drift", "decision")}


@step
def check_serving(as_of: str, verdict: dsl.Output[dsl.Artifact], page: dsl.Output[dsl.HTML]) -> None:
    """Drift of the engagement since the champion's training."""
    import shutil
    import tempfile
    from datetime import datetime
    from pathlib import Path

    from components.base import begin
    from components.decide import check_champion, check_directory

    settings, at = begin(), datetime.fromisoformat(as_of)
    with tempfile.TemporaryDirectory() as room:
        check_champion(settings, at, Path(room) / "table")
    shutil.copyfile(check_directory(settings, at) / "drift.json", verdict.path)
    shutil.copyfile(check_directory(settings, at) / "drift.html", page.path)


@step
def decide_retrain(as_of: str, verdict: dsl.Input[dsl.Artifact]) -> str:
    """Decide and log; returns `retrain` while an early retrain is wanted and not done, else `none`."""
    import json
    from dataclasses import asdict
    from datetime import datetime
    from pathlib import Path

    from components.base import begin
    from components.decide import check_directory, decide_at, still_wanted
    from engagement.files import write_text
    from monitoring.verdict import DriftVerdict

    settings = begin()
    decision = decide_at(settings, DriftVerdict.load(Path(verdict.path)))
    directory = check_directory(settings, datetime.fromisoformat(as_of))
    write_text(directory / "decision.json", json.dumps(asdict(decision), indent=1))
    return "retrain" if still_wanted(settings, decision) else "none"
