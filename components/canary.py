"""The rollout step: the Kubernetes side written down, and the canary itself."""

from datetime import datetime, timedelta
from pathlib import Path

from kfp import dsl

from components.base import step, tell
from engagement.store import EngagementStore
from evergreen.settings import Settings
from serving.rollout import ReplayRequest, RolloutResult

CANARY_REQUESTS = 200  # the latest real requests, of which each step replays some
CANARY_DAYS = 14


def latest_requests(settings: Settings, as_of: datetime) -> list[ReplayRequest]:
    """The last requests known at `as_of`, oldest first, as the canary sends them."""
    import polars as pl

    snapshot = EngagementStore(settings.data).snapshot(as_of)
    context = list(snapshot.manifest.context_features)
    rows = pl.DataFrame(snapshot.engagements(as_of - timedelta(days=CANARY_DAYS)))
    first = [pl.col("user_id").first(), pl.col("event_timestamp").min(), *(pl.col(c).first() for c in context)]
    requests = rows.group_by("request_id").agg(pl.col("item_id"), *first).sort("event_timestamp", "request_id")
    return [
        ReplayRequest(
            request_id=r["request_id"],
            user_id=r["user_id"],
            item_ids=tuple(r["item_id"]),
            context={c: r[c] for c in context if r[c] is not None},
            time=as_of,
        )
        for r in requests.tail(CANARY_REQUESTS).to_dicts()
    ]


def roll_out(settings: Settings, version: str, as_of: datetime, again: bool) -> RolloutResult:
    """Roll one version out against the latest real requests; `again` gives one that came back a second chance."""
    from serving.registry import Registry
    from serving.rollout import Rollout

    return Rollout(settings, Registry(settings)).run(version, latest_requests(settings, as_of), tell, again)


def write_service(settings: Settings, version: str, path: Path) -> None:
    """Write the InferenceService and its runtime, validated, with this version as a 10 % canary of the champion."""
    from serving.manifests import render, serving_runtime, to_yaml
    from serving.registry import Registry

    champion = Registry(settings).aliases().get("champion", version)
    first = champion == version
    stable = None if first else (champion, storage(settings, champion))
    service = render(version, storage(settings, version), None if first else 10, stable)
    path.write_text(to_yaml(serving_runtime(), service))


def storage(settings: Settings, version: str) -> str:
    """Where a cluster fetches a version: the home's volume, as KServe names it."""
    return f"pvc://evergreen-home/serving/models/{version}"


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
