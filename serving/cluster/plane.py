"""What the two modes share: one document, brought step by step to where it shall be, by whoever holds it.

Each look reads the document, decides the next write from nothing but what it read, writes it if it differs, and comes
back until the cluster has done it: a controller that is killed at any instant leaves a document from which the next
one goes on. Looks are plain reads: a watch can be lost or fall silent, and would have to be backed by them anyway.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay

from engagement.errors import EvergreenError
from serving.cluster.service import STOP, Again, Note, Service, differs, stopped
from serving.manifests import Release
from serving.plane import Doors, Serving, Unfit

PATIENCE = 900.0  # seconds for a new version to become ready: a node may have to be added and an image pulled
LOOK = 1.0  # seconds between two looks

FAILED = ("BlockedByFailedLoad", "InvalidSpec")  # a model's `transitionStatus` that no waiting will change


class Superseded(EvergreenError):
    """Another controller holds the rollout: this one must stop, and settle nothing."""


@dataclass(frozen=True)
class Goal:
    """Where a call wants the document to be.

    Attributes:
        champion: Version for everybody else; empty: a first model is under test, or nothing shall run.
        challenger: Version under test; empty: none.
        percent: Its share.
        standby: Version that stays warm, where the mode can.
        salt: Salt of the users' buckets.
    """

    champion: str
    challenger: str = ""
    percent: int = 0
    standby: str = ""
    salt: str = ""

    @property
    def stable(self) -> str:
        """Who carries everybody whom no canary gets: a first model does so though it is under test."""
        return self.champion or self.challenger


class ClusterPlane(ABC):
    """A model's data plane on KServe; see `serving.plane.Plane`.

    Args:
        service: The InferenceService.
        release: Where a version is fetched from; raises Unfit where its files are at fault.
        resolve: Turns a door's cluster-internal URL into one that can be reached from here.
        patience: Seconds until something that should become ready is given up.
        look: Seconds between two looks.
    """

    def __init__(
        self,
        service: Service,
        release: Callable[[str], Release],
        resolve: Callable[[str], str] = lambda url: url,
        patience: float = PATIENCE,
        look: float = LOOK,
    ) -> None:
        self._service = service
        self._release = release
        self._resolve = resolve
        self._patience, self._look = patience, look
        self._holder = uuid.uuid4().hex
        self._held = False
        self._goal = Goal("")

    def serving(self) -> Serving:
        """What the document says, as far as the cluster has done it."""
        document = self._again(self._service.read)
        return Serving() if document is None or stopped(document) else self._serving(document)

    def open(self, champion: str, challenger: str, salt: str) -> Doors:
        """Run both versions; nobody gets the challenger, but for a first model, which has nobody beside it.

        Raises:
            Unfit: The challenger does not become ready.
            EvergreenError: The champion does not, or the cluster refuses or does not answer.
        """
        self._held = False
        document = self._reach(Goal(champion, challenger, 0 if champion else 100, salt=salt))
        gateway, ours, theirs = self._urls(document)
        alone = self._resolve(ours) if champion else ""
        # KServe's routes weigh requests and know no buckets.
        return Doors(self._resolve(gateway), alone, self._resolve(theirs), sticky=False)

    def split(self, percent: int) -> None:
        """Give the challenger that share of the traffic.

        Raises:
            Superseded: Another controller has taken the rollout over.
            Unfit: The challenger is not ready.
            EvergreenError: No rollout is open here, or the cluster refuses or does not answer.
        """
        if not self._goal.challenger:
            raise EvergreenError("no rollout is open on this cluster", "Call open first")
        if self._goal.champion:
            self._reach(Goal(self._goal.champion, self._goal.challenger, percent, salt=self._goal.salt))

    def settle(self, champion: str, standby: str = "") -> None:
        """Whatever was before: the champion alone; no champion: nothing runs.

        Raises:
            Superseded: Another controller has taken the rollout over.
            EvergreenError: The champion cannot be had; what served before goes on.
        """
        self._reach(Goal(champion, standby=standby if standby != champion and champion else ""))

    def close(self) -> None:
        """Close the connections; nothing on a cluster is for the time being only."""
        self._service.close()

    # --- one mode each

    @abstractmethod
    def _serving(self, document: dict[str, Any]) -> Serving:
        """What a document that runs says."""

    @abstractmethod
    def _next(self, document: dict[str, Any] | None, goal: Goal) -> tuple[dict[str, Any], Note]:
        """The next document on the way, the goal's own at last; raises Again where something has to come first."""

    @abstractmethod
    def _check(self, document: dict[str, Any], goal: Goal) -> None:
        """Raise Again or Unfit unless the cluster has done what the goal's document says."""

    @abstractmethod
    def _urls(self, document: dict[str, Any]) -> tuple[str, str, str]:
        """URLs of everybody, of the champion and of the challenger."""

    # --- shared

    def _place(self, document: dict[str, Any] | None, version: str) -> Release:
        """Where a version is fetched from: as the document says, if it runs already, else as the registry says."""
        if document is not None:
            for predictor in (
                document["spec"]["predictor"],
                *(c["predictor"] for c in document["spec"].get("canary", [])),
            ):
                if version_of(predictor) == version:
                    return Release(version, predictor["model"]["storageUri"])
        try:
            return self._release(version)
        except Unfit as error:
            if version == self._goal.challenger:
                raise
            raise EvergreenError(error.problem, error.remedy) from error

    def _reach(self, goal: Goal) -> dict[str, Any]:
        self._goal = goal
        return self._again(lambda: self._step(goal))

    def _step(self, goal: Goal) -> dict[str, Any]:
        document = self._service.read()
        held = Note.of(document).holder
        if self._held and held != self._holder:
            raise Superseded(
                "another controller has taken this rollout over, or the InferenceService was replaced by hand",
                "Let the one that holds it finish",
            )
        self._held = held == self._holder
        if not goal.stable:
            wished, note = self._none(document)
        else:
            wished, note = self._next(document, goal)
        if not wished:
            return {}
        if differs(document, wished, note):
            self._service.write(wished, note, document)
            raise Again("written", pause=0)
        assert document is not None
        if goal.stable:
            self._check(document, goal)
        elif any(c["type"] == "Ready" and c["status"] == "True" for c in conditions(document)):
            raise Again("what ran still runs")
        return document

    def _none(self, document: dict[str, Any] | None) -> tuple[dict[str, Any], Note]:
        """Nothing shall run. The document stays and says so: to delete it would take one more right."""
        if document is None:
            return {}, Note()
        keep = {"spec": document["spec"], "apiVersion": document["apiVersion"], "kind": document["kind"]}
        metadata = document["metadata"]
        annotations = {k: v for k, v in metadata["annotations"].items() if "/deploymentMode" in k} | {STOP: "true"}
        names = {"name": metadata["name"], "namespace": metadata["namespace"], "labels": metadata.get("labels", {})}
        return keep | {"metadata": names | {"annotations": annotations}}, Note(self._holder)

    def _again(self, look: Callable[[], Any]) -> Any:
        """Look until it is done, or patience ends."""

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            wished = error.pause if isinstance(error, Again) else None
            # Conflicts and writes go on at once, but not faster than a busy server can take.
            return self._look if wished is None else max(wished, self._look / 20)

        try:
            return Retrying(
                retry=retry_if_exception_type(Again), wait=pause, stop=stop_after_delay(self._patience), reraise=True
            )(look)
        except Again as late:
            kind = Unfit if late.challenger else EvergreenError
            raise kind(f"{late.reason}, after {self._patience:.0f} seconds") from late


