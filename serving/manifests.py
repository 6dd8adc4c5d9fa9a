"""The Kubernetes side of a rollout, as plain documents: a KServe ServingRuntime and an InferenceService.

Written for KServe 0.21 in Standard mode (`spec.canary[]`, split by the Gateway API) and in Knative mode
(`canaryTrafficPercent`). They say what is wished at a moment; in what order one follows another is told in `cluster/`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import yaml

from engagement.errors import EvergreenError
from serving.manifest_rules import validate

IMAGE = "evergreen-python:0.1.0"
NAME = "homefeed-ranker"
NAMESPACE = "evergreen"
RUNTIME = "evergreen-ranker"
MODEL_FORMAT = "evergreen-bundle"
HOME_CLAIM = "evergreen-home"
PORT = 8080
GRPC_PORT = 8081
MIN_REPLICAS = 2  # pods for all users, whoever serves them
NOTE = "evergreen/rollout"  # annotation: whose rollout this is, and how far (`cluster/note.py` writes it)
KEY_SECRET, KEY_FILE, KEY_MOUNT = "evergreen-verifying-key", "verifying.pem", "/etc/evergreen/keys"
LOG = "serving/log"  # the serving log, below the home
RESOURCES = {
    "requests": {"cpu": "1", "memory": "2Gi"},
    "limits": {"cpu": "2", "memory": "4Gi"},
}
Mode = Literal["Standard", "Knative"]


class Release(NamedTuple):
    """A version, and where KServe fetches its bundle (`s3://`, `gs://`, `pvc://`; it knows no `models:/`)."""

    version: str
    storage_uri: str


def storage_uri(version: str) -> str:
    """Where a cluster fetches a version: the home's volume, as KServe names it."""
    return f"pvc://{HOME_CLAIM}/serving/models/{version}"


def serving_runtime(image: str = IMAGE, namespace: str = NAMESPACE, mode: Mode = "Standard") -> dict[str, Any]:
    """The runtime that serves bundles: our image, probed on the model's own readiness.

    The home is read-only but for the serving log. Knative allows a container one port, so that gRPC is Standard's only.
    """
    ports = [{"containerPort": PORT, "name": "http1", "protocol": "TCP"}]
    args = ["--bundle", "/mnt/models", "--host", "0.0.0.0", "--port", str(PORT)]
    if mode == "Standard":
        ports.append({"containerPort": GRPC_PORT, "name": "h2c", "protocol": "TCP"})
        args += ["--grpc-port", str(GRPC_PORT)]
    ready = {"httpGet": {"path": f"/v2/models/{NAME}/ready", "port": PORT}}
    container = {
        "name": "kserve-container",
        "image": image,
        "command": ["python", "-m", "serving.server"],
        "args": args,
        "env": [
            {"name": "EVERGREEN_HOME", "value": "/evergreen"},
            {"name": "HOME", "value": "/tmp"},
            # The public half: what is mounted here can check a model, not sign one.
            {"name": "EVERGREEN_VERIFYING_KEY", "value": f"{KEY_MOUNT}/{KEY_FILE}"},
        ],
        "ports": ports,
        # Imports take seconds; only after the startup probe do the other two count.
        "startupProbe": ready | {"periodSeconds": 2, "failureThreshold": 90},
        "readinessProbe": ready | {"periodSeconds": 5, "timeoutSeconds": 2},
        "livenessProbe": {
            "httpGet": {"path": "/v2/health/live", "port": PORT},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
        },
        "resources": RESOURCES,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "home", "mountPath": "/evergreen", "readOnly": True},
            {"name": "home", "mountPath": f"/evergreen/{LOG}", "subPath": LOG},
            {"name": "verifying-key", "mountPath": KEY_MOUNT, "readOnly": True},
        ],
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": RUNTIME, "namespace": namespace, "labels": _labels()},
        "spec": {
            "supportedModelFormats": [{"name": MODEL_FORMAT, "version": "1", "autoSelect": True}],
            "protocolVersions": ["v2", "grpc-v2"] if mode == "Standard" else ["v2"],
            "multiModel": False,
            "containers": [container],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "home", "persistentVolumeClaim": {"claimName": HOME_CLAIM}},
                {"name": "verifying-key", "secret": {"secretName": KEY_SECRET}},
            ],
        },
    }


