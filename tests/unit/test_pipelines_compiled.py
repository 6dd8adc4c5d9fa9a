"""What only a cluster honours must stand on the compiled YAML: the local runner ignores it without a word."""

from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.compile import compile_all
from pipelines.schedule import schedule

# Read afresh each time: their inputs (the registry, the serving state) are not among their arguments.
UNCACHED = {
    "make-plan",
    "check-data",
    "register-model",
    "conclude",
    "run-canary",
    "check-serving",
    "decide-retrain",
    "refresh-features",
    "find-slot",
    "find-hour",
}
CACHED = {"build-features", "train-ranker", "judge-challenger", "check-drift"}
ON_GPU = {"train-ranker", "judge-challenger"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict]]:
    files = compile_all(tmp_path_factory.mktemp("ir"))
    return {f.stem: tuple(yaml.safe_load_all(f.read_text())) for f in files}


def _tasks(spec: dict) -> dict[str, dict]:
    """All leaf tasks of a pipeline and its nested graphs, by component name."""
    graphs = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    return {
        task["componentRef"]["name"].removeprefix("comp-"): task
        for graph in graphs
        for task in graph["tasks"].values()
        if "executorLabel" in spec["components"][task["componentRef"]["name"]]
    }


def _executors(docs: tuple[dict, dict]) -> dict[str, tuple[dict, dict]]:
    spec, platform = docs
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name.removeprefix("exec-"): (e["container"], kubernetes[name])
        for name, e in spec["deploymentSpec"]["executors"].items()
    }


@pytest.mark.parametrize("name", ["retrain", "slot", "rollout", "monitor", "refresh"])
def test_ir_is_valid_and_deterministic(name, compiled, tmp_path: Path):
    spec, platform = compiled[name]
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    for config in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    again = next(f for f in compile_all(tmp_path) if f.stem == name)
    assert tuple(yaml.safe_load_all(again.read_text())) == (spec, platform)


def test_every_step_has_limits_retries_timeout_home_and_secret(compiled):
    for name, docs in compiled.items():
        executors = _executors(docs)
        assert executors
        for step, (container, kubernetes) in executors.items():
            assert container["resources"]["memoryLimit"] > 0, (name, step)
            assert container["image"].startswith("evergreen-python:"), (name, step)
            assert "latest" not in container["image"]
            assert "pip install" not in " ".join(container["command"])
            assert int(kubernetes["activeDeadlineSeconds"]) > 0, (name, step)
            assert kubernetes["pvcMount"][0]["mountPath"] == "/evergreen"
            assert kubernetes["securityContext"]["runAsNonRoot"] is True
            secret = kubernetes["secretAsEnv"][0]
            assert {e["envVar"] for e in secret["keyToEnv"]} == {
                "MLFLOW_TRACKING_USERNAME",
                "MLFLOW_TRACKING_PASSWORD",
            }
            assert {e["envVar"] for e in kubernetes["configMapAsEnv"][0]["keyToEnv"]} >= {"EVERGREEN_HOME"}


def test_only_the_registering_step_gets_the_private_key(compiled):
    signing = []
    for docs in compiled.values():
        for step, (_, kubernetes) in _executors(docs).items():
            mounted = {s["secretName"]: s["mountPath"] for s in kubernetes["secretAsVolume"]}
            assert mounted.pop("evergreen-verifying-key") == "/etc/evergreen/keys", step
            signing += [step] if mounted else []
    assert {s.removeprefix("exec-").rstrip("-0123456789") for s in signing} == {"register-model"}


def test_only_the_deciding_step_gets_the_address_of_the_webhook_and_needs_none(compiled):
    steps = [(step, k) for docs in compiled.values() for step, (_, k) in _executors(docs).items()]
    told = [(step, s) for step, k in steps for s in k["secretAsEnv"] if s["secretName"] == "evergreen-alerts"]
    ((step, secret),) = told
    assert step == "decide-retrain" and secret["optional"] is True
    assert secret["keyToEnv"] == [{"secretKey": "url", "envVar": "EVERGREEN_ALERT_URL"}]


def test_every_step_reads_what_a_cluster_may_leave_out(compiled):
    for docs in compiled.values():
        for step, (_, kubernetes) in _executors(docs).items():
            (optional,) = (m for m in kubernetes["configMapAsEnv"] if m.get("optional"))
            names = {e["envVar"] for e in optional["keyToEnv"]}
            assert {"EVERGREEN_HOLIDAYS", "EVERGREEN_OFFLINE_STORE", "EVERGREEN_VERIFYING_KEY"} <= names, step


