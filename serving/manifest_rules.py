"""Checks of KServe documents without a cluster: the SDK's own models, and the rules of KServe's webhook.

The models tell unknown fields, wrong types and missing required fields; the webhook's rules for
`spec.canary` are copied by hand because neither the SDK nor the CRD states them.
"""

import re
from functools import cache
from typing import Any

_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "datetime": (str,),
    "ResourceQuantity": (str, int, float),
}
_ROOTS = {
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
}
_NO_CANARY_FIELDS = (
    "maxReplicas",
    "scaleTarget",
    "scaleMetric",
    "scaleMetricType",
    "autoScaling",
    "workerSpec",
)
_STORAGE = re.compile(r"^(gs|s3|hdfs|webhdfs|hf|modelscope|https?|azure|pvc|oci|file|git)://.+")
_DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")


def validate(document: Any) -> list[str]:
    """All problems of a document, each with the path of its field; an empty list is a valid document."""
    if not isinstance(document, dict):
        return ["a document must be a mapping"]
    root = _ROOTS.get((str(document.get("apiVersion")), str(document.get("kind"))))
    if root is None:
        return [f"unknown kind {document.get('apiVersion')}/{document.get('kind')}"]
    missing = [f"{name}: is required" for name in ("metadata", "spec") if name not in document]
    problems = missing + _walk(root, document, "")
    if not problems and root == "V1beta1InferenceService":
        problems = _service_rules(document)
    return problems


def _walk(kind: str, value: Any, path: str) -> list[str]:
    """Compare a value with one type of the SDK, e.g. `list[V1Container]` or `dict(str, str)`."""
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{path}: must be a list"]
        return [p for i, v in enumerate(value) for p in _walk(match[1], v, f"{path}[{i}]")]
    if match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            return [f"{path}: must be a mapping"]
        return [p for k, v in value.items() for p in _walk(match[1], v, f"{path}.{k}")]
    if kind in _SCALARS:
        # A bool is an int to Python and to nobody else.
        fits = isinstance(value, _SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))
        return [] if fits else [f"{path}: must be {kind}"]
    model = _model(kind)
    if model is None:  # `object`, or a type newer than the installed Kubernetes client
        return []
    return _walk_model(model, value, path)


def _walk_model(model: type, value: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path or 'document'}: must be a mapping"]
    types, required = _fields(model)
    problems = []
    for name, item in value.items():
        where = f"{path}.{name}" if path else str(name)
        problems += _walk(types[name], item, where) if name in types else [f"{where}: unknown field"]
    return problems + [f"{path}.{n}: is required".lstrip(".") for n in required if n not in value]


@cache
def _model(name: str) -> type | None:
    import kserve.models
    import kubernetes.client.models

    name = name.removeprefix("K8sIoApiApps")  # the SDK's longer name of a type that the client has too
    return getattr(kserve.models, name, None) or getattr(kubernetes.client.models, name, None)


@cache
def _fields(model: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """JSON names of a model's fields with their types, and the names of the required ones."""
    from kubernetes.client import Configuration

    lenient, strict = Configuration(), Configuration()
    lenient.client_side_validation = False
    blank = model(local_vars_configuration=lenient)
    blank.local_vars_configuration = strict
    types = {model.attribute_map[a]: t for a, t in model.openapi_types.items()}
    return types, tuple(model.attribute_map[a] for a in model.openapi_types if _refuses_none(blank, a))


def _refuses_none(instance: Any, attribute: str) -> bool:
    try:
        setattr(instance, attribute, None)
    except ValueError:
        return True
    return False


def _service_rules(document: dict[str, Any]) -> list[str]:
    """What KServe's webhook and full schema demand of an InferenceService beyond types."""
    spec, metadata = document["spec"], document.get("metadata", {})
    predictor, canaries = spec["predictor"], spec.get("canary", [])
    problems = _predictor_rules(predictor, "spec.predictor")
    if not _DNS_LABEL.match(metadata.get("name", "")):
        problems.append("metadata.name: must be a DNS label")
    mode = metadata.get("annotations", {}).get("serving.kserve.io/deploymentMode")
    if canaries and mode != "Standard":
        problems.append("spec.canary: needs the annotation serving.kserve.io/deploymentMode: Standard")
    if mode == "Standard" and "canaryTrafficPercent" in predictor:
        # KServe does not refuse it, it ignores it: nobody would get the canary, and nobody would be told.
        problems.append("spec.predictor.canaryTrafficPercent: ignored in Standard mode")
    if canaries and "canaryTrafficPercent" in predictor:
        problems.append("spec.predictor.canaryTrafficPercent: never together with spec.canary")
    names = [predictor.get("name", "")] + [c["predictor"].get("name", "") for c in canaries]
    if len(set(names)) != len(names):
        problems.append("spec.canary: names must differ from each other and from the stable predictor's")
    for i, canary in enumerate(canaries):
        problems += _canary_rules(canary, predictor, f"spec.canary[{i}]")
    if sum(c.get("trafficPercent", 0) for c in canaries) > 100:
        problems.append("spec.canary: the shares add up to more than 100")
    return problems


def _canary_rules(canary: dict[str, Any], stable: dict[str, Any], path: str) -> list[str]:
    own = canary["predictor"]
    problems = _predictor_rules(own, f"{path}.predictor")
    if not own.get("name"):
        problems.append(f"{path}.predictor.name: is required")
    if "trafficPercent" not in canary:  # the SDK would take 0, the webhook refuses
        problems.append(f"{path}.trafficPercent: is required")
    elif not 0 <= canary["trafficPercent"] <= 100:
        problems.append(f"{path}.trafficPercent: must be within 0..100")
    problems += [f"{path}.predictor.{f}: not allowed on a canary" for f in _NO_CANARY_FIELDS if f in own]
    if own.get("minReplicas", 0) > stable.get("minReplicas", 1):
        problems.append(f"{path}.predictor.minReplicas: more than the stable predictor's")
    if "model" in own and "name" not in own["model"]:
        problems.append(f'{path}.predictor.model.name: is required (write "")')
    return problems


def _predictor_rules(predictor: dict[str, Any], path: str) -> list[str]:
    problems = []
    if ("model" in predictor) == bool(predictor.get("containers")):
        problems.append(f"{path}: needs either a model or a container")
    uri = predictor.get("model", {}).get("storageUri", "")
    if uri and not _STORAGE.match(uri):
        problems.append(f"{path}.model.storageUri: KServe cannot fetch {uri!r}")
    percent = predictor.get("canaryTrafficPercent")
    if percent is not None and not 0 <= percent <= 100:
        problems.append(f"{path}.canaryTrafficPercent: must be within 0..100")
    least, most = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 0)
    if least < 0 or most < 0 or (most and least > most):
        problems.append(f"{path}: minReplicas and maxReplicas do not fit together")
    return problems
