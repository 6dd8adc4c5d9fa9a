"""A retrain that the schedule asks for: once a slot, however often it is asked."""

from kfp import dsl

from components.instant import find_slot
from model.config import DEFAULT_STRATEGY
from pipelines.platform import Needs, on_cluster
from pipelines.retrain import retrain


@dsl.pipeline(name="slot", description="Retrain at a slot, if nobody has; without as_of at the newest slot.")
def slot(as_of: str = "", strategy: str = DEFAULT_STRATEGY, reason: str = "slot") -> None:
    """Retrain at `as_of`, or at the newest slot up to now; a slot that is done is not done again."""
    found = on_cluster(find_slot(as_of=as_of, reason=reason), Needs(cache=False))
    with dsl.If(found.output != "none"):
        retrain(as_of=found.output, strategy=strategy, reason=reason)
