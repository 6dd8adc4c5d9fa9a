"""Between two retrains: the served features as of now, so that serving sees what training will see."""

from kfp import dsl

from components.features import refresh_features
from components.instant import find_hour
from pipelines.platform import Needs, on_cluster


@dsl.pipeline(name="refresh", description="Materialise the online features; every hour.")
def refresh(as_of: str = "") -> None:
    """Publish what the log knew at `as_of`, or at the newest full hour, and measure train/serve parity."""
    hour = on_cluster(find_hour(as_of=as_of), Needs(cache=False))
    on_cluster(refresh_features(as_of=hour.output), Needs(cpu="2", memory="8Gi", cache=False))
