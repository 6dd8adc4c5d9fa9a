"""Between two retrains: the served features as of now, so that serving sees what training will see."""

from kfp import dsl

from components.features import refresh_features
from pipelines.platform import Needs, on_cluster


@dsl.pipeline(name="refresh", description="Materialise the online features; every hour.")
def refresh(as_of: str) -> None:
    """Read what the log learned since the last materialisation, publish it, and measure train/serve parity."""
    on_cluster(refresh_features(as_of=as_of), Needs(cpu="2", memory="8Gi", cache=False))
