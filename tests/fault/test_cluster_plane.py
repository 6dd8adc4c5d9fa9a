"""Rollouts on a cluster: each write may fail, be lost or be outrun, and the cluster ends where it should."""

import pytest
from kserve import KServeClient

from engagement.errors import EvergreenError
from serving.cluster.knative import KnativePlane
from serving.cluster.plane import Superseded
from serving.cluster.service import Service
from serving.cluster.standard import StandardPlane
from serving.manifests import MIN_REPLICAS, NAME, Release
from serving.plane import Serving, Unfit
from tests.cluster_lab import alone, plane, release, start, uids
from tests.kserve_lab import KServe
from tests.kube_lab import FAULTS, KubeLab

PLANES = [StandardPlane, KnativePlane]
STAGES = (0, 1, 10, 50, 100)


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


@pytest.mark.parametrize("kind", PLANES)
def test_whole_rollout_widens_stage_by_stage_and_promotes_without_restarting_a_pod(kind, lab, kserve):
    start(kind, lab)
    ours = plane(kind, lab)
    ours.open("1", "2", "salt")
    assert kserve.routes[-1] == {"1": 100}  # dark
    for percent in STAGES:
        ours.split(percent)
        assert ours.serving() == plane(kind, lab).serving() == Serving("1", "2", percent)
        assert kserve.routes[-1].get("2", 0) == percent
    before = uids(kserve, "2")
    ours.settle("2")
    assert plane(kind, lab).serving() == Serving("2")
    alone(lab, kserve, "2")
    assert len(before) == MIN_REPLICAS and uids(kserve, "2") == before
    assert kserve.least["1"] >= MIN_REPLICAS and kserve.least["2"] >= MIN_REPLICAS


@pytest.mark.parametrize("kind", PLANES)
@pytest.mark.parametrize("stage", STAGES)
def test_rollback_from_any_stage_gives_the_challenger_nobody_any_more(kind, stage, lab, kserve):
    start(kind, lab)
    ours = plane(kind, lab)
    ours.open("1", "2", "salt")
    ours.split(stage)
    exposed = len(kserve.routes)
    ours.settle("1")
    alone(lab, kserve, "1")
    assert all("2" not in shares for shares in kserve.routes[exposed:])  # not for a moment, on the way back
    assert plane(kind, lab).serving() == Serving("1")


@pytest.mark.parametrize("kind", PLANES)
def test_first_model_is_served_beside_nobody_and_taken_away_whole(kind, lab, kserve):
    ours = plane(kind, lab)
    doors = ours.open("", "1", "salt")
    assert doors.champion == "" and doors.challenger
    ours.split(100)
    assert ours.serving() == Serving("", "1", 100)
    ours.settle("")
    assert ours.serving() == Serving() and not kserve.pods
    ours.open("", "2", "salt")
    ours.settle("2")
    alone(lab, kserve, "2")


def test_standby_keeps_its_pods_and_the_way_back_is_one_renaming(lab, kserve):
    start(StandardPlane, lab)
    ours = plane(StandardPlane, lab)
    ours.open("1", "2", "salt")
    ours.split(100)
    champion = uids(kserve, "1")
    ours.settle("2", standby="1")
    warm = uids(kserve, "1")
    assert warm and warm <= champion and ours.serving() == Serving("2")
    plane(StandardPlane, lab).settle("1")
    alone(lab, kserve, "1")
    assert uids(kserve, "1") & warm
    assert kserve.least["1"] >= MIN_REPLICAS  # it can carry everybody at once


def test_standby_whose_files_are_gone_does_not_keep_the_champion_from_serving(lab, kserve):
    def where(version):
        if version == "0":
            raise EvergreenError("the files of version 0 are gone")
        return release(version)

    plane(StandardPlane, lab, where).settle("1", standby="0")
    alone(lab, kserve, "1")


@pytest.mark.parametrize("kind", PLANES)
def test_a_version_that_does_not_run_serves_only_when_it_is_ready(kind, lab, kserve):
    start(kind, lab, "1")
    plane(kind, lab).settle("7")  # no rollout: a person's `rollback` to a version without pods
    alone(lab, kserve, "7")
    lab.call(lambda: kserve.broken.add("8"))
    with pytest.raises(EvergreenError, match="v8 is not ready") as told:
        plane(kind, lab, patience=0.8).settle("8")
    assert not isinstance(told.value, Unfit)
    assert kserve.routes[-1] == {"7": 100} and kserve.outages == []
    plane(kind, lab).settle("7")
    alone(lab, kserve, "7")


