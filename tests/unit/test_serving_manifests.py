"""The Kubernetes documents: ours are valid, and each broken one is told with its field."""

import copy

import pytest
import yaml

from engagement.errors import EvergreenError
from serving.manifest_rules import validate
from serving.manifests import MIN_REPLICAS, NOTE, Release, knative, render, serving_runtime, standard, to_yaml

CHAMPION = ("3", "s3://models/3")


def canary(percent: int = 10) -> dict:
    return render("4", "s3://models/4", percent, CHAMPION)


RUNTIMES = [serving_runtime(), serving_runtime(mode="Knative")]
REVISIONS = [knative(Release(*CHAMPION), percent) for percent in (None, 0, 10, 100)]


@pytest.mark.parametrize("document", [*RUNTIMES, *REVISIONS, render(*CHAMPION), canary(), canary(0), canary(100)])
def test_rendered_documents_are_valid_and_survive_yaml(document):
    assert validate(document) == []
    text = to_yaml(document)
    assert list(yaml.safe_load_all(text)) == [document] and "&id" not in text


def test_canary_keeps_the_champion_and_names_the_challenger():
    spec = canary()["spec"]
    assert spec["predictor"]["name"] == "v3" and spec["predictor"]["model"]["storageUri"] == "s3://models/3"
    entry = spec["canary"][0]
    assert entry["trafficPercent"] == 10 and entry["predictor"]["name"] == "v4"
    assert entry["predictor"]["model"]["name"] == ""  # required by the schema, meaningless


def test_promotion_gives_the_stable_predictor_the_canarys_name_and_model_so_that_pods_stay():
    before, after = canary(100)["spec"]["canary"][0]["predictor"], render("4", "s3://models/4")["spec"]
    assert "canary" not in after
    assert after["predictor"]["name"] == before["name"] and after["predictor"]["model"] == before["model"]


def test_everybody_can_be_carried_by_either_version_at_every_share():
    # KServe takes ready canaries' pods off the stable predictor's, and may give a canary everybody at the next write.
    champion, challenger, standby = (Release(v, f"s3://models/{v}") for v in "345")
    for percent in (0, 1, 100):
        spec = standard(champion, [(challenger, percent), (standby, 0)])["spec"]
        canaries = [c["predictor"]["minReplicas"] for c in spec["canary"]]
        assert canaries == [MIN_REPLICAS, MIN_REPLICAS]
        assert spec["predictor"]["minReplicas"] - sum(canaries) == MIN_REPLICAS


def test_notes_on_the_service_do_not_reach_the_pods():
    for document in (canary(), REVISIONS[0]):
        assert NOTE in document["spec"]["predictor"]["annotations"]  # a predictor's own annotation wins over it


def test_knative_gets_one_port_and_standard_mode_grpc_too():
    by_mode = [{p["name"] for p in r["spec"]["containers"][0]["ports"]} for r in RUNTIMES]
    assert by_mode == [{"http1", "h2c"}, {"http1"}]
    assert "--grpc-port" not in RUNTIMES[1]["spec"]["containers"][0]["args"]


def test_pods_run_restricted_and_are_probed_on_the_models_own_readiness():
    container = serving_runtime()["spec"]["containers"][0]
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]} and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/models/homefeed-ranker/ready"
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert ":latest" not in container["image"] and ":" in container["image"]


def test_canary_without_a_champion_is_refused():
    with pytest.raises(EvergreenError, match="needs a champion"):
        render("4", "s3://models/4", 10, None)


def change(path: str, value: object = ...) -> dict:
    """A canary document with one field set, or taken away."""
    document = copy.deepcopy(canary())
    *way, last = path.split("/")
    place = document
    for part in way:
        place = place[int(part)] if part.isdigit() else place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


BROKEN = [
    ("spec/predictor/modle", {}, "spec.predictor.modle: unknown field"),
    ("spec/predictor/model/storageUrl", "s3://x", "storageUrl: unknown field"),
    ("spec/predictor/minReplicas", "2", "minReplicas: must be int"),
    ("spec/predictor/minReplicas", True, "minReplicas: must be int"),
    ("spec/predictor/model/env", {"A": "b"}, "env: must be a list"),
    ("spec/predictor/model/modelFormat", ..., "modelFormat: is required"),
    ("spec/predictor/model", [], "model: must be a mapping"),
    ("spec/predictor", ..., "predictor: is required"),
    ("spec", ..., "spec: is required"),
    ("metadata", ..., "metadata: is required"),
    ("metadata/annotations", {}, "needs the annotation"),
    ("metadata/annotations", {"serving.kserve.io/deploymentMode": "RawDeployment"}, "needs the annotation"),
    ("metadata/name", "Home Feed", "DNS label"),
    ("spec/canary/0/trafficPercent", ..., "trafficPercent: is required"),
    ("spec/canary/0/trafficPercent", 101, "within 0..100"),
    ("spec/canary/0/trafficPercent", -1, "within 0..100"),
    ("spec/canary/0/predictor/name", "v3", "names must differ"),
    ("spec/canary/0/predictor/name", ..., "name: is required"),
    ("spec/canary/0/predictor/maxReplicas", 3, "not allowed on a canary"),
    ("spec/canary/0/predictor/scaleTarget", 3, "not allowed on a canary"),
    ("spec/canary/0/predictor/minReplicas", 9, "more than the stable"),
    ("spec/canary/0/predictor/model/name", ..., "model.name: is required"),
    ("spec/predictor/canaryTrafficPercent", 10, "never together"),
    ("spec/predictor/canaryTrafficPercent", 10, "ignored in Standard mode"),
    ("spec/predictor/model/storageUri", "models:/homefeed-ranker/3", "cannot fetch"),
    ("spec/predictor/maxReplicas", 1, "do not fit together"),
]


@pytest.mark.parametrize(("path", "value", "says"), BROKEN, ids=[f"{p}={v!r}" for p, v, _ in BROKEN])
def test_broken_document_is_told_with_its_field(path, value, says):
    document = change(path, value)
    assert any(says in problem for problem in validate(document)), validate(document)
    with pytest.raises(EvergreenError):
        to_yaml(document)


def test_shares_of_two_canaries_may_not_exceed_the_whole():
    document = canary(60)
    second = copy.deepcopy(document["spec"]["canary"][0])
    second["predictor"]["name"] = "v5"
    document["spec"]["canary"].append(second)
    assert validate(document) == ["spec.canary: the shares add up to more than 100"]
    second["trafficPercent"] = 40
    assert validate(document) == []


@pytest.mark.parametrize("nonsense", [None, [], "text", {}, {"apiVersion": "v1", "kind": "Pod"}])
def test_other_things_are_no_documents_of_kserve(nonsense):
    assert len(validate(nonsense)) == 1
