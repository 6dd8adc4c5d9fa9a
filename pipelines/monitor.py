"""One check of the world against the serving model; an early retrain when it has drifted."""

from kfp import dsl

from components.decide import check_serving, decide_retrain
from pipelines.platform import Needs, on_cluster
from pipelines.retrain import retrain


@dsl.pipeline(name="monitor", description="Drift of the engagement since the champion's training; retrain early, once.")
def monitor(as_of: str) -> None:
    """Check what happened between the champion's training and `as_of`."""
    drift = on_cluster(check_serving(as_of=as_of), Needs(cpu="2", memory="8Gi", cache=False))
    decision = on_cluster(decide_retrain(as_of=as_of, verdict=drift.outputs["verdict"]), Needs(cache=False))
    with dsl.If(decision.output == "retrain"):
        retrain(as_of=as_of, reason="drift")
