"""The manifests as kustomize builds them, and how to find one's way in them."""

import subprocess
import sys
from pathlib import Path

import yaml

from serving import manifests

K8S = Path(__file__).parents[1] / "k8s"


def build(directory):
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # deprecation warnings
    return list(yaml.safe_load_all(done.stdout))


def find(objects, kind, name):
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


def pods(objects):
    """(name, labels, pod spec) of everything that runs."""
    for o in objects:
        if o["kind"] == "Deployment":
            yield o["metadata"]["name"], o["spec"]["template"]["metadata"]["labels"], o["spec"]["template"]["spec"]
        elif o["kind"] == "ServingRuntime":  # KServe labels its pods with the InferenceService
            yield o["metadata"]["name"], {"serving.kserve.io/inferenceservice": manifests.NAME}, o["spec"]


def selects(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items() and "matchExpressions" not in selector