def version_of(predictor: dict[str, Any]) -> str:
    """The version that a predictor serves; empty where it is none of ours."""
    environment = predictor.get("model", {}).get("env", [])
    return next((str(e.get("value")) for e in environment if e["name"] == "EVERGREEN_MODEL_VERSION"), "")


def conditions(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The conditions of a document's status."""
    found: list[dict[str, Any]] = document.get("status", {}).get("conditions", [])
    return found


def explain(document: dict[str, Any], *kinds: str) -> str:
    """Why conditions of these types are not met, in words."""
    unmet = [c for c in conditions(document) if c["type"] in kinds and c.get("status") != "True"]
    words = [" ".join(filter(None, (c["type"], c.get("reason"), c.get("message")))) for c in unmet]
    return " ".join("; ".join(words).split()) or "the cluster has not said anything about it yet"


def failure(status: dict[str, Any]) -> str:
    """What a model's status says of a failure that stays, in words; empty where there is none."""
    model = status.get("modelStatus") or {}
    if model.get("transitionStatus") not in FAILED:
        return ""
    info = model.get("lastFailureInfo") or {}
    words = [info.get("reason"), " ".join(str(info.get("message") or "").split())]
    code = f"exit code {info['exitCode']}" if info.get("exitCode") else ""
    return ", ".join(filter(None, [*words, code])) or str(model["transitionStatus"])
