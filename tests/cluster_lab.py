"""What the tests of cluster planes share: planes on the lab's API server, and what must be so afterwards."""

import copy
import time
from functools import cache

from kserve import KServeClient

from serving.cluster.service import Service
from serving.manifests import NAME, Release
from tests.kube_lab import KubeLab


class Watched(Service):
    """A service that calls somebody before each request and after each write, by their number."""

    def __init__(self, *args, before=None, after=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.after, self.count = before, after, 0

    def _call(self, verb, *args, **kwargs):
        self.count += 1
        if self.before:
            self.before(self.count, verb)
        done = super()._call(verb, *args, **kwargs)
        if self.after:
            self.after(self.count, verb)
        return done


def release(version):
    return Release(version, f"s3://models/{version}")


def plane(kind, lab, where=release, patience=30.0, **hooks):
    return kind(Watched(client(lab.port), timeout=0.3, **hooks), where, patience=patience, look=0.004)


@cache
def client(port):
    """One for all planes of a lab, as each brings connections of its own."""
    return KServeClient(config_dict=KubeLab.config_of(port), persist_config=False)


def start(kind, lab, version="1"):
    """A cluster on which a version serves alone."""
    plane(kind, lab).settle(version)


def uids(kserve, version):
    return {u for pods in kserve.pods.values() if pods.version == version for u in pods.uids}


def alone(lab, kserve, version):
    """That the document, the route and the pods agree on one version."""
    spec = lab.get("inferenceservices", NAME)["spec"]
    assert spec["predictor"]["model"]["storageUri"] == f"s3://models/{version}"
    assert "canary" not in spec and "canaryTrafficPercent" not in spec["predictor"]
    assert kserve.routes[-1] == {version: 100}
    assert kserve.outages == []
    assert kserve.replaced == []


def write(lab, document):
    lab.edit("inferenceservices", NAME, lambda d: d.update(spec=copy.deepcopy(document["spec"])))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()
