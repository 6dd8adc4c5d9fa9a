"""The manifests as kustomize builds them: valid, restricted, and consistent with each other and with the code."""

import copy
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import validate as validate_core

from components.base import IMAGE
from evergreen.settings import Settings
from pipelines import platform
from serving import manifest_rules, manifests
from tests.k8s_objects import K8S, build, find, pods, selects

OVERLAYS = ("kind", "production", "spark")
VERSION = "1.34"
KSERVE = "serving.kserve.io/"


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request):
    return build(K8S / "overlays" / request.param)


@pytest.fixture(scope="module")
def production():
    return build(K8S / "overlays" / "production")


@pytest.fixture(scope="module")
def kind():
    return build(K8S / "overlays" / "kind")


def containers(objects):
    return [(name, c) for name, _, spec in pods(objects) for c in spec["containers"]]


def problems(document):
    if document["apiVersion"].startswith(KSERVE):
        return manifest_rules.validate(document)
    try:
        validate_core(document, VERSION, strict=True)
    except Exception as error:
        return [str(error)]
    return []


def test_every_object_is_valid_for_its_kind(objects):
    assert {f"{o['kind']}/{o['metadata']['name']}": problems(o) for o in objects if problems(o)} == {}


@pytest.mark.parametrize(
    ("kind_", "name", "path", "value"),
    [
        ("Deployment", "mlflow", ("spec", "replica"), 2),
        ("Deployment", "mlflow", ("spec", "template", "spec", "containers", 0, "readyProbe"), {}),
        ("NetworkPolicy", "dns", ("spec", "egress", 0, "ports", 0, "protocol"), 53),
        ("PersistentVolumeClaim", "evergreen-home", ("spec", "accessModes"), "ReadWriteOnce"),
        ("ServingRuntime", "evergreen-ranker", ("spec", "containers", 0, "probe"), {}),
        ("ServingRuntime", "evergreen-ranker", ("spec", "multiModel"), "no"),
    ],
)
def test_a_mistake_is_found(production, kind_, name, path, value):
    wrong = copy.deepcopy(find(production, kind_, name))
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert problems(wrong)


def test_one_object_a_file_and_every_file_is_used():
    for directory in (K8S / "base", *(K8S / "components").iterdir(), *(K8S / "overlays" / o for o in OVERLAYS)):
        listed = yaml.safe_load((directory / "kustomization.yaml").read_text())
        used = {r for r in listed["resources"] if r.endswith(".yaml")} | {p["path"] for p in listed.get("patches", [])}
        found = {p.name for p in directory.glob("*.yaml")} - {"kustomization.yaml"}
        assert used == found, directory
        for name in found:
            documents = list(yaml.safe_load_all((directory / name).read_text()))
            assert len(documents) == 1, name


def test_names_are_unique_and_everything_is_in_the_namespace(objects):
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(names) == len(set(names))
    assert {o["metadata"].get("namespace") for o in objects if o["kind"] != "Namespace"} == {manifests.NAMESPACE}


def test_every_container_is_restricted(objects):
    for name, _, spec in pods(objects):
        for container in spec["containers"]:
            security = {**spec.get("securityContext", {}), **container["securityContext"]}
            assert security["runAsNonRoot"] is True, name
            assert security["runAsUser"] >= 1000, name
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
            mounted = {m["mountPath"] for m in container["volumeMounts"]}
            assert "/tmp" in mounted, name  # the root is read-only
            assert {"name": "HOME", "value": "/tmp"} in container["env"], name


def test_only_the_promoter_gets_a_token_and_it_may_write_inferenceservices_and_nothing_else(objects):
    for o in objects:
        if o["kind"] == "Deployment":
            name, spec = o["metadata"]["name"], o["spec"]["template"]["spec"]
            assert spec["automountServiceAccountToken"] is (name == "promoter"), name
            assert (spec["serviceAccountName"] == "promoter") is (name == "promoter"), name
        if o["kind"] == "ServiceAccount":
            assert o["automountServiceAccountToken"] is False
        assert o["kind"] not in ("ClusterRole", "ClusterRoleBinding")
    role = find(objects, "Role", "promoter")
    verbs = ["get", "list", "watch", "create", "update", "patch"]
    rule = {"apiGroups": ["serving.kserve.io"], "resources": ["inferenceservices"], "verbs": verbs}
    assert role["rules"] == [rule]
    binding = find(objects, "RoleBinding", "promoter")
    assert binding["roleRef"]["name"] == "promoter"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "promoter", "namespace": manifests.NAMESPACE}]


