"""The Kubernetes side of a rollout, as plain documents: a KServe ServingRuntime and an InferenceService.

Written for KServe 0.21 in Standard mode (`spec.canary[]`, split by the Gateway API). A version is promoted
by giving the stable predictor the canary's name, so that its pods go on running, and rolled back by leaving
the entry out.
"""

from typing import Any

import yaml

from engagement.errors import EvergreenError
from serving.manifest_rules import validate

IMAGE = "evergreen-python:0.1.0"
NAME = "homefeed-ranker"
NAMESPACE = "evergreen"
RUNTIME = "evergreen-ranker"
MODEL_FORMAT = "evergreen-bundle"
PORT = 8080
MIN_REPLICAS = 2
CANARY_REPLICAS = 1
RESOURCES = {
    "requests": {"cpu": "1", "memory": "2Gi"},
    "limits": {"cpu": "2", "memory": "4Gi"},
}


def serving_runtime(image: str = IMAGE, namespace: str = NAMESPACE) -> dict[str, Any]:
    """The runtime that serves bundles: our image, probed on the model's own readiness."""
    ready = {"httpGet": {"path": f"/v2/models/{NAME}/ready", "port": PORT}}
    container = {
        "name": "kserve-container",
        "image": image,
        "command": ["python", "-m", "serving.server"],
        "args": ["--bundle", "/mnt/models", "--host", "0.0.0.0", "--port", str(PORT)],
        "env": [{"name": "EVERGREEN_HOME", "value": "/evergreen"}, {"name": "HOME", "value": "/tmp"}],
        "ports": [{"containerPort": PORT, "name": "http1", "protocol": "TCP"}],
        # Imports take ten seconds and more; only after the startup probe do the other two count.
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
            {"name": "features", "mountPath": "/evergreen", "readOnly": True},
        ],
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": RUNTIME, "namespace": namespace, "labels": _labels()},
        "spec": {
            "supportedModelFormats": [{"name": MODEL_FORMAT, "version": "1", "autoSelect": True}],
            "protocolVersions": ["v2"],
            "multiModel": False,
            "containers": [container],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {
                    "name": "features",
                    "persistentVolumeClaim": {"claimName": "evergreen-home", "readOnly": True},
                },
            ],
        },
    }


def render(
    version: str,
    storage_uri: str,
    canary_percent: int | None = None,
    champion: tuple[str, str] | None = None,
    namespace: str = NAMESPACE,
) -> dict[str, Any]:
    """The InferenceService for one state of a rollout.

    Args:
        version: Version being rolled out, or the champion alone when `canary_percent` is None.
        storage_uri: Where KServe fetches its bundle (`s3://`, `gs://`, `pvc://`; it knows no `models:/`).
        canary_percent: Its share of the traffic, 0..100 (0: deployed, not exposed); None: it is the champion.
        champion: Version and storage URI of the champion beside the canary.
        namespace: Kubernetes namespace.

    Raises:
        EvergreenError: A canary without a champion, or the other way round.
    """
    if (canary_percent is None) != (champion is None):
        raise EvergreenError("a canary needs a champion and a share, and a champion alone needs neither")
    stable = champion or (version, storage_uri)
    spec: dict[str, Any] = {"predictor": _predictor(*stable, MIN_REPLICAS) | _POD}
    if canary_percent is not None:
        # `maxReplicas` and scaling fields are refused on a canary; the rest is merged over the stable
        # predictor.
        canary = _predictor(version, storage_uri, CANARY_REPLICAS)
        spec["canary"] = [{"trafficPercent": canary_percent, "predictor": canary}]
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            # Exactly this word: in any other mode `spec.canary` is refused or ignored.
            "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
            "labels": _labels(),
        },
        "spec": spec,
    }


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


def _predictor(version: str, storage_uri: str, replicas: int) -> dict[str, Any]:
    model = {
        # The schema wants a name on a canary's model though it means nothing; the SDK writes the empty one
        # too.
        "name": "",
        "modelFormat": {"name": MODEL_FORMAT, "version": "1"},
        "runtime": RUNTIME,
        "protocolVersion": "v2",
        "storageUri": storage_uri,
        "env": [{"name": "EVERGREEN_MODEL_VERSION", "value": version}],
        "resources": RESOURCES,
    }
    return {"name": f"v{version}", "minReplicas": replicas, "model": model}
