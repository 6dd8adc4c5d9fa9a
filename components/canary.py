"""The rollout step: the Kubernetes side written down, and the canary itself."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from components.base import step, tell
from evergreen.settings import Settings

if TYPE_CHECKING:
    from serving.rollout import RolloutResult


def roll_out(settings: Settings, version: str, as_of: datetime, again: bool) -> "RolloutResult":
    """Roll one version out against the latest real requests; `again` gives one that came back a second chance.

    On a cluster a step may not touch what serves: it wishes, and waits for the promoter's decision.
    """
    from serving.promoter import ask_promoter, known_requests
    from serving.registry import Registry
    from serving.rollback import stopped
    from serving.rollout import Rollout

    registry = Registry(settings)
    if settings.plane != "laptop":
        return ask_promoter(settings, registry, version, tell)
    asked = known_requests(settings, registry, version, as_of)
    return Rollout(settings, registry).run(version, asked, tell, again, wanted=lambda: not stopped(settings))


def write_service(settings: Settings, version: str, path: Path) -> None:
    """Write the InferenceService and its runtime, validated, with this version as a 1 % canary of the champion."""
    from serving.manifests import render, serving_runtime, storage_uri, to_yaml
    from serving.registry import Registry

    champion = Registry(settings).aliases().get("champion", version)
    first = champion == version
    stable = None if first else (champion, storage_uri(champion))
    service = render(version, storage_uri(version), None if first else 1, stable)
    path.write_text(to_yaml(serving_runtime(), service))


@step
def run_canary(
    version: str, as_of: str, again: bool, record: dsl.Output[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]
) -> str:
    """Widen the canary step by step, or take it back; returns `champion` or `rolled_back`.

    `manifest` is what Kubernetes would be told at the first step: the InferenceService with `spec.canary[]`.
    """
    from datetime import datetime
    from pathlib import Path

    from components.base import begin
    from components.canary import roll_out, write_service

    settings = begin()
    write_service(settings, version, Path(manifest.path))
    result = roll_out(settings, version, datetime.fromisoformat(as_of), again)
    Path(record.path).write_text(result.to_json())
    return result.outcome
