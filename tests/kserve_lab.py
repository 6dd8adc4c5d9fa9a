"""KServe's controller for the tests' API server, as far as a rollout sees it; read off KServe's source.

What it copies, because rollouts stumble over it:
- annotations of an InferenceService end up in the pods' template unless the predictor has the same one (a changed
  template replaces every pod);
- pods of a name that is wished no longer go *before* the route is changed; a canary that is not ready gets no weight;
- the pods of ready canaries are taken off the stable predictor's `minReplicas`, a dark canary's too;
- `status.observedGeneration` is that of the Deployment (Knative: of its Service), not of the InferenceService;
- `Ready` says nothing about canaries;
- Knative's "latest revision" is the latest *ready* one, whatever the document says.
"""

import copy
import hashlib
import json
import math
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.kube_api import Key
from tests.kube_lab import KubeLab

HIDDEN = {"kubectl.kubernetes.io/last-applied-configuration"}  # annotations that KServe does not hand on
SCALING = {"name", "minReplicas", "maxReplicas", "canaryTrafficPercent"}


@dataclass
class Pods:
    """A Deployment, or a Knative revision."""

    version: str
    template: str
    uids: list[str] = field(default_factory=list)
    ready_at: list[float] = field(default_factory=list)
    generation: int = 0

    def scale(self, replicas: int, start: float) -> None:
        if replicas != len(self.uids):
            self.generation += 1
        while len(self.uids) < replicas:
            self.uids.append(str(uuid.uuid4()))
            self.ready_at.append(time.monotonic() + start)
        del self.uids[replicas:], self.ready_at[replicas:]

    @property
    def available(self) -> int:
        return sum(at <= time.monotonic() for at in self.ready_at)


