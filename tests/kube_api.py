"""What of the Kubernetes API needs no state: paths, discovery, patches, errors."""

import copy
import json
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Key = tuple[str, str, str, str]  # group/version, plural, namespace, name
KINDS = {
    ("v1", "namespaces"): ("Namespace", False),
    ("v1", "pods"): ("Pod", True),
    ("v1", "configmaps"): ("ConfigMap", True),
    ("serving.kserve.io/v1beta1", "inferenceservices"): ("InferenceService", True),
    ("serving.kserve.io/v1alpha1", "servingruntimes"): ("ServingRuntime", True),
}
REASONS = {400: "BadRequest", 404: "NotFound", 405: "MethodNotAllowed", 409: "Conflict", 410: "Expired"}
REASONS |= {415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError"}
REASONS |= {503: "ServiceUnavailable"}


class Refused(Exception):
    """A request that is answered with a Status object."""

    def __init__(self, code: int, message: str, headers: dict[str, str] | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.code, self.headers = code, headers or {}
        self.body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
        self.body |= {"reason": reason or REASONS[code], "code": code}


@dataclass(frozen=True)
class Path:
    """A resource path, taken apart."""

    version: str
    plural: str
    namespace: str
    name: str
    sub: str

    @property
    def key(self) -> Key:
        return self.version, self.plural, self.namespace, self.name

    @property
    def group(self) -> str:
        return self.version.rpartition("/")[0]


def parse(path: str) -> Path:
    parts = path.strip("/").split("/")
    version, rest = (
        ("/".join(parts[1:3]), parts[3:]) if parts[0] == "apis" else (parts[1] if parts[1:] else "", parts[2:])
    )
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    plural, name, sub = (rest + ["", "", ""])[:3]
    if (version, plural) not in KINDS:
        raise Refused(404, "the server could not find the requested resource")
    return Path(version, plural, namespace, name, sub)


def is_discovery(path: str) -> bool:
    parts = path.strip("/").split("/")
    return parts[0] == "version" or (parts[0] == "api" and len(parts) < 3) or (parts[0] == "apis" and len(parts) < 4)


def discovery(path: str) -> dict[str, Any]:
    parts = path.strip("/").split("/")
    groups = sorted({v.partition("/")[0] for v, _ in KINDS if "/" in v})
    if parts == ["version"]:
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if parts == ["apis"]:
        entries = []
        for group in groups:
            versions = [{"groupVersion": v, "version": v.split("/")[1]} for v, _ in KINDS if v.startswith(group + "/")]
            entries.append({"name": group, "versions": versions, "preferredVersion": versions[0]})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": entries}
    version = parts[1] if parts[0] == "api" else "/".join(parts[1:])
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "namespaced": spaced, "kind": kind, "verbs": verbs}
        for (v, plural), (kind, spaced) in KINDS.items()
        if v == version
    ]
    if not resources:
        raise Refused(404, "the server could not find the requested resource")
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def selected(request: web.Request) -> str:
    """The name of `fieldSelector=metadata.name=...`, or nothing."""
    return request.query.get("fieldSelector", "").removeprefix("metadata.name=")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    volatile = ("resourceVersion", "generation")
    strip = [d | {"metadata": {k: v for k, v in d["metadata"].items() if k not in volatile}} for d in (one, other)]
    return strip[0] == strip[1]


def patched(document: dict[str, Any], content_type: str, body: str) -> dict[str, Any]:
    if content_type == "application/merge-patch+json":
        return _merge(copy.deepcopy(document), json.loads(body))
    if content_type == "application/json-patch+json":
        changed = copy.deepcopy(document)
        for step in json.loads(body):
            _json_patch(changed, step)
        return changed
    raise Refused(415, f"patches of {content_type} are not supported here")


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7396: null deletes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    target = target if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = _merge(target.get(name), value)
    return target


def _json_patch(document: Any, step: dict[str, Any]) -> None:
    *way, last = [p.replace("~1", "/").replace("~0", "~") for p in step["path"].split("/")[1:]]
    place = document
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    index: Any = last
    if isinstance(place, list):
        index = len(place) if last == "-" else int(last)
    if step["op"] == "remove":
        del place[index]
    elif step["op"] == "add" and isinstance(place, list):
        place.insert(index, step["value"])
    elif step["op"] in ("add", "replace"):
        place[index] = step["value"]
    elif step["op"] == "test" and place[index] != step["value"]:
        raise Refused(422, f"the test of {step['path']} failed")
