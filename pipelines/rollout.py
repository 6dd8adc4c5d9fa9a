"""One rollout: the canary widens, or comes back."""

from kfp import dsl

from components.canary import run_canary
from pipelines.platform import Needs, on_cluster


@dsl.pipeline(name="rollout", description="Canary one registered version: dark, 1, 10, 50, 100 %, or back to 0.")
def rollout(version: str, as_of: str, again: bool = False) -> str:
    """Roll `version` out against real requests known at `as_of`; returns `champion` or `rolled_back`.

    A version that came back once is not tried again unless a person asks for it with `again`.
    """
    needs = Needs(cpu="2", memory="8Gi", retries=0, cache=False)  # it takes up its own half-done work by itself
    canary = on_cluster(run_canary(version=version, as_of=as_of, again=again), needs)
    return canary.outputs["Output"]
