"""Rollouts in KServe's Standard mode: the challenger is an entry of `spec.canary`, with pods and a Service of its own.

Promotion is a renaming: the stable predictor takes the canary's name, so that the canary's pods become the stable ones.
KServe deletes what is named no longer *before* it changes the route, so that nobody who has a share is ever left out of
a document: shares go to zero first, and a new stable predictor is a ready canary first.
"""

from dataclasses import dataclass, field
from typing import Any

from engagement.errors import EvergreenError
from serving import manifests
from serving.cluster.plane import ClusterPlane, Goal, conditions, explain, failure, version_of
from serving.cluster.service import Again, Note, stopped
from serving.plane import Serving, Unfit


@dataclass(frozen=True)
class State:
    """Versions that a document names: the stable predictor's, and the canaries' with their shares."""

    stable: str
    canaries: dict[str, int] = field(default_factory=dict)


class StandardPlane(ClusterPlane):
    """The data plane in Standard mode."""

    def settle(self, champion: str, standby: str = "") -> None:
        """As `ClusterPlane.settle`; a standby that cannot be fetched any more is no reason not to settle."""
        if standby:
            try:
                self._again(lambda: self._place(self._service.read(), standby))
            except EvergreenError:
                standby = ""
        super().settle(champion, standby)

    def _serving(self, document: dict[str, Any]) -> Serving:
        now, challenger = _state(document), Note.of(document).challenger
        if challenger == now.stable:
            return Serving("", challenger, 100)
        if challenger not in now.canaries:
            return Serving(now.stable)
        seen = _seen(document).get(challenger, {})
        return Serving(now.stable, challenger, seen.get("trafficPercent", 0) if seen.get("ready") else 0)

    def _next(self, document: dict[str, Any] | None, goal: Goal) -> tuple[dict[str, Any], Note]:
        state = self._on_the_way(document, goal)
        entries = [(self._place(document, version), percent) for version, percent in state.canaries.items()]
        wished = manifests.standard(self._place(document, state.stable), entries, self._service.namespace)
        return wished, Note(self._holder, challenger=goal.challenger, salt=goal.salt)

    def _on_the_way(self, document: dict[str, Any] | None, goal: Goal) -> State:
        wished = _wished(goal)
        if document is None or stopped(document):
            return wished
        now, seen = _state(document), _seen(document)
        if now.stable != wished.stable:
            if wished.stable not in now.canaries:
                return State(now.stable, now.canaries | {wished.stable: 0})
            if not seen.get(wished.stable, {}).get("ready"):
                raise self._late(document, wished.stable, goal)
            rest = {version: 0 for version in now.canaries if version != wished.stable}
            return State(wished.stable, {now.stable: 0} | rest)
        going = {version: 0 for version in now.canaries if version not in wished.canaries}
        if any(now.canaries[version] for version in going):
            return State(now.stable, now.canaries | going)
        if any(seen.get(version, {"trafficPercent": 1})["trafficPercent"] for version in going):
            raise Again("the route has not been changed yet")
        if going and not _carries(document, now.stable):
            raise self._late(document, now.stable, goal)
        return wished

    def _check(self, document: dict[str, Any], goal: Goal) -> None:
        if not _carries(document, goal.stable):
            raise self._late(document, goal.stable, goal)
        seen = _seen(document)
        wished = _wished(goal).canaries
        if {v: s.get("trafficPercent") for v, s in seen.items()} != wished:
            raise Again("the shares have not been changed yet")
        if goal.champion and goal.challenger and not seen[goal.challenger].get("ready"):
            raise self._late(document, goal.challenger, goal)

    def _late(self, document: dict[str, Any], version: str, goal: Goal) -> Again:
        """A version that is not ready; a challenger that has failed for good raises Unfit."""
        status = document.get("status", {})
        ours = _state(document).stable == version
        broken = failure(status if ours else _seen(document).get(version, {}))
        if broken and version == goal.challenger:
            raise Unfit(f"v{version} cannot be served: {broken}")
        why = explain(document, *(("PredictorReady", "Ready") if ours else ("CanaryPredictorReady",)))
        return Again(f"v{version} is not ready ({broken or why})", challenger=version == goal.challenger)

    def _urls(self, document: dict[str, Any]) -> tuple[str, str, str]:
        now, challenger = _state(document), Note.of(document).challenger
        champion = now.stable if now.stable != challenger else ""
        alone = [f"http://{self._name(v)}.{self._service.namespace}.svc.cluster.local" for v in (champion, challenger)]
        return document.get("status", {}).get("url", alone[0]), *alone

    def _name(self, version: str) -> str:
        return predictor_service(self._service.name, version)


def predictor_service(service: str, version: str) -> str:
    """KServe's name of a version's Deployment and Service."""
    return f"{service}-v{version}-predictor"


def _wished(goal: Goal) -> State:
    if not goal.challenger:
        return State(goal.champion, {goal.standby: 0} if goal.standby else {})
    return State(goal.champion, {goal.challenger: goal.percent}) if goal.champion else State(goal.challenger)


def _state(document: dict[str, Any]) -> State:
    spec = document["spec"]
    canaries = {version_of(c["predictor"]): c["trafficPercent"] for c in spec.get("canary", [])}
    return State(version_of(spec["predictor"]), canaries)


def _seen(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What KServe reports of each canary; it repeats the document's shares once it has acted on them."""
    statuses = document.get("status", {}).get("canaryStatuses") or []
    return {str(s["name"]).removeprefix("v"): s for s in statuses}


def _carries(document: dict[str, Any], version: str) -> bool:
    """Whether the stable predictor is ready, and is that version's.

    `observedGeneration` cannot tell: here it is the Deployment's, which a new share does not move. The predictor's URL
    can: it names the stable predictor, and is written when that is ready.
    """
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions(document))
    url = document.get("status", {}).get("components", {}).get("predictor", {}).get("url", "")
    return ready and f"//{predictor_service(document['metadata']['name'], version)}" in url
