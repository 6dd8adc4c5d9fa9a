"""Where a rollout's evidence comes from: known requests, asked again, and what real users do meanwhile."""

from collections.abc import Sequence

from engagement.store import EngagementStore
from evergreen.settings import Settings
from serving.judge import Guardrails, homefeed, laptop
from serving.live import LiveTraffic
from serving.registry import Registry
from serving.replay import ReplayTraffic
from serving.traffic import Asked, Together, Traffic

PAUSE = 30.0  # seconds that a look at a cluster's users takes


def every_source(settings: Settings, registry: Registry, asked: Sequence[Asked]) -> Traffic:
    """Replayed requests and live ones together. On a laptop the replay sets the pace, on a cluster the users do."""
    primary = EngagementStore(settings.data).manifest.primary_action
    pause = 0.0 if settings.plane == "laptop" else PAUSE
    return Together(ReplayTraffic(settings, registry, asked), LiveTraffic(settings.serving_log, primary, pause))


def rules_of(settings: Settings) -> Guardrails:
    """What the judge asks for: a few hundred requests on a laptop, a feed's traffic on a cluster."""
    return laptop() if settings.plane == "laptop" else homefeed()
