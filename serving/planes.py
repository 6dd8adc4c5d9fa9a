"""Which data plane a home has: this machine's, or a cluster's."""

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.laptop_plane import LaptopPlane
from serving.manifests import Release, storage_uri
from serving.plane import Plane, Unfit
from serving.registry import Registry


def permanent_plane(settings: Settings, registry: Registry) -> Plane | None:
    """The plane that serves whether a rollout runs or not: a cluster always, a laptop while `evergreen up` runs."""
    plane = serving_plane(settings, registry)
    return None if isinstance(plane, LaptopPlane) and not plane.permanent else plane


def serving_plane(settings: Settings, registry: Registry) -> Plane:
    """The plane that `settings.plane` names.

    On a cluster KServe fetches a version from the home's volume, where it is unpacked and verified first.

    Raises:
        EvergreenError: A cluster is named, and none is configured.
    """
    if settings.plane == "laptop":
        return LaptopPlane(settings, registry)
    from kserve import KServeClient
    from kubernetes.config import ConfigException

    from serving.cluster.knative import KnativePlane
    from serving.cluster.service import Service
    from serving.cluster.standard import StandardPlane

    def release(version: str) -> Release:
        try:
            registry.fetch(version)
        except EvergreenError as error:
            registry.aliases()  # where the registry does not answer either, that is no fault of the version's
            raise Unfit(error.problem, error.remedy) from error
        return Release(version, storage_uri(version))

    try:
        service = Service(KServeClient())
    except ConfigException as error:
        problem = f"EVERGREEN_PLANE is {settings.plane}, but no cluster is configured here ({error})"
        raise EvergreenError(problem, "Run in a pod with a service account, or set KUBECONFIG") from error
    return (StandardPlane if settings.plane == "standard" else KnativePlane)(service, release)
