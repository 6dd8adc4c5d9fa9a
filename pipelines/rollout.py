"""One rollout: write the Kubernetes side down, then let the canary widen or come back."""

from kfp import dsl

from components.canary import render_service, run_canary
from pipelines.platform import Needs, on_cluster


@dsl.pipeline(name="rollout", description="Canary one registered version: 10, 50, 100 %, or back to 0.")
def rollout(version: str, as_of: str, again: bool = False) -> str:
    """Roll `version` out against real requests known at `as_of`; returns `champion` or `rolled_back`.

    A version that came back once is not tried again unless a person asks for it with `again`.
    """
    on_cluster(render_service(version=version), Needs(cache=False))
    needs = Needs(cpu="2", memory="8Gi", retries=0, cache=False)  # it takes up its own half-done work by itself
    canary = on_cluster(run_canary(version=version, as_of=as_of, again=again), needs)
    return canary.outputs["Output"]
