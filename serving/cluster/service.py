"""Reading and writing one InferenceService through KServe's client, with every failure told apart.

What may pass by itself (a conflict, a busy or restarting API server, a lost connection) is an `Again`; what stays is an
`EvergreenError` with one line. Writes are replacements with the `resourceVersion` that was read: a patch deletes
nothing, and a blind one would overwrite what somebody else wrote in between.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from engagement.errors import EvergreenError
from serving import manifests

if TYPE_CHECKING:
    from kserve import KServeClient

REQUEST_SECONDS = 10.0  # the client's own default is to wait for ever


class Again(Exception):
    """Not now: read, decide and try again.

    Args:
        reason: What is waited for.
        pause: Seconds until then; None: as long as between two looks.
        challenger: Whether it is the challenger that is waited for.
    """

    def __init__(self, reason: str, pause: float | None = None, challenger: bool = False) -> None:
        self.reason, self.pause, self.challenger = reason, pause, challenger
        super().__init__(reason)


@dataclass(frozen=True)
class Note:
    """What a controller writes on the InferenceService beside what it wishes; an annotation, as JSON.

    Attributes:
        holder: Names the controller that holds the rollout; another one that held it before must stop.
        transition: Counts the writes.
        challenger: Version under test; empty when no rollout is under way.
        salt: Salt of its users' buckets.
        stable: Knative: version of the rolled-out revision beside a canary, which the document itself does not tell.
        before: Knative: newest revision when the document's version was written; the version's own comes after it.
    """

    holder: str = ""
    transition: int = 0
    challenger: str = ""
    salt: str = ""
    stable: str = ""
    before: str = ""

    @classmethod
    def of(cls, document: dict[str, Any] | None) -> "Note":
        """The note on a document; an empty one where there is none that can be read."""
        text = (document or {}).get("metadata", {}).get("annotations", {}).get(manifests.NOTE, "{}")
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls()

    def numbered(self, transition: int) -> str:
        """The annotation's text."""
        return json.dumps(asdict(replace(self, transition=transition)))


class Service:
    """The InferenceService of the ranker.

    Args:
        client: KServe's client.
        name: Name of the InferenceService.
        namespace: Its namespace.
        timeout: Seconds that one request may take.
    """

    def __init__(
        self,
        client: "KServeClient",
        name: str = manifests.NAME,
        namespace: str = manifests.NAMESPACE,
        timeout: float = REQUEST_SECONDS,
    ) -> None:
        self.name, self.namespace = name, namespace
        self._client = client
        client.api_instance.api_client = _bounded(client.api_instance.api_client.configuration, timeout)

    def read(self) -> dict[str, Any] | None:
        """The document as it is; None where there is none.

        Raises:
            Again: The API server does not answer now.
            EvergreenError: It refuses.
        """
        try:
            return self._call("get", self.name, namespace=self.namespace)
        except _MissingError:
            return None

    def write(self, wished: dict[str, Any], note: Note, before: dict[str, Any] | None) -> None:
        """Write a wished document over the one that was read, keeping what is not ours.

        Args:
            wished: As `manifests` renders it.
            note: The note; it is numbered here.
            before: What was read.

        Raises:
            Again: Somebody else wrote in between, or the API server does not answer now; it may have been written.
            EvergreenError: It is refused.
        """
        document = _over(before, wished)
        document["metadata"]["annotations"][manifests.NOTE] = note.numbered(Note.of(before).transition + 1)
        try:
            if before is None:
                self._call("create", _model(document), namespace=self.namespace)
            else:
                self._call("replace", self.name, _model(document), namespace=self.namespace)
        except _MissingError:
            raise Again("the InferenceService was deleted in between", pause=0) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.api_instance.api_client.rest_client.pool_manager.clear()

    def _call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return getattr(self._client, verb)(*args, **kwargs)
        except HTTPError as error:
            raise Again(f"the Kubernetes API does not answer ({type(error).__name__})") from error
        except RuntimeError as error:
            cause = error.__context__  # KServe's client puts the answer's text into a RuntimeError and drops the rest
            if not isinstance(cause, ApiException):
                raise
            raise _told(cause) from error