def standard(
    stable: Release, canaries: Sequence[tuple[Release, int]] = (), namespace: str = NAMESPACE
) -> dict[str, Any]:
    """The InferenceService in Standard mode.

    Whoever may get everybody at the next write runs with pods for everybody: KServe shifts a share as soon as one pod
    is ready, and a promotion or a way back is one write. It also takes the pods of every ready canary off the stable
    predictor's, a dark canary's too; the stable predictor is therefore given that many more.

    Args:
        stable: Who serves everybody whom no canary gets.
        canaries: Canaries with their shares, 0..100; at 0 it runs and nobody gets it.
        namespace: Kubernetes namespace.
    """
    # `maxReplicas` and scaling fields are refused on a canary; the rest is merged over the stable predictor.
    entries = [
        {"trafficPercent": percent, "predictor": _predictor(release, MIN_REPLICAS)} for release, percent in canaries
    ]
    spec: dict[str, Any] = {"predictor": _predictor(stable, MIN_REPLICAS * (1 + len(entries))) | _POD}
    if entries:
        spec["canary"] = entries
    # Exactly this word: in any other mode `spec.canary` is refused or ignored.
    return _service(spec, "Standard", {}, namespace)


def knative(release: Release, percent: int | None = None, namespace: str = NAMESPACE) -> dict[str, Any]:
    """The InferenceService in Knative mode.

    Args:
        release: What the newest revision serves.
        percent: Its share of the traffic, the rest being the last rolled-out revision's; None: it is rolled out.
        namespace: Kubernetes namespace.
    """
    predictor = _predictor(release, MIN_REPLICAS) | _POD
    predictor.pop("name")  # revisions have names of their own, and a changed one would be another service
    if percent is not None:
        predictor["canaryTrafficPercent"] = percent
    # The tags give the newest and the rolled-out revision an address each, and keep their pods where nobody is sent.
    tags = {"serving.kserve.io/enable-tag-routing": "true"}
    return _service({"predictor": predictor}, "Knative", tags, namespace)


def render(
    version: str, storage_uri: str, canary_percent: int | None = None, champion: tuple[str, str] | None = None
) -> dict[str, Any]:
    """The Standard InferenceService of one version: as the champion alone, or as a canary beside the champion.

    Args:
        version: Version being rolled out, or the champion alone when `canary_percent` is None.
        storage_uri: Where KServe fetches its bundle.
        canary_percent: Its share of the traffic, 0..100; None: it is the champion.
        champion: Version and storage URI of the champion beside the canary.

    Raises:
        EvergreenError: A canary without a champion, or the other way round.
    """
    release = Release(version, storage_uri)
    if (canary_percent is None) != (champion is None):
        raise EvergreenError("a canary needs a champion and a share, and a champion alone needs neither")
    if champion is None or canary_percent is None:
        return standard(release)
    return standard(Release(*champion), [(release, canary_percent)])


def to_yaml(*documents: dict[str, Any]) -> str:
    """The documents as YAML that `kubectl apply` takes.

    Raises:
        EvergreenError: A document breaks a rule of KServe; the error names the field.
    """
    for document in documents:
        problems = validate(document)
        if problems:
            raise EvergreenError(f"the {document.get('kind', 'document')} is not valid: {'; '.join(problems)}")
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False)


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice, not as an anchor and an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_POD = {
    "automountServiceAccountToken": False,
    # KServe copies an InferenceService's annotations into its pods' template, where a changed one replaces every pod.
    # A predictor's own annotation wins over it: this constant keeps what is noted above out of the pods.
    "annotations": {NOTE: "see the InferenceService"},
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
    "terminationGracePeriodSeconds": 30,
}


def _labels() -> dict[str, str]:
    return {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "evergreen"}


def _service(spec: dict[str, Any], mode: Mode, annotations: dict[str, str], namespace: str) -> dict[str, Any]:
    metadata = {
        "name": NAME,
        "namespace": namespace,
        "annotations": {"serving.kserve.io/deploymentMode": mode} | annotations,
        "labels": _labels(),
    }
    return {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": metadata, "spec": spec}


def _predictor(release: Release, replicas: int) -> dict[str, Any]:
    model = {
        # The schema wants a name on a canary's model though it means nothing; the SDK writes the empty one
        # too.
        "name": "",
        "modelFormat": {"name": MODEL_FORMAT, "version": "1"},
        "runtime": RUNTIME,
        "protocolVersion": "v2",
        "storageUri": release.storage_uri,
        "env": [{"name": "EVERGREEN_MODEL_VERSION", "value": release.version}],
        "resources": RESOURCES,
    }
    return {"name": f"v{release.version}", "minReplicas": replicas, "model": model}