def test_training_and_judging_ask_for_a_gpu_and_nothing_else_does(compiled):
    for step, (container, kubernetes) in _executors(compiled["retrain"]).items():
        base = step.rstrip("-0123456789")
        if base in ON_GPU:
            assert container["resources"]["accelerator"]["resourceCount"] == "1"
            assert container["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
            assert kubernetes["tolerations"][0]["key"] == "nvidia.com/gpu"
        else:
            assert "accelerator" not in container["resources"], step


def test_cache_is_on_only_where_the_arguments_name_all_inputs(compiled):
    seen = set()
    for docs in compiled.values():
        for name, task in _tasks(docs[0]).items():
            base = name.rstrip("-0123456789")
            seen.add(base)
            assert bool(task["cachingOptions"].get("enableCache")) == (base in CACHED), name
    assert seen == UNCACHED | CACHED


def test_steps_retry_but_a_canary_is_not_repeated_blindly(compiled):
    for name, task in _tasks(compiled["retrain"][0]).items():
        retries = int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
        assert retries == (0 if name.startswith("run-canary") else 2), name


def _branches(spec: dict) -> dict[str, dict]:
    """The tasks of each branch of the graph, by its condition."""
    return {
        task["triggerPolicy"]["condition"]: spec["components"][task["componentRef"]["name"]]["dag"]["tasks"]
        for dag in (spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c))
        for task in dag["tasks"].values()
        if "triggerPolicy" in task
    }


def test_rollout_happens_only_on_promote(compiled):
    of_gate = {c: tasks for c, tasks in _branches(compiled["retrain"][0]).items() if "'promote'" in c}
    promote, other = sorted(of_gate, key=lambda c: "!(" in c)
    assert "rollout" in of_gate[promote] and "!(" not in promote
    assert "rollout" not in of_gate[other]


def test_nothing_is_trained_or_registered_on_bad_data(compiled):
    of_data = {c: tasks for c, tasks in _branches(compiled["retrain"][0]).items() if "'bad'" in c}
    bad, good = sorted(of_data, key=lambda c: "!(" in c)
    assert [t.rstrip("-0123456789") for t in of_data[bad]] == ["conclude"] and "!(" not in bad
    assert {"train-ranker", "judge-challenger", "check-drift", "register-model"} <= set(of_data[good])
    first = compiled["retrain"][0]["root"]["dag"]["tasks"]
    assert {t for t in first if not t.startswith("condition-")} == {"make-plan", "build-features", "check-data"}


@pytest.mark.parametrize("entry", schedule(), ids=lambda e: e.name)
def test_scheduled_pipeline_needs_no_parameter_for_macros_are_not_expanded(entry, compiled):
    parameters = compiled[entry.pipeline][0]["root"]["inputDefinitions"]["parameters"]
    assert parameters["as_of"]["defaultValue"] == ""
    assert all("defaultValue" in p for p in parameters.values())


@pytest.mark.parametrize("name, first", [("slot", "find-slot"), ("monitor", "find-hour"), ("refresh", "find-hour")])
def test_only_the_first_step_reads_the_empty_as_of_and_all_others_the_settled_one(name, first, compiled):
    spec = compiled[name][0]
    readers = [
        task["componentRef"]["name"].removeprefix("comp-")
        for task in spec["root"]["dag"]["tasks"].values()
        for value in task.get("inputs", {}).get("parameters", {}).values()
        if value.get("componentInputParameter") == "as_of"
    ]
    assert readers == [first]
    retrain = spec["components"].get("comp-retrain")
    if retrain:  # what it is given reaches the plan and the rollout
        assert retrain["dag"]["tasks"]["make-plan"]["inputs"]["parameters"]["as_of"] == {
            "componentInputParameter": "as_of"
        }
        (given,) = _given(spec, "comp-retrain", "as_of")
        assert given == {"componentInputParameter": "pipelinechannel--find-slot-Output"}


def _given(spec: dict, component: str, parameter: str) -> list[dict]:
    """What a component is called with, wherever it is called."""
    graphs = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    tasks = [task for graph in graphs for task in graph["tasks"].values() if task["componentRef"]["name"] == component]
    return [task["inputs"]["parameters"][parameter] for task in tasks]


def test_early_retrain_gets_the_instant_and_the_cause_that_the_decision_names(compiled):
    spec = compiled["monitor"][0]
    (as_of,), (reason,) = (_given(spec, "comp-slot", name) for name in ("as_of", "reason"))
    assert as_of == {"componentInputParameter": "pipelinechannel--decide-retrain-retrain_as_of"}
    assert reason == {"componentInputParameter": "pipelinechannel--decide-retrain-cause"}
    outputs = spec["components"]["comp-decide-retrain"]["outputDefinitions"]["parameters"]
    assert set(outputs) == {"Output", "retrain_as_of", "cause"}