class _MissingError(Exception):
    """404."""


def differs(document: dict[str, Any] | None, wished: dict[str, Any], note: Note) -> bool:
    """Whether a document has to be written; what the API server or somebody else added is no difference."""
    if document is None or replace(Note.of(document), transition=0) != replace(note, transition=0):
        return True
    ours, theirs = wished["spec"], document["spec"]
    if len(ours.get("canary", [])) != len(theirs.get("canary", [])):
        return True
    if ours["predictor"].get("canaryTrafficPercent") != theirs["predictor"].get("canaryTrafficPercent"):
        return True
    if stopped(document) != stopped(wished):
        return True
    annotations = wished["metadata"]["annotations"].items() <= document["metadata"].get("annotations", {}).items()
    return not annotations or not _within(ours, theirs)


def stopped(document: dict[str, Any]) -> bool:
    """Whether KServe was told to run nothing."""
    return document["metadata"].get("annotations", {}).get(STOP) == "true"


STOP = "serving.kserve.io/stop"


def _over(before: dict[str, Any] | None, wished: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(wished)
    if before is None:
        return document
    metadata = copy.deepcopy(before["metadata"])
    metadata["labels"] = metadata.get("labels", {}) | document["metadata"]["labels"]
    annotations = {k: v for k, v in metadata.get("annotations", {}).items() if k != STOP}
    metadata["annotations"] = annotations | document["metadata"]["annotations"]
    spec = copy.deepcopy(before["spec"]) | document["spec"]
    spec["predictor"] = copy.deepcopy(before["spec"]["predictor"]) | document["spec"]["predictor"]
    if "canary" not in document["spec"]:
        spec.pop("canary", None)
    if "canaryTrafficPercent" not in document["spec"]["predictor"]:
        spec["predictor"].pop("canaryTrafficPercent", None)
    return document | {"metadata": metadata, "spec": spec}


def _within(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(k in theirs and _within(v, theirs[k]) for k, v in ours.items())
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_within, ours, theirs))
    return bool(ours == theirs)


def _model(document: dict[str, Any]) -> Any:
    """The SDK's object, which its client asks for; the specification stays the plain document that it is."""
    from kserve import V1beta1InferenceService
    from kubernetes.client import V1ObjectMeta

    known = {json_name: name for name, json_name in V1ObjectMeta.attribute_map.items() if name != "managed_fields"}
    metadata = {known[k]: v for k, v in document["metadata"].items() if k in known}
    return V1beta1InferenceService(
        api_version=document["apiVersion"],
        kind=document["kind"],
        metadata=V1ObjectMeta(**metadata),
        spec=document["spec"],
    )


def _bounded(configuration: Any, timeout: float) -> Any:
    """A client whose every request ends: the SDK offers no default, and KServe's client passes none on."""
    from kubernetes.client import ApiClient

    class _Bounded(ApiClient):
        def request(self, *args: Any, **kwargs: Any) -> Any:
            return super().request(*args, **(kwargs | {"_request_timeout": (timeout, timeout)}))

    configuration.retries = False  # or urllib3 would repeat requests behind our back
    return _Bounded(configuration)


def _told(error: Any) -> Exception:
    """An answer of the API server, as what it means here."""
    try:
        message = json.loads(error.body)["message"]
    except (ValueError, TypeError, KeyError):
        message = str(error.reason)
    line = " ".join(str(message).split())
    if error.status == 404:
        return _MissingError(line)
    if error.status == 409:
        return Again(f"somebody else wrote in between ({line})", pause=0)
    if error.status in (408, 429) or error.status >= 500:
        return Again(f"the Kubernetes API answers {error.status} ({line})", pause=_after(error.headers))
    remedy = {401: "Check the service account's token", 403: "Check the service account's Role"}
    return EvergreenError(
        f"the Kubernetes API refuses the InferenceService ({error.status}: {line})", remedy.get(error.status, "")
    )


def _after(headers: Any) -> float | None:
    text = (headers or {}).get("Retry-After", "")
    return float(text) if text.isdigit() else None