@pytest.mark.parametrize("kind", PLANES)
def test_challenger_that_fails_for_good_is_unfit_at_once_and_says_why(kind, lab, kserve):
    start(kind, lab)
    info = {"reason": "ModelLoadFailed", "message": "the signature\nis not valid", "exitCode": 1}
    lab.call(lambda: (kserve.broken.add("2"), kserve.failures.update({"2": info})))
    with pytest.raises(Unfit, match="v2 cannot be served: .*the signature is not valid") as told:
        plane(kind, lab, patience=60).open("1", "2", "salt")
    assert "\n" not in str(told.value)
    plane(kind, lab).settle("1")
    alone(lab, kserve, "1")
    assert all("2" not in shares for shares in kserve.routes)


def test_challenger_that_never_becomes_ready_is_unfit_when_patience_ends(lab, kserve):
    start(StandardPlane, lab)
    lab.call(lambda: kserve.broken.add("2"))
    with pytest.raises(Unfit, match="CanariesNotReady"):  # although `Ready` is True
        plane(StandardPlane, lab, patience=0.8).open("1", "2", "salt")
    assert lab.get("inferenceservices", NAME)["status"]["conditions"][1] | {} == {
        "type": "Ready",
        "status": "True",
        "reason": "",
        "message": "",
    }


def test_first_model_that_cannot_be_served_is_unfit(lab, kserve):
    lab.call(lambda: kserve.broken.add("1"))
    with pytest.raises(Unfit, match="v1"):
        plane(StandardPlane, lab, patience=0.8).open("", "1", "salt")


def rollout(kind, lab, promoted):
    ours = plane(kind, lab)
    ours.open("1", "2", "salt")
    ours.split(50)
    ours.settle("2" if promoted else "1")


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(StandardPlane, fault) for fault in FAULTS] + [(KnativePlane, fault) for fault in ("conflict", "error", "lost")],
)
def test_any_request_may_fail_in_any_way_and_the_rollout_ends_the_same(kind, fault, lab, kserve):
    request, hit = 1, True
    while hit:
        lab.clear()
        lab.call(kserve.clear)
        start(kind, lab)
        promoted = bool(request % 2)
        before = lab.requests
        lab.fail(request, fault)
        rollout(kind, lab, promoted)
        hit = lab.requests - before >= request
        alone(lab, kserve, "2" if promoted else "1")
        request += 1
    assert request > 8


class Killed(BaseException):
    """The controller's process ends here."""


@pytest.mark.parametrize("kind", PLANES)
def test_killed_before_or_after_any_request_the_next_controller_settles_it(kind, lab, kserve):
    def at(number):
        def die(count, verb):
            if count == number:
                raise Killed

        return die

    request, killed = 1, True
    while killed:
        for moment, champion in (("before", "12"[request % 2]), ("after", "21"[request % 2])):
            lab.clear()
            lab.call(kserve.clear)
            start(kind, lab)
            ours = plane(kind, lab, **{moment: at(request)})
            killed = False
            try:
                ours.open("1", "2", "salt")
                ours.split(10)
                ours.settle(champion)
            except Killed:
                killed = True
            plane(kind, lab).settle(champion)
            alone(lab, kserve, champion)
        request += 1
    assert request > 8


@pytest.mark.parametrize("kind", PLANES)
def test_restarted_api_server_and_silent_watches_hold_nothing_up(kind, lab, kserve):
    start(kind, lab)
    lab.silent_watches = True
    ours = plane(kind, lab, before=lambda count, verb: lab.restart() if count % 3 == 0 else None)
    ours.open("1", "2", "salt")
    ours.split(50)
    ours.settle("2")
    alone(lab, kserve, "2")


def test_api_server_that_stays_away_is_no_fault_of_the_challenger(lab, kserve):
    start(StandardPlane, lab)
    for request in range(1, 200):
        lab.fail(request, "error")
    with pytest.raises(EvergreenError, match="answers 500.*leader changed") as told:
        plane(StandardPlane, lab, patience=0.1).open("1", "2", "salt")
    assert not isinstance(told.value, Unfit)