def test_promoter_is_alone_and_is_woken_by_mlflow_only(objects):
    deployment = find(objects, "Deployment", "promoter")["spec"]
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}
    container = deployment["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "serving.promoter"]
    plane = find(objects, "ConfigMap", platform.SETTINGS_MAP)["data"]["EVERGREEN_PLANE"]
    assert Settings(_env_file=None, plane=plane).plane == "standard"
    port = container["ports"][0]["containerPort"]
    url = next(e["value"] for e in container["env"] if e["name"] == "EVERGREEN_PROMOTER_URL")
    assert url == f"http://promoter.{manifests.NAMESPACE}.svc:{port}"
    assert find(objects, "Service", "promoter")["spec"]["ports"][0]["port"] == port
    rules = find(objects, "NetworkPolicy", "promoter")["spec"]["ingress"]
    mlflow = {"app.kubernetes.io/name": "mlflow"}
    assert rules == [{"from": [{"podSelector": {"matchLabels": mlflow}}], "ports": [{"port": port, "protocol": "TCP"}]}]
    out = find(objects, "NetworkPolicy", "mlflow")["spec"]["egress"]
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "promoter"}}}
    assert {"to": [ours], "ports": [{"port": port, "protocol": "TCP"}]} in out
    environment = find(objects, "ConfigMap", "mlflow")["data"]  # or MLflow refuses a Service's http address
    assert "http" in environment["MLFLOW_WEBHOOK_ALLOWED_SCHEMES"].split(",")
    assert environment["MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS"] == "true"


def test_who_loads_models_has_the_verifying_key_and_nobody_who_runs_here_the_signing_key(production):
    for name, _, spec in pods(production):
        secrets = {v["secret"]["secretName"]: v["name"] for v in spec["volumes"] if "secret" in v}
        assert "evergreen-signing-key" not in str(spec), name
        if name in ("promoter", manifests.RUNTIME):
            container = spec["containers"][0]
            mount = next(m for m in container["volumeMounts"] if m["name"] == secrets[manifests.KEY_SECRET])
            assert mount["readOnly"] is True and mount["mountPath"] == manifests.KEY_MOUNT
            key = {"name": "EVERGREEN_VERIFYING_KEY", "value": f"{manifests.KEY_MOUNT}/{manifests.KEY_FILE}"}
            assert key in container["env"], name
        else:
            assert not secrets, name


def test_ranker_writes_its_log_into_the_home_and_nothing_else(objects):
    container = find(objects, "ServingRuntime", manifests.RUNTIME)["spec"]["containers"][0]
    home = {m["mountPath"]: m for m in container["volumeMounts"] if m["name"] == "home"}
    log = f"{platform.HOME_MOUNT}/{manifests.LOG}"
    assert set(home) == {platform.HOME_MOUNT, log}
    assert home[platform.HOME_MOUNT]["readOnly"] is True
    assert home[log]["subPath"] == manifests.LOG and not home[log].get("readOnly")
    assert Path(log).parent == Settings(home=Path(platform.HOME_MOUNT)).serving


