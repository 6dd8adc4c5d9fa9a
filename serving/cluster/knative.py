"""Rollouts in KServe's Knative mode: the document holds the newest version and its share; the rest is the last
rolled-out revision's, which only the status names.

"Latest" is, for Knative, the latest *ready* revision: to write the champion's version without a share would send
everybody to the challenger until the champion's new revision is ready. The way back therefore takes three writes: the
share goes to zero, the champion's version comes with a share of zero, and only when it is ready the share is left out.
"""

from dataclasses import dataclass
from typing import Any

from serving import manifests
from serving.cluster.plane import ClusterPlane, Goal, conditions, explain, failure, version_of
from serving.cluster.service import Again, Note, stopped
from serving.plane import Serving, Unfit


@dataclass(frozen=True)
class State:
    """What a document says: its version, the version's share (None: rolled out), and who is rolled out beside it."""

    version: str
    percent: int | None = None
    stable: str = ""


class KnativePlane(ClusterPlane):
    """The data plane in Knative mode. It keeps no standby: revisions without a share give their pods back."""

    def _serving(self, document: dict[str, Any]) -> Serving:
        now, challenger = _state(document), Note.of(document).challenger
        if now.percent is None:
            return Serving("", challenger, 100) if challenger == now.version else Serving(now.version)
        if challenger == now.version:
            return Serving(now.stable, challenger, now.percent)
        return Serving(now.stable)

    def _next(self, document: dict[str, Any] | None, goal: Goal) -> tuple[dict[str, Any], Note]:
        state = self._on_the_way(document, goal)
        wished = manifests.knative(self._place(document, state.version), state.percent, self._service.namespace)
        note, before = Note.of(document), ""
        if document is not None and not stopped(document):
            # A changed version makes a revision; a changed share makes none.
            same = _state(document).version == state.version
            before = note.before if same else _revisions(document).get("latestCreatedRevision", "")
        challenger = goal.challenger
        return wished, Note(self._holder, 0, challenger, goal.salt, state.stable, before)

    def _on_the_way(self, document: dict[str, Any] | None, goal: Goal) -> State:
        if document is None or stopped(document):
            return State(goal.stable)
        now = _state(document)
        if goal.challenger and goal.champion:
            wished = State(goal.challenger, goal.percent, goal.champion)
            if now.version == goal.challenger and now.percent is not None and now.stable == goal.champion:
                return wished
            if now == State(goal.champion) and self._rolled_out(document, goal):
                return State(goal.challenger, 0, goal.champion)
            if now.percent is not None and now.stable == goal.champion != now.version:
                return self._off(document, now, State(goal.challenger, 0, goal.champion))
        return self._alone(document, now, goal)

    def _alone(self, document: dict[str, Any], now: State, goal: Goal) -> State:
        """On the way to where one version is rolled out and nothing is beside it."""
        if now.version != goal.stable:
            beside = now.version if now.percent is None else now.stable
            return self._off(document, now, State(goal.stable, 0, beside))
        if now.percent is not None and not _ready(document) and goal.stable != goal.challenger:
            raise self._late(document, now.version, goal)
        return State(goal.stable)

    def _off(self, document: dict[str, Any], now: State, then: State) -> State:
        """Take the document's version off the traffic, before another takes its place in the document."""
        if now.percent:
            return State(now.version, 0, now.stable)
        revisions = _revisions(document)
        created = revisions.get("latestCreatedRevision", "")
        if created == Note.of(document).before:
            raise Again(f"v{now.version} has no revision yet")
        if now.percent is not None and any(
            t.get("percent") for t in revisions.get("traffic", []) if t.get("revisionName") == created
        ):
            raise Again(f"v{now.version} still has a share of the traffic")
        return then

    def _check(self, document: dict[str, Any], goal: Goal) -> None:
        if goal.challenger and goal.champion:
            if not _ready(document):
                raise self._late(document, goal.challenger, goal)
            latest = [t for t in _revisions(document).get("traffic", []) if t.get("latestRevision")]
            if [t.get("percent") for t in latest] != [goal.percent]:
                raise Again("the shares have not been changed yet")
        else:
            self._rolled_out(document, goal)

    def _rolled_out(self, document: dict[str, Any], goal: Goal) -> bool:
        revisions = _revisions(document)
        names = {revisions.get(f"latest{kind}Revision") for kind in ("Created", "Ready", "Rolledout")}
        traffic = {t.get("revisionName") for t in revisions.get("traffic", []) if t.get("percent")}
        if not _ready(document) or len(names | traffic) != 1:
            raise self._late(document, _state(document).version, goal)
        return True

    def _late(self, document: dict[str, Any], version: str, goal: Goal) -> Again:
        """A version whose revision is not ready; a challenger that has failed for good raises Unfit."""
        why = explain(document, "PredictorReady", "Ready")
        created = _revisions(document).get("latestCreatedRevision", "")
        ended = any(c["type"] == "PredictorReady" and c["status"] == "False" for c in conditions(document))
        broken = failure(document.get("status", {})) or (why if ended and created != Note.of(document).before else "")
        if broken and version == goal.challenger:
            raise Unfit(f"v{version} cannot be served: {broken}")
        return Again(f"v{version} is not ready ({broken or why})", challenger=version == goal.challenger)

    def _urls(self, document: dict[str, Any]) -> tuple[str, str, str]:
        tags = {t.get("tag"): t.get("url", "") for t in _revisions(document).get("traffic", [])}
        return document.get("status", {}).get("url", ""), tags.get("prev", ""), tags.get("latest", "")


def _state(document: dict[str, Any]) -> State:
    predictor = document["spec"]["predictor"]
    percent = predictor.get("canaryTrafficPercent")
    return State(version_of(predictor), percent, Note.of(document).stable if percent is not None else "")


def _revisions(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document.get("status", {}).get("components", {}).get("predictor", {})
    return found


def _ready(document: dict[str, Any]) -> bool:
    """Whether the document's version has a revision of its own, and that is ready.

    `observedGeneration` cannot tell: here it is that of the Knative Service.
    """
    revisions = _revisions(document)
    created = revisions.get("latestCreatedRevision", "")
    return bool(created) and created != Note.of(document).before and created == revisions.get("latestReadyRevision")
