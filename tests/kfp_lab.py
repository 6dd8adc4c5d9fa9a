"""A Kubeflow Pipelines API (v2beta1) on loopback: what `evergreen schedule apply` asks of it, with a memory.

Bodies are read by the models of `kfp_server_api`, the client that is generated from Kubeflow's own description. It
answers as Kubeflow does (state in `status` and `mode`, no `runtime_config` without parameters, numbers as text, lists
in pages), and it is stricter in one thing: a cron line must have its six fields, which Kubeflow does not check.
"""

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml

_FIELDS = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_cron(cron: str) -> None:
    fields = cron.split(" ")
    if len(fields) != 6:
        raise Refused(400, f"cron {cron!r} has {len(fields)} fields, not six")
    for field, (low, high) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            if part != "*" and not (part.isdigit() and low <= int(part) <= high):
                raise Refused(400, f"cron field {field!r} of {cron!r}")


def read(model: str, body: dict) -> dict:
    """The body, if it is one of the model's."""
    known = getattr(kfp_server_api, model)
    unknown = set(body) - set(known.attribute_map.values())
    if unknown:
        raise Refused(400, f"unknown fields {sorted(unknown)} of {model}")
    reply = type("Reply", (), {"data": json.dumps(body)})
    kfp_server_api.ApiClient().deserialize(reply, model)
    return body