def test_every_container_asks_for_resources_and_is_probed(objects):
    for name, container in containers(objects):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name
        ports = {p["name"] for p in container["ports"]} | {p["containerPort"] for p in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert (container[probe].get("httpGet") or container[probe]["tcpSocket"])["port"] in ports, name


def test_images_are_ours_and_pinned(objects):
    tag = IMAGE.rpartition(":")[2]
    assert tag not in ("", "latest")
    assert {c["image"].rpartition("/")[2] for _, c in containers(objects)} == {IMAGE}


def test_secrets_are_named_never_written(objects):
    assert not [o for o in objects if o["kind"] == "Secret"]
    for name, container in containers(objects):
        for variable in container["env"]:
            if any(word in variable["name"] for word in ("SECRET", "PASSWORD", "TOKEN", "KEY")):
                if "valueFrom" not in variable:  # or a file of a mounted secret
                    mounts = [m["mountPath"] for m in container["volumeMounts"]]
                    assert any(variable["value"].startswith(f"{m}/") for m in mounts), (name, variable["name"])
                    assert variable["value"].endswith(".pem"), (name, variable["name"])
                    continue
                assert {"name", "key"} <= set(variable["valueFrom"]["secretKeyRef"])
    for o in objects:
        if o["kind"] == "ConfigMap":
            assert not [v for v in o["data"].values() if "://" in v and "@" in v], o["metadata"]["name"]


def test_kind_needs_no_secret(kind):
    references = [v["valueFrom"]["secretKeyRef"] for _, c in containers(kind) for v in c["env"] if "valueFrom" in v]
    assert references
    assert all(r.get("optional") for r in references)
    assert not [v for _, _, spec in pods(kind) for v in spec["volumes"] if "secret" in v]


def test_references_between_objects_exist(objects):
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for name, _, spec in pods(objects):
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", spec["serviceAccountName"]) in names, name
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names, name
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in names, name
            volumes = {v["name"] for v in spec["volumes"]}
            assert {m["name"] for m in container["volumeMounts"]} <= volumes, name


def test_services_and_policies_meet_the_ports_of_their_pods(objects):
    running = list(pods(objects))
    for o in objects:
        if o["kind"] == "Service":
            hit = [spec for _, labels, spec in running if o["spec"]["selector"].items() <= labels.items()]
            assert len(hit) == 1, o["metadata"]["name"]
            named = {p["name"] for p in hit[0]["containers"][0]["ports"]}
            assert {p["targetPort"] for p in o["spec"]["ports"]} <= named
        if o["kind"] == "PodDisruptionBudget":
            assert [n for n, labels, _ in running if selects(o["spec"]["selector"], labels)]


def test_nothing_is_reachable_but_what_a_policy_opens(objects):
    policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
    deny = find(policies, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, labels, spec in pods(objects):
        own = [p["spec"] for p in policies if p["spec"]["podSelector"] and selects(p["spec"]["podSelector"], labels)]
        opened = {port["port"] for p in own for rule in p.get("ingress", []) for port in rule["ports"]}
        assert opened == {p["containerPort"] for p in spec["containers"][0]["ports"]}, name
        assert all("from" in rule for p in own for rule in p.get("ingress", [])), name
    for policy in policies:
        for rule in policy["spec"].get("egress", []):
            for to in rule.get("to", []):
                if "ipBlock" in to:
                    assert "169.254.0.0/16" in to["ipBlock"]["except"], policy["metadata"]["name"]
    own = find(policies, "NetworkPolicy", "ranker")["spec"]["podSelector"]
    assert selects(own, {"serving.kserve.io/inferenceservice": manifests.NAME})


def test_mlflow_answers_to_the_name_that_the_steps_use(objects):
    settings = find(objects, "ConfigMap", platform.SETTINGS_MAP)["data"]
    host = settings["EVERGREEN_MLFLOW_TRACKING_URI"].removeprefix("http://")
    service = find(objects, "Service", "mlflow")
    assert host == f"mlflow.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    args = dict(
        a.split("=", 1)
        for a in find(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    assert host.partition(":")[0] + ":*" in args["--allowed-hosts"].split(",")
    assert int(args["--port"]) == service["spec"]["ports"][0]["port"]


def test_names_that_the_pipeline_steps_rely_on_exist(objects):
    claim = find(objects, "PersistentVolumeClaim", platform.HOME_CLAIM)
    settings = find(objects, "ConfigMap", platform.SETTINGS_MAP)["data"]
    assert claim
    assert settings["EVERGREEN_HOME"] == platform.HOME_MOUNT
    needed = {"EVERGREEN_HOME", "EVERGREEN_MLFLOW_TRACKING_URI", "EVERGREEN_RECIPE", "EVERGREEN_PLANE"}
    assert set(settings) - set(platform.OPTIONAL) == needed
    assert Settings(_env_file=None).model_name == manifests.NAME


def test_keys_are_looked_for_where_the_steps_mount_them(production):
    settings = find(production, "ConfigMap", platform.SETTINGS_MAP)["data"]
    assert Path(settings["EVERGREEN_SIGNING_KEY"]).parent == Path(platform.SIGNING_MOUNT)
    assert Path(settings["EVERGREEN_VERIFYING_KEY"]).parent == Path(platform.VERIFYING_MOUNT)


def test_evidently_serves_the_workspace_of_the_home(objects):
    container = find(objects, "Deployment", "evidently")["spec"]["template"]["spec"]["containers"][0]
    home = Settings(home=Path(platform.HOME_MOUNT))
    assert f"--workspace={home.evidently}" in container["args"]
    assert {"name": "home", "mountPath": platform.HOME_MOUNT} in container["volumeMounts"]


def test_ranker_runtime_is_the_one_that_the_code_renders():
    rendered = manifests.serving_runtime()
    base = find(build(K8S / "base"), "ServingRuntime", manifests.RUNTIME)
    assert base == rendered


def test_stream_consumers_read_kafka_by_a_secret_and_write_into_the_home(production):
    spec = find(production, "Deployment", "stream")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    assert container["command"] == ["evergreen", "stream"]
    source, metrics = container["args"]
    assert source.startswith("kafka://")
    assert "@" not in source
    assert metrics == f"--metrics=0.0.0.0:{container['ports'][0]['containerPort']}"
    secrets = {v["name"] for v in container["env"] if "secretKeyRef" in v.get("valueFrom", {})}
    assert secrets == {"KAFKA_USERNAME", "KAFKA_PASSWORD", "EVERGREEN_ONLINE_STORE"}  # as the code reads them
    assert {"name": "home", "mountPath": platform.HOME_MOUNT} in container["volumeMounts"]


def test_production_differs_where_it_must(kind, production):
    runtime = find(production, "ServingRuntime", "evergreen-ranker")["spec"]
    assert runtime["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert runtime["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nodeSelector" not in find(kind, "ServingRuntime", "evergreen-ranker")["spec"]
    claim = find(production, "PersistentVolumeClaim", "evergreen-home")["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]
    for budget in (o for o in production if o["kind"] == "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1
    assert find(production, "Deployment", "mlflow")["spec"]["replicas"] > 1  # or the budget would block a drain
    assert manifests.MIN_REPLICAS > 1


def test_spark_overlay_switches_steps_and_ranker_and_keeps_passwords_in_secrets():
    spark = build(K8S / "overlays" / "spark")
    settings = find(spark, "ConfigMap", platform.SETTINGS_MAP)["data"]
    assert Settings(_env_file=None, offline_store=settings["EVERGREEN_OFFLINE_STORE"]).offline_store == "spark"
    service = find(spark, "Service", "spark-master")
    submit = settings["PYSPARK_SUBMIT_ARGS"].split()
    assert submit[-1] == "pyspark-shell"
    assert f"spark://spark-master:{service['spec']['ports'][0]['port']}" in submit
    driver = {int(a.split("=")[1]) for a in submit if ".port=" in a}
    rules = find(spark, "NetworkPolicy", "spark-steps")["spec"]["ingress"]
    assert {p["port"] for r in rules for p in r["ports"]} == driver
    ranker = find(spark, "ServingRuntime", "evergreen-ranker")["spec"]["containers"][0]["env"]
    url = next(e for e in ranker if e["name"] == "EVERGREEN_ONLINE_STORE")
    assert url["valueFrom"]["secretKeyRef"]["name"] == platform.REDIS_SECRET
    worker = find(spark, "Deployment", "spark-worker")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "home", "mountPath": platform.HOME_MOUNT} in worker["volumeMounts"]


def test_dockerfile_installs_the_lock_and_runs_unprivileged():
    lines = (K8S.parent / "Dockerfile").read_text().splitlines()
    user = next(line for line in lines if line.startswith("USER "))
    assert int(user.split()[1].split(":")[0]) >= 1000
    assert any("requirements.lock" in line and line.startswith("RUN") for line in lines)
    assert lines.index(user) > max(i for i, line in enumerate(lines) if line.startswith("RUN"))