class KServe:
    """The controller: reconciles a little after each change, in the server's thread.

    Attributes:
        broken: Versions whose pods never become ready.
        failures: `lastFailureInfo` of a version that is broken.
        start: Seconds from a pod's creation until it is ready.
        lag: Seconds from a change until it is seen.
        pods: What runs, by Deployment or revision.
        routes: Every split of the traffic that there was, as {version: per cent}.
        outages: What was sent nowhere: names of pods that had a share and did not run.
        replaced: Versions whose pods were replaced because their template changed.
    """

    def __init__(self, lab: KubeLab, start: float = 0.005, lag: float = 0.001) -> None:
        self.lab, self.start, self.lag = lab, start, lag
        lab.listeners.append(self._changed)
        self.clear()

    def clear(self) -> None:
        self.broken: set[str] = set()
        self.failures: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, Pods] = {}
        self.routes: list[dict[str, int]] = []
        self.outages: list[str] = []
        self.replaced: list[str] = []
        self.least: dict[str, int] = {}  # fewest running pods of a version while it had a share
        self._route: dict[str, int] = {}
        self._revisions: list[str] = []

    def _changed(self, key: Key, document: dict[str, Any] | None) -> None:
        if key[1] == "inferenceservices" and document is not None:
            self.lab.loop.call_later(self.lag, self._reconcile, key)
        elif key[1] == "inferenceservices":
            self.pods.clear()

    def _reconcile(self, key: Key) -> None:
        document = self.lab.objects.get(key)
        if document is None:
            return
        annotations = document["metadata"].get("annotations", {})
        status = copy.deepcopy(document.get("status", {}))
        if annotations.get("serving.kserve.io/stop") == "true":
            self.pods.clear()
            self._direct({})
            status = {"conditions": [_condition("PredictorReady", "False", "Stopped"), _condition("Ready", "False")]}
        elif annotations["serving.kserve.io/deploymentMode"] == "Standard":
            self._standard(document, status)
        else:
            self._knative(document, status)
        self.lab.save(key, copy.deepcopy(document) | {"status": status}, bump=False)
        waiting = [at for p in self.pods.values() for at in p.ready_at if time.monotonic() < at < math.inf]
        if waiting:
            self.lab.loop.call_later(min(waiting) - time.monotonic() + 0.001, self._reconcile, key)

    def _direct(self, route: dict[str, int]) -> None:
        """Change the route, and note what it sends where."""
        self._route = {n: p for n, p in route.items() if p}
        shares = Counter[str]()
        for name, percent in self._route.items():
            shares[self.pods[name].version] += percent
        if shares and (not self.routes or self.routes[-1] != dict(shares)):
            self.routes.append(dict(shares))
        self._watch_pods()

    def _watch_pods(self) -> None:
        for name in self._route:
            pods = self.pods.get(name)
            if pods is None or not pods.available:
                self.outages.append(name)
            elif self._route[name] >= 100:
                self.least[pods.version] = min(self.least.get(pods.version, 99), pods.available)

    def _run(self, document: dict[str, Any], name: str, predictor: dict[str, Any], replicas: int) -> Pods:
        """Make a Deployment so; a changed template replaces its pods, one by one and without a gap."""
        version, template = _version(predictor), _template(document, predictor)
        start = math.inf if version in self.broken else self.start
        pods = self.pods.setdefault(name, Pods(version, template))
        if pods.template != template:
            self.replaced.append(pods.version)
            pods.version, pods.template, pods.uids = version, template, [str(uuid.uuid4()) for _ in pods.uids]
            pods.generation += 1
        pods.scale(replicas, start)
        return pods

    # --- Standard

    def _standard(self, document: dict[str, Any], status: dict[str, Any]) -> None:
        spec, service = document["spec"], document["metadata"]["name"]
        stable = spec["predictor"]
        names = {_service(service, stable)}
        statuses, counts = [], {}
        for canary in spec.get("canary", []):
            own = canary["predictor"]
            least = math.ceil(stable.get("minReplicas", 1) * canary["trafficPercent"] / 100)
            replicas = own.get("minReplicas", least)
            name = _service(service, own)
            names.add(name)
            pods = self._run(document, name, _over(stable, own), replicas)
            entry = {"name": own["name"], "ready": pods.available > 0, "trafficPercent": canary["trafficPercent"]}
            if pods.version in self.failures:
                info = self.failures[pods.version]
                entry["modelStatus"] = {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": info}
            statuses.append(entry)
            counts[name] = replicas * entry["ready"]
        status["canaryStatuses"] = statuses
        ready = all(s["ready"] for s in statuses)
        for name in set(self.pods) - names:
            del self.pods[name]
        self._watch_pods()
        replicas = stable.get("minReplicas", 1)
        if sum(counts.values()):
            replicas = max(replicas - sum(counts.values()), 1)
        pods = self._run(document, _service(service, stable), stable, replicas)
        up = pods.available > 0
        conditions = [_condition("PredictorReady", str(up), "" if up else "MinimumReplicasUnavailable")]
        conditions += [_condition("Ready", str(up))]
        if statuses:
            reason = "AllCanariesReady" if ready else "CanariesNotReady"
            conditions.append(_condition("CanaryPredictorReady", str(ready), reason))
        status |= {"conditions": conditions, "observedGeneration": pods.generation}
        if up:
            url = f"http://{_service(service, stable)}-evergreen.example.com"
            status["components"] = {"predictor": {"url": url}}
            status["url"] = f"http://{service}-evergreen.example.com"
            shares = {
                _service(service, c["predictor"]): c["trafficPercent"]
                for c, s in zip(spec.get("canary", []), statuses, strict=True)
                if s["ready"]
            }
            self._direct({_service(service, stable): 100 - sum(shares.values())} | shares)

    # --- Knative

    def _knative(self, document: dict[str, Any], status: dict[str, Any]) -> None:
        predictor, service = document["spec"]["predictor"], document["metadata"]["name"]
        template = _template(document, predictor)
        newest = self.pods.get(self._revisions[-1]) if self._revisions else None
        if newest is None or newest.template != template:
            name = f"{service}-predictor-{len(self._revisions) + 1:05}"
            self._revisions.append(name)
            self.pods[name] = Pods(_version(predictor), template)
            start = math.inf if _version(predictor) in self.broken else self.start
            self.pods[name].scale(predictor.get("minReplicas", 1), start)
        component = status.setdefault("components", {}).setdefault("predictor", {})
        created = self._revisions[-1]
        ready = created if self.pods[created].available else component.get("latestReadyRevision", "")
        percent = predictor.get("canaryTrafficPercent")
        for _ in range(3):  # one round of the controller after another, until the status stands
            rolled = component.get("latestRolledoutRevision", "")
            latest = {"latestRevision": True, "revisionName": ready, "tag": "latest", "percent": 100}
            traffic = [latest | {"url": f"http://latest-{service}-predictor.evergreen.example.com"}]
            if percent is not None and rolled:
                traffic[0]["percent"] = percent
                if percent < 100:
                    url = f"http://prev-{service}-predictor.evergreen.example.com"
                    old = {"latestRevision": False, "revisionName": rolled, "tag": "prev", "percent": 100 - percent}
                    traffic.append(old | {"url": url})
            self._roll(component, created, ready, traffic)
        failed = created != ready and self.pods[created].version in self.broken
        up = str(not failed) if created == ready or failed else "Unknown"
        reason = self.failures.get(self.pods[created].version, {}).get("message", "RevisionFailed") if failed else ""
        condition = _condition("PredictorReady", up, "RevisionFailed" if failed else "", reason)
        status["conditions"] = [condition, _condition("Ready", up)]
        status["observedGeneration"] = len(self._revisions)
        status["url"] = f"http://{service}.evergreen.example.com"
        shares = Counter[str]()
        for target in traffic if ready else []:
            shares[str(target["revisionName"])] += int(target["percent"])
        self._direct(dict(shares))

    def _roll(self, component: dict[str, Any], created: str, ready: str, traffic: list[dict[str, Any]]) -> None:
        """KServe's `PropagateStatus`: which revision is rolled out, and which was before."""
        shares = Counter[str]()
        for target in traffic:
            shares[target["revisionName"]] += target["percent"]
        latest = traffic[0]
        rolled = component.get("latestRolledoutRevision", "")
        if ready and rolled != ready and latest["percent"] == 100:
            component |= {"previousRolledoutRevision": rolled, "latestRolledoutRevision": ready}
        elif ready and rolled == ready == created and latest["percent"] < 100 and shares[ready] == 100:
            component["latestRolledoutRevision"] = component.get("previousRolledoutRevision") or rolled
        component |= {"latestCreatedRevision": created, "latestReadyRevision": ready, "traffic": traffic}


def _condition(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def _service(service: str, predictor: dict[str, Any]) -> str:
    return f"{service}-{predictor['name']}-predictor"


def _version(predictor: dict[str, Any]) -> str:
    return next(e["value"] for e in predictor["model"]["env"] if e["name"] == "EVERGREEN_MODEL_VERSION")


def _over(stable: Any, canary: Any) -> Any:
    """The canary's fields over the stable predictor's; lists replace."""
    if isinstance(stable, dict) and isinstance(canary, dict):
        return stable | {k: _over(stable.get(k), v) for k, v in canary.items()}
    return canary


def _template(document: dict[str, Any], predictor: dict[str, Any]) -> str:
    annotations = {k: v for k, v in document["metadata"].get("annotations", {}).items() if k not in HIDDEN}
    spec = {k: v for k, v in predictor.items() if k not in SCALING}
    spec["annotations"] = annotations | predictor.get("annotations", {})
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