class KfpApi:
    """The server; a context manager.

    Attributes:
        recurring: Recurring runs by id, as they are answered.
        writes: `METHOD path` of every request that changed something.
        die_after: Writes after which the server refuses everything, as if it or the client had been killed.
        page: Entries of a page at most.
    """

    def __init__(self) -> None:
        self.pipelines: dict[str, dict] = {}
        self.versions: dict[str, dict] = {}
        self.packages: dict[str, list[dict]] = {}
        self.experiments: dict[str, dict] = {}
        self.recurring: dict[str, dict] = {}
        self.writes: list[str] = []
        self.die_after: int | None = None
        self.refuse_upload = ""
        self.page = 2
        self._made = 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            def _do(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length)
                parts = urlsplit(self.path)
                query = {k: v[0] for k, v in parse_qs(parts.query).items()}
                try:
                    status, answer = 200, api.answer(self.command, parts.path, query, body, self.headers)
                except Refused as refused:
                    status, answer = refused.status, {"code": 3, "message": str(refused)}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _do

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "KfpApi":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *failed: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, query: dict, body: bytes, headers: Any) -> dict:
        path = path.removeprefix("/apis/v2beta1")
        if method != "GET":
            if self.die_after is not None and len(self.writes) >= self.die_after:
                raise Refused(503, "killed")
            self.writes.append(f"{method} {path}")
        if path == "/healthz":
            return {"multi_user": False}
        if path == "/pipelines/upload_version":
            return self._upload(query, body, headers)
        found = re.fullmatch(r"/(pipelines|experiments|recurringruns)(?:/([\w-]+)(/versions)?)?", path)
        if not found:
            raise Refused(404, f"{method} {path}")
        kind, key, versions = found.groups()
        store = {"pipelines": self.pipelines, "experiments": self.experiments, "recurringruns": self.recurring}[kind]
        if method == "GET" and versions:
            return self._list(
                "pipeline_versions", [v for v in self.versions.values() if v["pipeline_id"] == key], query
            )
        if method == "GET" and key is None:
            field = {"recurringruns": "recurringRuns"}.get(kind, kind)  # spelt so in the API
            experiment = query.get("experiment_id")
            if experiment and experiment not in self.experiments:
                raise Refused(404, f"experiment {experiment} not found")
            rows = [r for r in store.values() if not experiment or r.get("experiment_id") == experiment]
            return self._list(field, rows, query)
        if method == "DELETE" and key:
            if key not in store:
                raise Refused(404, f"{key} not found")
            del store[key]
            return {}
        if method == "POST" and key is None:
            return getattr(self, f"_new_{kind}")(json.loads(body))
        raise Refused(405, f"{method} {path}")

    def _list(self, field: str, rows: list[dict], query: dict) -> dict:
        if "filter" in query:
            for predicate in json.loads(query["filter"])["predicates"]:
                rows = [r for r in rows if r[predicate["key"]] == predicate["stringValue"]]
        start = int(query.get("page_token") or 0)
        size = min(int(query.get("page_size") or 20), self.page)
        more = {"next_page_token": str(start + size)} if start + size < len(rows) else {}
        return {field: rows[start : start + size], "total_size": len(rows), **more}

    def _named(self, body: dict, store: dict[str, dict], kind: str) -> str:
        name = body.get("display_name", "")
        if not name:
            raise Refused(400, f"{kind} name is empty")
        if any(row["display_name"] == name for row in store.values()):
            raise Refused(409, f"{kind} {name} exists already")
        return self._key(kind)

    def _key(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-{self._made}"

    def _stamp(self) -> str:
        return (datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=self._made)).isoformat()

    def _new_pipelines(self, body: dict) -> dict:
        key = self._named(read("V2beta1Pipeline", body), self.pipelines, "pipeline")
        self.pipelines[key] = {**body, "pipeline_id": key, "created_at": self._stamp()}
        return self.pipelines[key]

    def _new_experiments(self, body: dict) -> dict:
        key = self._named(read("V2beta1Experiment", body), self.experiments, "experiment")
        self.experiments[key] = {**body, "experiment_id": key, "created_at": self._stamp()}
        return self.experiments[key]

    def _upload(self, query: dict, body: bytes, headers: Any) -> dict:
        if self.refuse_upload:
            raise Refused(500, self.refuse_upload)
        if query.get("pipelineid") not in self.pipelines:
            raise Refused(404, f"pipeline {query.get('pipelineid')} not found")
        form = BytesParser().parsebytes(b"content-type: " + headers["content-type"].encode() + b"\r\n\r\n" + body)
        (file,) = form.get_payload()
        documents = list(yaml.safe_load_all(file.get_payload(decode=True)))
        assert documents[0]["pipelineInfo"]["name"]
        siblings = {k: v for k, v in self.versions.items() if v["pipeline_id"] == query["pipelineid"]}
        key = self._named({"display_name": query.get("name", "")}, siblings, "version")
        self.packages[key] = documents
        self.versions[key] = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": key,
            "display_name": query["name"],
            "name": query["name"],
            "created_at": self._stamp(),
        }
        return self.versions[key]

    def _new_recurringruns(self, body: dict) -> dict:
        read("V2beta1RecurringRun", body)
        if not body.get("display_name"):
            raise Refused(400, "Recurring run name is empty. Please specify a valid name")
        if body.get("experiment_id") not in self.experiments:
            raise Refused(404, f"experiment {body.get('experiment_id')} not found")
        if not 1 <= int(body.get("max_concurrency") or 0) <= 10:
            raise Refused(400, "max_concurrency must be 1 to 10")
        reference = body.get("pipeline_version_reference") or {}
        version = self.versions.get(reference.get("pipeline_version_id", ""))
        if version is None or version["pipeline_id"] != reference.get("pipeline_id"):
            raise Refused(400, "pipeline ID should be parent of pipeline version")
        check_cron(body["trigger"]["cron_schedule"]["cron"])
        if body.get("mode") not in ("ENABLE", "DISABLE"):
            raise Refused(400, "mode is not specified")
        inputs = (
            self.packages[version["pipeline_version_id"]][0]["root"].get("inputDefinitions", {}).get("parameters", {})
        )
        given = (body.get("runtime_config") or {}).get("parameters") or {}
        missing = [
            n for n, p in inputs.items() if "defaultValue" not in p and not p.get("isOptional") and n not in given
        ]
        if missing or set(given) - set(inputs):
            raise Refused(400, f"parameters missing {missing}, unknown {sorted(set(given) - set(inputs))}")
        key = self._key("recurring")
        kept = {k: v for k, v in body.items() if k != "runtime_config" or given}
        self.recurring[key] = {
            **kept,
            "recurring_run_id": key,
            "max_concurrency": str(body["max_concurrency"]),
            "status": "ENABLED" if body["mode"] == "ENABLE" else "DISABLED",
            "created_at": self._stamp(),
        }
        return self.recurring[key]
