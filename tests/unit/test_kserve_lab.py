"""The lab shows what goes wrong on a cluster without the care that the planes take: it can fail them."""

import pytest

from serving import manifests
from serving.cluster.knative import KnativePlane
from serving.cluster.standard import StandardPlane
from serving.manifests import NAME
from tests.cluster_lab import plane, release, start, wait_for, write
from tests.kserve_lab import KServe
from tests.kube_lab import KubeLab


@pytest.fixture(scope="module")
def started():
    with KubeLab() as lab:
        yield lab, KServe(lab)


@pytest.fixture
def lab(started):
    started[0].clear()
    started[0].call(started[1].clear)
    return started[0]


@pytest.fixture
def kserve(started, lab):
    return started[1]


def test_dropping_a_canary_with_a_share_loses_requests(lab, kserve):
    start(StandardPlane, lab)
    ours = plane(StandardPlane, lab)
    ours.open("1", "2", "salt")
    ours.split(50)
    write(lab, manifests.standard(release("1")))
    wait_for(lambda: kserve.outages)


def test_a_changed_annotation_replaces_pods_unless_the_predictor_hides_it(lab, kserve):
    start(StandardPlane, lab)
    lab.edit("inferenceservices", NAME, lambda d: d["metadata"]["annotations"].update({"another/one": "x"}))
    wait_for(lambda: kserve.replaced == ["1"])


def test_knative_gives_everybody_to_the_challenger_when_the_share_is_left_out_too_early(lab, kserve):
    start(KnativePlane, lab)
    ours = plane(KnativePlane, lab)
    ours.open("1", "2", "salt")
    ours.split(10)
    write(lab, manifests.knative(release("1")))  # the champion's version, and no share: its revision is not ready yet
    wait_for(lambda: kserve.routes[-1] == {"1": 100})
    assert {"2": 100} in kserve.routes