@pytest.mark.parametrize("kind", PLANES)
def test_a_controller_that_was_superseded_stops_and_settles_nothing(kind, lab, kserve):
    start(kind, lab)
    old, new = plane(kind, lab), plane(kind, lab)
    old.open("1", "2", "salt")
    new.open("1", "2", "salt")  # the same rollout, taken up elsewhere
    for call in (lambda: old.split(50), lambda: old.settle("1"), lambda: old.settle("2")):
        with pytest.raises(Superseded):
            call()
    assert new.serving() == Serving("1", "2", 0)
    new.split(10)
    new.settle("2")
    alone(lab, kserve, "2")


@pytest.mark.parametrize("kind", PLANES)
def test_write_that_a_superseded_controller_had_on_the_way_is_refused(kind, lab, kserve):
    start(kind, lab)
    new = plane(kind, lab)
    taken = []

    def overtake(count, verb):
        if verb == "replace" and len(taken) == 1:  # between reading and writing its share
            new.open("1", "2", "salt")
        taken.extend([count] * (verb == "replace"))

    old = plane(kind, lab, before=overtake)
    old.open("1", "2", "salt")
    with pytest.raises(Superseded):
        old.split(50)
    assert new.serving() == Serving("1", "2", 0)
    assert all(shares.get("2", 0) == 0 for shares in kserve.routes)


@pytest.mark.parametrize("kind", PLANES)
def test_what_others_add_stays_and_what_they_turn_is_turned_back(kind, lab, kserve):
    start(kind, lab)
    ours = plane(kind, lab)
    ours.open("1", "2", "salt")

    def edit(document):
        document["metadata"]["finalizers"] = ["inferenceservice.finalizers"]
        document["metadata"]["labels"]["team"] = "homefeed"
        document["spec"]["predictor"]["schedulerName"] = "bin-packer"
        if kind is StandardPlane:
            document["spec"]["canary"][0]["trafficPercent"] = 77
        else:
            document["spec"]["predictor"]["canaryTrafficPercent"] = 77

    lab.edit("inferenceservices", NAME, edit)
    ours.split(10)
    assert ours.serving() == Serving("1", "2", 10)
    ours.settle("2")
    document = lab.get("inferenceservices", NAME)
    assert document["metadata"]["finalizers"] == ["inferenceservice.finalizers"]
    assert document["metadata"]["labels"]["team"] == "homefeed"
    assert document["spec"]["predictor"]["schedulerName"] == "bin-packer"


@pytest.mark.parametrize("kind", PLANES)
def test_calls_are_idempotent_and_write_only_what_differs(kind, lab, kserve):
    start(kind, lab)
    ours = plane(kind, lab)
    for call in (lambda: ours.open("1", "2", "salt"), lambda: ours.split(10), lambda: ours.settle("2")):
        call()
        before = lab.get("inferenceservices", NAME)["metadata"]
        call()
        assert lab.get("inferenceservices", NAME)["metadata"] == before
    assert ours.serving() == Serving("2")


@pytest.mark.parametrize("kind", PLANES)
def test_document_that_the_webhook_refuses_is_told_in_one_line(kind, lab, kserve):
    start(kind, lab)
    ours = plane(kind, lab, where=lambda v: Release(v, f"models:/homefeed-ranker/{v}"))
    with pytest.raises(
        EvergreenError, match=r"422.*storageUri: KServe cannot fetch 'models:/homefeed-ranker/2'"
    ) as told:
        ours.open("1", "2", "salt")
    assert "\n" not in str(told.value) and not isinstance(told.value, Unfit)
    assert plane(kind, lab).serving() == Serving("1")


def test_split_without_a_rollout_is_refused(lab, kserve):
    with pytest.raises(EvergreenError, match="no rollout is open"):
        plane(StandardPlane, lab).split(10)


def test_doors_are_each_versions_own_service_and_can_be_resolved(lab, kserve):
    start(StandardPlane, lab)
    client = KServeClient(config_dict=lab.config, persist_config=False)
    doors = StandardPlane(
        Service(client), release, lambda url: url.replace("svc.cluster.local", "test"), look=0.01
    ).open("1", "2", "salt")
    assert doors.gateway == f"http://{NAME}-evergreen.example.com"
    assert doors.champion == f"http://{NAME}-v1-predictor.evergreen.test"
    assert doors.challenger == f"http://{NAME}-v2-predictor.evergreen.test"
