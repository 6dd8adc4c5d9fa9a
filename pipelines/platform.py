"""What only a cluster honours: resources, GPUs, secrets, volumes, timeouts, retries.

The local runner ignores all of it without a word, so `tests/unit/test_pipelines_compiled.py` asserts it on the
compiled YAML. Steps read the same environment variables in both places.
"""

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes
from kfp.dsl.structures import ResourceSpec

HOME_MOUNT = "/evergreen"
HOME_CLAIM = "evergreen-home"
SETTINGS_MAP = "evergreen-settings"
MLFLOW_SECRET = "evergreen-mlflow"  # noqa: S105 - the name of a Kubernetes secret, not a secret
REDIS_SECRET = "evergreen-redis"  # noqa: S105
ALERTS_SECRET = "evergreen-alerts"  # noqa: S105
SIGNING_SECRET, SIGNING_MOUNT = "evergreen-signing-key", "/etc/evergreen/signing"
VERIFYING_SECRET, VERIFYING_MOUNT = "evergreen-verifying-key", "/etc/evergreen/keys"
OPTIONAL = (
    "EVERGREEN_OFFLINE_STORE",
    "PYSPARK_SUBMIT_ARGS",
    "EVERGREEN_SIGNING_KEY",
    "EVERGREEN_VERIFYING_KEY",
    "EVERGREEN_HOLIDAYS",
)
GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class Needs:
    """Resources of one step on a cluster.

    Attributes:
        cpu: Cores requested.
        memory: Memory requested and limited.
        timeout_s: Seconds after which the step is ended.
        retries: Times that a failed step is tried again; every step is safe to run twice.
        gpu: GPUs of the step.
        cache: Whether a finished step may be reused for the same arguments (they include the run's name).
        signs: Whether the step signs models; it alone gets the private key.
        alerts: Whether the step tells of alerts; it alone gets the webhook's address, which may hold a secret.
    """

    cpu: str = "1"
    memory: str = "2Gi"
    timeout_s: int = 1800
    retries: int = 2
    gpu: int = 0
    cache: bool = True
    signs: bool = False
    alerts: bool = False


def on_cluster(task: Any, needs: Needs) -> Any:
    """Apply a step's needs to its task; returns the task."""
    # Not by the task's own setters: each reads the source of every frame on the stack, and every command waits 3 s.
    task.container_spec.resources = ResourceSpec(
        cpu_request=needs.cpu,
        memory_request=needs.memory,
        memory_limit=needs.memory,
        accelerator_type=GPU if needs.gpu else None,
        accelerator_count=str(needs.gpu) if needs.gpu else None,
    )
    task.set_retry(needs.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="300s")
    task.set_caching_options(needs.cache)
    if needs.gpu:
        kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="2Gi")
    kubernetes.set_timeout(task, needs.timeout_s)
    kubernetes.mount_pvc(task, pvc_name=HOME_CLAIM, mount_path=HOME_MOUNT)
    kubernetes.use_config_map_as_env(
        task,
        config_map_name=SETTINGS_MAP,
        config_map_key_to_env={
            k: k for k in ("EVERGREEN_HOME", "EVERGREEN_MLFLOW_TRACKING_URI", "EVERGREEN_RECIPE", "EVERGREEN_PLANE")
        },
    )
    kubernetes.use_secret_as_env(
        task,
        secret_name=MLFLOW_SECRET,
        secret_key_to_env={"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"},
    )
    # Who joins features, where they are served from, keys, holidays: a cluster without them says nothing of it.
    kubernetes.use_config_map_as_env(
        task,
        config_map_name=SETTINGS_MAP,
        config_map_key_to_env={k: k for k in OPTIONAL},
        optional=True,
    )
    kubernetes.use_secret_as_env(
        task, secret_name=REDIS_SECRET, secret_key_to_env={"url": "EVERGREEN_ONLINE_STORE"}, optional=True
    )
    if needs.alerts:
        kubernetes.use_secret_as_env(
            task, secret_name=ALERTS_SECRET, secret_key_to_env={"url": "EVERGREEN_ALERT_URL"}, optional=True
        )
    kubernetes.use_secret_as_volume(task, VERIFYING_SECRET, mount_path=VERIFYING_MOUNT, optional=True)
    if needs.signs:
        kubernetes.use_secret_as_volume(task, SIGNING_SECRET, mount_path=SIGNING_MOUNT, optional=True)
    # A pod's name cannot be resolved by Spark's workers, its address can.
    kubernetes.use_field_path_as_env(task, env_name="SPARK_LOCAL_HOSTNAME", field_path="status.podIP")
    kubernetes.set_security_context(task, run_as_user=10001, run_as_non_root=True)
    return task
