"""The tests' API server behaves as Kubernetes does, to KServe's client and to kubectl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kserve import (
    KServeClient,
    V1beta1InferenceService,
    V1beta1InferenceServiceSpec,
    V1beta1ModelFormat,
    V1beta1ModelSpec,
    V1beta1PredictorSpec,
)
from kubernetes import client, watch
from urllib3.exceptions import HTTPError

from serving import manifests
from serving.manifests import NAME, Release, render, serving_runtime, standard, to_yaml
from tests.kserve_lab import KServe
from tests.kube_lab import KubeLab

CANARY = render("2", "s3://models/2", 10, ("1", "s3://models/1"))
SPACE = "evergreen"


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
def kserve(lab):
    return KServeClient(config_dict=lab.config, persist_config=False)


def document(spec=None):
    return V1beta1InferenceService(
        api_version=CANARY["apiVersion"],
        kind=CANARY["kind"],
        metadata=client.V1ObjectMeta(**{k: CANARY["metadata"][k] for k in ("name", "namespace", "annotations")}),
        spec=CANARY["spec"] if spec is None else spec,
    )


def code(call):
    with pytest.raises(RuntimeError) as told:
        call()
    return told.value.__context__.status


def test_kserve_client_creates_reads_replaces_and_deletes(lab, kserve):
    made = kserve.create(document(), namespace=SPACE)["metadata"]
    assert made["generation"] == 1 and made["uid"] and made["resourceVersion"]
    assert code(lambda: kserve.create(document(), namespace=SPACE)) == 409
    assert kserve.get(namespace=SPACE)["kind"] == "InferenceServiceList"
    changed = kserve.replace(NAME, document(render("2", "s3://models/2")["spec"]), namespace=SPACE)
    assert "canary" not in changed["spec"]
    assert changed["metadata"]["generation"] == 2 and changed["metadata"]["uid"] == made["uid"]
    kserve.delete(NAME, namespace=SPACE)
    assert code(lambda: kserve.get(NAME, namespace=SPACE)) == 404


def test_patch_leaves_what_it_does_not_name_and_null_deletes(lab, kserve):
    kserve.create(document(), namespace=SPACE)
    model = V1beta1ModelSpec(name="", model_format=V1beta1ModelFormat(name="evergreen-bundle"), storage_uri="s3://x/3")
    spec = V1beta1InferenceServiceSpec(predictor=V1beta1PredictorSpec(model=model))
    patched = kserve.patch(NAME, document(spec), namespace=SPACE)
    assert patched["spec"]["canary"] == CANARY["spec"]["canary"]  # the trap: nobody is told that it is still there
    assert patched["spec"]["predictor"]["model"]["storageUri"] == "s3://x/3"
    path = ("serving.kserve.io", "v1beta1", SPACE, "inferenceservices", NAME)
    without = kserve.api_instance.patch_namespaced_custom_object(*path, {"spec": {"canary": None}})
    assert "canary" not in without["spec"]


def test_stale_write_conflicts_and_status_moves_no_generation(lab, kserve):
    kserve.create(document(), namespace=SPACE)
    read = kserve.get(NAME, namespace=SPACE)["metadata"]
    lab.edit("inferenceservices", NAME, lambda d: d["metadata"].setdefault("labels", {}).update(by="somebody"))
    late = document(render("2", "s3://models/2")["spec"])
    late.metadata.resource_version = read["resourceVersion"]
    assert code(lambda: kserve.replace(NAME, late, namespace=SPACE)) == 409
    kserve.wait_isvc_ready(NAME, namespace=SPACE, timeout_seconds=5, polling_interval=0.05)
    after = kserve.get(NAME, namespace=SPACE)
    assert after["status"]["conditions"] and after["metadata"]["generation"] == read["generation"]
    assert after["metadata"]["resourceVersion"] > read["resourceVersion"]


def test_webhooks_rules_answer_422(lab, kserve):
    wrong = standard(Release("1", "s3://models/1"), [(Release("1", "s3://models/1"), 10)])
    assert code(lambda: kserve.create(document(wrong["spec"]), namespace=SPACE)) == 422


def test_watch_tells_every_change_and_ends_with_the_servers_restart(lab, kserve):
    listing = kserve.get(namespace=SPACE)
    stream = watch.Watch().stream(
        kserve.api_instance.list_namespaced_custom_object,
        "serving.kserve.io",
        "v1beta1",
        SPACE,
        "inferenceservices",
        resource_version=listing["metadata"]["resourceVersion"],
        timeout_seconds=5,
    )
    kserve.create(document(), namespace=SPACE)
    first = next(stream)
    assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", NAME)
    assert next(stream)["type"] == "MODIFIED"  # the controller's status
    lab.restart()
    with pytest.raises(HTTPError):
        for _ in range(100):
            next(stream)


def test_fault_hits_the_request_that_it_is_ordered_for(lab, kserve):
    kserve.create(document(), namespace=SPACE)
    lab.fail(2, "busy")
    kserve.get(NAME, namespace=SPACE)
    kserve.api_instance.api_client.rest_client.pool_manager.connection_pool_kw["retries"] = False
    with pytest.raises(RuntimeError) as told:
        kserve.get(NAME, namespace=SPACE)
    assert told.value.__context__.status == 429 and told.value.__context__.headers["Retry-After"] == "0"
    kserve.get(NAME, namespace=SPACE)


@pytest.fixture
def kubectl(lab, tmp_path):
    config = tmp_path / "config"
    config.write_text(json.dumps(lab.config))

    def run(*words, text=None, fails=False):
        command = [Path(sys.executable).parent / "kubectl", f"--kubeconfig={config}", f"--cache-dir={tmp_path}", *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stdout or done.stderr

    return run


def test_kubectl_applies_waits_for_patches_and_deletes_what_we_render(lab, kubectl):
    text = to_yaml(serving_runtime(), CANARY)
    assert "created" in kubectl("apply", "--validate=false", "-f", "-", text=text)
    kubectl(
        "wait", "--for=condition=CanaryPredictorReady", f"isvc/{NAME}", "--timeout=20s", fails=True
    )  # no short name
    kubectl("wait", "--for=condition=CanaryPredictorReady", f"inferenceservice/{NAME}", "--timeout=20s")
    assert "unchanged" in kubectl("apply", "--validate=false", "-f", "-", text=text)
    got = json.loads(kubectl("get", "inferenceservice", NAME, "-o", "json"))
    assert got["spec"] == CANARY["spec"]
    wider = [{"op": "replace", "path": "/spec/canary/0/trafficPercent", "value": 50}]
    kubectl("patch", "inferenceservice", NAME, "--type=json", "-p", json.dumps(wider))
    shown = "--for=jsonpath={.status.canaryStatuses[0].trafficPercent}=50"
    kubectl("wait", shown, f"inferenceservice/{NAME}", "--timeout=20s")
    refused = kubectl(
        "patch", "inferenceservice", NAME, "--type=merge", "-p", '{"spec":{"predictor":{"nmae":"x"}}}', fails=True
    )
    assert "spec.predictor.nmae: unknown field" in refused
    # An apply of the document without the entry takes it away: kubectl knows what it applied last.
    kubectl("apply", "--validate=false", "-f", "-", text=to_yaml(render("2", "s3://models/2")))
    assert "canary" not in lab.get("inferenceservices", NAME)["spec"]
    kubectl("delete", "inferenceservice", NAME, "--timeout=20s")
    assert lab.get("inferenceservices", NAME) is None
    assert manifests.RUNTIME in kubectl("get", "servingruntimes")
