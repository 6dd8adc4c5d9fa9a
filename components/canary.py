"""Rollout steps: the Kubernetes side written down, and the canary itself."""

from datetime import datetime, timedelta
from typing import Any

from kfp import dsl

from components.base import step
from engagement.store import EngagementStore
from evergreen.settings import Settings

CANARY_REQUESTS = 200  # latest real requests that the canary replays, spread over its steps
CANARY_DAYS = 14


def latest_requests(settings: Settings, as_of: datetime) -> list[Any]:
    """The last requests known at `as_of`, oldest first, as the canary sends them."""
    import polars as pl
    from serving.rollout import ReplayRequest

    store = EngagementStore(settings.data)
    snapshot = store.snapshot(as_of)
    context = list(snapshot.manifest.context_features)
    rows = pl.DataFrame(snapshot.engagements(as_of - timedelta(days=CANARY_DAYS)))
    grouped = (
        rows.group_by("request_id")
        .agg(
            pl.col("user_id").first(),
            pl.col("item_id"),
            pl.col("event_timestamp").min(),
            *(pl.col(c).first() for c in context),
        )
        .sort("event_timestamp", "request_id")
        .tail(CANARY_REQUESTS)
    )
    return [
        ReplayRequest(
            request_id=r["request_id"],
            user_id=r["user_id"],
            item_ids=tuple(r["item_id"]),
            context={c: r[c] for c in context if r[c] is not None},
            time=as_of,
        )
        for r in grouped.to_dicts()
    ]


@step
def render_service(version: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Write the InferenceService with this version as a 10 % canary, validated."""
    from pathlib import Path

    from components.base import begin
    from components.canary import service_yaml

    Path(manifest.path).write_text(service_yaml(begin(), version))


@step
def run_canary(version: str, as_of: str, record: dsl.Output[dsl.Artifact]) -> str:
    """Widen the canary step by step, or take it back; returns `champion` or `rolled_back`."""
    from datetime import datetime
    from pathlib import Path

    from components.base import begin
    from components.canary import latest_requests, roll_out

    settings, at = begin(), datetime.fromisoformat(as_of)
    result = roll_out(settings, version, latest_requests(settings, at))
    Path(record.path).write_text(result.to_json())
    return result.outcome
