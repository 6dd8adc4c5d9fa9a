"""A small Kubernetes API server for tests: real HTTP on loopback, for KServeClient and kubectl alike.

It keeps the conventions that a controller relies on: resourceVersion with 409 for a stale write, generation that only a
changed spec moves, status as a subresource, merge patches in which an absent field is left alone, watches with
bookmarks, errors as Status objects. InferenceServices and ServingRuntimes are validated when they are written. Faults
are ordered by the number of the request that they shall hit.
"""

import asyncio
import copy
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from serving.manifest_rules import validate
from tests.kube_api import KINDS, Key, Path, Refused, discovery, is_discovery, parse, patched, same, selected

FAULTS = ("conflict", "error", "busy", "cut", "lost", "hang")


@dataclass
class Watcher:
    """One open watch."""

    collection: tuple[str, str]
    namespace: str
    name: str
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    silent: bool = False

    def sees(self, key: Key) -> bool:
        return key[:2] == self.collection and self.namespace in ("", key[2]) and self.name in ("", key[3])


class KubeLab:
    """The server; `with KubeLab() as lab:` runs it in a thread of its own."""

    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.log: list[tuple[str, str, int]] = []  # method, path, status of the answer
        self.listeners: list[Callable[[Key, dict[str, Any] | None], None]] = []  # called in the server's thread
        self.silent_watches = False  # watches stay open and tell nothing
        self._faults: dict[int, str] = {}
        self._count = 0
        self._revision = 100
        self._watchers: list[Watcher] = []
        self._events: list[tuple[int, Key, dict[str, Any]]] = []
        self._open: set[Any] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.port = 0

    # --- what tests call

    def __enter__(self) -> "KubeLab":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(20)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)

    @property
    def config(self) -> dict[str, Any]:
        """A kubeconfig."""
        return self.config_of(self.port)

    @staticmethod
    def config_of(port: int) -> dict[str, Any]:
        """The kubeconfig of the lab on a port."""
        cluster = {"name": "lab", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "lab", "context": {"cluster": "lab", "user": "lab", "namespace": "evergreen"}}
        lists = {"clusters": [cluster], "contexts": [context], "users": [{"name": "lab", "user": {}}]}
        return {"apiVersion": "v1", "kind": "Config", "current-context": "lab", **lists}

    def call(self, function: Callable[[], Any]) -> Any:
        """Run something in the server's thread, where everything of the lab lives."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def clear(self) -> None:
        """Forget all objects, faults and requests."""

        def forget() -> None:
            for store in (self.objects, self.log, self._faults, self._events):
                store.clear()
            self._count, self.silent_watches = 0, False

        self.call(forget)

    def fail(self, request: int, fault: str) -> None:
        """Let a fault hit the n-th request from now (1 is the next; watches do not count).

        Args:
            request: Its number.
            fault: `conflict` (somebody else writes just before), `error` (500), `busy` (429), `cut` (the connection
                closes before anything is done), `lost` (done, but the answer is lost), `hang` (no answer at all).
        """
        assert fault in FAULTS
        self.call(lambda: self._faults.__setitem__(self._count + request, fault))

    @property
    def requests(self) -> int:
        """Requests so far, watches apart."""
        return self._count

    def restart(self) -> None:
        """What a restarted API server does to its clients: every connection and watch is gone."""
        self.call(self._cut_all)

    def get(self, plural: str, name: str, namespace: str = "evergreen") -> dict[str, Any] | None:
        """An object as it is now."""

        def look() -> dict[str, Any] | None:
            found = [o for k, o in self.objects.items() if k[1:] == (plural, namespace, name)]
            return copy.deepcopy(found[0]) if found else None

        return self.call(look)

    def edit(self, plural: str, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Somebody else changes an object."""

        def apply() -> None:
            key = next(k for k in self.objects if k[1] == plural and k[3] == name)
            changed = copy.deepcopy(self.objects[key])
            change(changed)
            self.save(key, changed, bump=changed.get("spec") != self.objects[key].get("spec"))

        self.call(apply)

    @contextmanager
    def listening(self, listener: Callable[[Key, dict[str, Any] | None], None]) -> Iterator[None]:
        """Call somebody about every change while the block runs."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    # --- the store (server's thread only)

    def save(self, key: Key, document: dict[str, Any], bump: bool) -> dict[str, Any]:
        """Write an object and tell everybody."""
        before = self.objects.get(key)
        if before is not None and not bump and same(before, document):
            return before  # as etcd: nothing changed, nobody is told
        self._revision += 1
        metadata = document["metadata"]
        metadata["resourceVersion"] = str(self._revision)
        if before is None:
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        metadata["generation"] = (before["metadata"]["generation"] + bump) if before else 1
        self.objects[key] = document
        self._tell(key, "MODIFIED" if before else "ADDED", document)
        return document

    def drop(self, key: Key) -> dict[str, Any]:
        """Delete an object."""
        gone = self.objects.pop(key)
        self._revision += 1
        self._tell(key, "DELETED", gone)
        return gone

    def _tell(self, key: Key, kind: str, document: dict[str, Any]) -> None:
        event = {"type": kind, "object": copy.deepcopy(document)}
        event["object"]["metadata"]["resourceVersion"] = str(self._revision)
        self._events.append((self._revision, key, event))
        for watcher in self._watchers:
            if watcher.sees(key) and not watcher.silent:
                watcher.queue.put_nowait(event)
        for listener in self.listeners:
            self.loop.call_soon(listener, key, None if kind == "DELETED" else document)

    # --- HTTP

    async def _start(self) -> None:
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _cut_all(self) -> None:
        for transport in list(self._open):
            transport.abort()
        self._open.clear()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._open.add(request.transport)
        watch = request.query.get("watch", "").lower() in ("true", "1")
        try:
            parsed = None if request.method == "GET" and is_discovery(request.path) else parse(request.path)
            if parsed is None:
                return web.json_response(discovery(request.path))
            if watch:
                return await self._watch(request, parsed)
            body = await request.text()
            self._count += 1
            fault = self._faults.pop(self._count, "")
            await self._before(fault, request, parsed)
            code, answer = self._answer(request, parsed, body)
            if fault == "lost":
                raise ConnectionAbortedError
        except Refused as refusal:
            self.log.append((request.method, request.path, refusal.code))
            return web.json_response(refusal.body, status=refusal.code, headers=refusal.headers)
        except ConnectionAbortedError:
            self.log.append((request.method, request.path, 0))
            if request.transport:
                request.transport.abort()
            return web.Response()
        self.log.append((request.method, request.path, code))
        return web.json_response(answer, status=code)

    async def _before(self, fault: str, request: web.Request, key: Path) -> None:
        if fault == "conflict" and key.key in self.objects:
            changed = copy.deepcopy(self.objects[key.key])
            stamp = str(self._revision)
            changed["metadata"].setdefault("labels", {})["somebody-else"] = stamp
            self.save(key.key, changed, bump=False)
        if fault == "error":
            raise Refused(500, "etcdserver: leader changed")
        if fault == "busy":
            raise Refused(429, "too many requests", {"Retry-After": "0"})
        if fault == "cut":
            raise ConnectionAbortedError
        if fault == "hang":
            await asyncio.sleep(3600)

    def _answer(self, request: web.Request, path: Path, body: str) -> tuple[int, dict[str, Any]]:
        key, method = path.key, request.method
        if not path.name:
            if method == "GET":
                return 200, self._list(path, selected(request))
            if method == "POST":
                return 201, self._create(path, json.loads(body))
            raise Refused(405, f"{method} is not allowed here")
        if key not in self.objects:
            raise Refused(404, f'{path.plural}.{path.group} "{path.name}" not found')
        if method == "GET":
            return 200, self.objects[key]
        if method == "DELETE":
            gone = self.drop(key)
            details = {"name": path.name, "uid": gone["metadata"]["uid"]}
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": details}
        if method == "PUT":
            return 200, self._update(path, json.loads(body))
        if method == "PATCH":
            return 200, self._update(path, patched(self.objects[key], request.content_type, body))
        raise Refused(405, f"{method} is not allowed here")

    def _list(self, path: Path, name: str) -> dict[str, Any]:
        watcher = Watcher((path.version, path.plural), path.namespace, name)
        items = [o for k, o in self.objects.items() if watcher.sees(k)]
        kind = KINDS[path.version, path.plural][0] + "List"
        metadata = {"resourceVersion": str(self._revision)}
        return {"apiVersion": path.version, "kind": kind, "metadata": metadata, "items": items}

    def _create(self, path: Path, document: dict[str, Any]) -> dict[str, Any]:
        document.pop("status", None)
        self._validate(path, document)
        document["metadata"]["namespace"] = path.namespace
        key = (path.version, path.plural, path.namespace, document["metadata"]["name"])
        if key in self.objects:
            raise Refused(409, f'{path.plural}.{path.group} "{key[3]}" already exists', reason="AlreadyExists")
        return self.save(key, document, bump=True)

    def _update(self, path: Path, document: dict[str, Any]) -> dict[str, Any]:
        before = self.objects[path.key]
        sent = document.get("metadata", {}).get("resourceVersion", "")
        if sent != before["metadata"]["resourceVersion"] and sent:
            message = f'Operation cannot be fulfilled on {path.plural} "{path.name}": the object has been modified'
            raise Refused(409, message + "; please apply your changes to the latest version and try again")
        if not sent:
            raise Refused(422, "metadata.resourceVersion: must be specified for an update")
        if path.sub == "status":
            return self.save(path.key, copy.deepcopy(before) | {"status": document.get("status", {})}, bump=False)
        self._validate(path, document)
        document.pop("status", None)
        if "status" in before:
            document["status"] = before["status"]
        for name in ("uid", "creationTimestamp", "generation", "namespace"):
            document["metadata"][name] = before["metadata"][name]
        return self.save(path.key, document, bump=document.get("spec") != before.get("spec"))

    def _validate(self, path: Path, document: dict[str, Any]) -> None:
        kind = KINDS[path.version, path.plural][0]
        if document.get("kind") != kind or document.get("apiVersion") != path.version:
            raise Refused(400, f"the object is no {path.version} {kind}")
        if path.group and (problems := validate({k: v for k, v in document.items() if k != "status"})):
            webhook = f'admission webhook "{path.plural}.kserve-webhook-server.validator" denied the request'
            raise Refused(422, f"{webhook}: {'; '.join(problems)}")

    async def _watch(self, request: web.Request, path: Path) -> web.StreamResponse:
        if request.query.get("sendInitialEvents") == "true":
            raise Refused(422, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
        watcher = Watcher((path.version, path.plural), path.namespace, selected(request), silent=self.silent_watches)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since = int(request.query.get("resourceVersion") or 0)
        if since:
            past = [e for at, k, e in self._events if at > since and watcher.sees(k)]
        else:
            past = [{"type": "ADDED", "object": o} for k, o in self.objects.items() if watcher.sees(k)]
        if request.query.get("allowWatchBookmarks", "").lower() == "true":
            kind = KINDS[watcher.collection][0]
            metadata = {"resourceVersion": str(self._revision)}
            past.append(
                {"type": "BOOKMARK", "object": {"apiVersion": path.version, "kind": kind, "metadata": metadata}}
            )
        for event in [] if watcher.silent else past:
            watcher.queue.put_nowait(event)
        self._watchers.append(watcher)
        try:
            timeout = float(request.query.get("timeoutSeconds") or 3600)
            async with asyncio.timeout(timeout):
                while True:
                    event = await watcher.queue.get()
                    await response.write(json.dumps(event).encode() + b"\n")
        except (TimeoutError, ConnectionResetError):
            pass
        finally:
            self._watchers.remove(watcher)
        return response
