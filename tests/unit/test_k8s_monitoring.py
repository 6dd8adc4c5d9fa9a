"""What the cluster's Prometheus and Grafana get: the laptop's own rules and dashboard, and a way to every figure."""

import re

import pytest
import yaml

from evergreen.settings import Settings
from pipelines import platform
from serving import manifests
from tests.k8s_objects import K8S, build, find, pods, selects


@pytest.fixture(scope="module", params=["kind", "production"])
def objects(request):
    return build(K8S / "overlays" / request.param)


@pytest.fixture(scope="module")
def production():
    return build(K8S / "overlays" / "production")


def test_exporter_only_reads_the_home_and_only_prometheus_may_ask_it(objects):
    container = find(objects, "Deployment", "metrics")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "monitoring.exporter"]
    assert {"name": "home", "mountPath": platform.HOME_MOUNT, "readOnly": True} in container["volumeMounts"]
    port = container["ports"][0]["containerPort"]
    assert port == Settings(_env_file=None).metrics_port
    assert {"name": "EVERGREEN_METRICS_HOST", "value": "0.0.0.0"} in container["env"]
    prometheus = [{"namespaceSelector": {"matchLabels": {"evergreen/monitoring": "true"}}}]
    policy = find(objects, "NetworkPolicy", "metrics")["spec"]
    assert policy["ingress"] == [{"from": prometheus, "ports": [{"port": port, "protocol": "TCP"}]}]
    assert policy["egress"] == []


def test_rules_and_dashboard_of_the_cluster_are_the_files_of_the_laptop(objects):
    monitoring = K8S.parent / "monitoring"
    rules = find(objects, "ConfigMap", "evergreen-prometheus")["data"]
    assert rules == {
        n: (monitoring / "prometheus" / n).read_text() for n in ("recording.yaml", "alerts.yaml", "scrape.yaml")
    }
    shown = find(objects, "ConfigMap", "evergreen-dashboard")
    assert shown["data"] == {"evergreen.json": (monitoring / "grafana" / "dashboard.json").read_text()}
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_prometheus_finds_every_pod_that_tells_figures_and_may_reach_it(production):
    scraped = yaml.safe_load(find(production, "ConfigMap", "evergreen-prometheus")["data"]["scrape.yaml"])[
        "scrape_configs"
    ]
    kept = {job["job_name"]: re.compile(job["relabel_configs"][0]["regex"]) for job in scraped}
    found = set()
    for name, labels, spec in pods(production):
        for port in spec["containers"][0]["ports"]:
            ours = f"{labels.get('app.kubernetes.io/name')};{port['name']}"
            ranker = f"{labels.get('serving.kserve.io/inferenceservice')};{port['containerPort']}"
            if kept["evergreen"].fullmatch(ours) or kept["ranker"].fullmatch(ranker):
                found.add((name, port["containerPort"]))
    assert found == {("metrics", 8070), ("promoter", 8090), ("stream", 9400), (manifests.RUNTIME, 8080)}
    for job in scraped:
        assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == [manifests.NAMESPACE]
    labels = {name: labels for name, labels, _ in pods(production)}
    prometheus = {"namespaceSelector": {"matchLabels": {"evergreen/monitoring": "true"}}}
    rules = [
        (o["spec"]["podSelector"], rule)
        for o in production
        if o["kind"] == "NetworkPolicy"
        for rule in o["spec"].get("ingress", [])
    ]
    for name, port in found:
        let_in = [rule for selector, rule in rules if selects(selector, labels[name]) and prometheus in rule["from"]]
        assert port in {p["port"] for rule in let_in for p in rule["ports"]}, name
