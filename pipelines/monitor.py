"""One check of the world against the serving model; an early retrain when it has drifted for long enough."""

from kfp import dsl

from components.check import check_serving
from components.decide import decide_retrain
from components.instant import find_hour
from pipelines.platform import Needs, on_cluster
from pipelines.slot import slot


@dsl.pipeline(name="monitor", description="Drift of the engagement since the champion's training; retrain early, once.")
def monitor(as_of: str = "") -> None:
    """Check the time before `as_of`, or before the newest full hour; retrain early, or at a slot that was missed."""
    hour = on_cluster(find_hour(as_of=as_of), Needs(cache=False))
    drift = on_cluster(check_serving(as_of=hour.output), Needs(cpu="2", memory="8Gi", cache=False))
    decision = on_cluster(
        decide_retrain(as_of=hour.output, verdict=drift.outputs["verdict"], run=dsl.PIPELINE_JOB_ID_PLACEHOLDER),
        Needs(cache=False, alerts=True),
    )
    with dsl.If(decision.outputs["Output"] == "retrain"):
        slot(as_of=decision.outputs["retrain_as_of"], reason=decision.outputs["cause"])
