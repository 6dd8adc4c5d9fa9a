"""What only a cluster honours must stand on the compiled YAML: the local runner ignores it without a word."""

from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.compile import compile_all

# Read afresh each time: their inputs (the registry, the serving state) are not among their arguments.
UNCACHED = {
    "make-plan",
    "register-model",
    "conclude",
    "run-canary",
    "check-serving",
    "decide-retrain",
    "refresh-features",
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


@pytest.mark.parametrize("name", ["retrain", "rollout", "monitor", "refresh"])
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


def test_rollout_happens_only_on_promote(compiled):
    spec = compiled["retrain"][0]
    branches = {
        task["triggerPolicy"]["condition"]: task["componentRef"]["name"]
        for c in spec["components"].values()
        if "dag" in c
        for task in c["dag"]["tasks"].values()
        if "triggerPolicy" in task
    }
    promote = next(c for c in branches if "== 'promote'" in c and "!(" not in c)
    tasks = spec["components"][branches[promote]]["dag"]["tasks"]
    assert "rollout" in tasks
    other = next(c for c in branches if c != promote)
    assert "rollout" not in spec["components"][branches[other]]["dag"]["tasks"]
