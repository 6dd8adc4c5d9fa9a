"""MLflow's webhooks: a hint that somebody touched the registry, so that the promoter looks at once.

Nothing that a delivery says is believed beyond that; the promoter reads the registry itself, and looks every other
second anyway. Still only MLflow may wake it: deliveries carry an HMAC, are good for five minutes, and only once (after
a restart of the promoter an old one may wake it once more, which does no harm).

`POST /webhook`, `GET /healthz`, `GET /metrics`; on a laptop on loopback alone.
"""

import asyncio
import base64
import hmac
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK, Settings
from serving.promoter_metrics import WEBHOOKS
from serving.signing import kept_secret

if TYPE_CHECKING:
    from aiohttp import web

NAME = "evergreen-promoter"
EVENTS = ("model_version_alias.created", "model_version_alias.deleted", "model_version_tag.set")
WINDOW = 300
"""A delivery is refused when its timestamp is further than this many seconds (> 300) from now, either way."""
LARGEST = 64 * 1024
"""A body of more bytes (> 65,536) is refused; MLflow's have a few hundred."""
REMEMBERED = 10_000  # delivery ids; far more than come in five minutes


class Refused(Exception):
    """A delivery that is not MLflow's, or not a new one.

    Args:
        status: HTTP status.
        outcome: How it is counted.
        text: One line for the sender.
    """

    def __init__(self, status: int, outcome: str, text: str) -> None:
        super().__init__(text)
        self.status, self.outcome = status, outcome


class Deliveries:
    """Tells MLflow's new deliveries from all others.

    Args:
        secret: What MLflow signs them with.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._seen: OrderedDict[str, float] = OrderedDict()

    def check(self, headers: Mapping[str, str], body: bytes, now: float) -> None:
        """Accept a delivery, once.

        Args:
            headers: The request's headers; names as they come.
            body: The raw body.
            now: Seconds since 1970.

        Raises:
            Refused: It is not a new delivery of MLflow's.
        """
        said = {name.lower(): value for name, value in headers.items()}
        delivery, timestamp = said.get("x-mlflow-delivery-id", ""), said.get("x-mlflow-timestamp", "")
        signed = _bytes(f"{delivery}.{timestamp}.") + body
        right = b"v1," + base64.b64encode(hmac.digest(self._secret, signed, "sha256"))
        if not hmac.compare_digest(_bytes(said.get("x-mlflow-signature", "")), right):
            raise Refused(401, "forged", "the signature is not MLflow's")
        try:
            age = abs(now - int(timestamp))
        except ValueError:
            raise Refused(400, "forged", "the timestamp is not a number") from None
        if age > WINDOW:
            raise Refused(400, "stale", f"the delivery is {age:.0f} s off")
        for known in [d for d, at in self._seen.items() if now - at > 2 * WINDOW]:
            del self._seen[known]
        if delivery in self._seen:
            raise Refused(409, "repeated", "this delivery was here before")
        self._seen[delivery] = now
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)


def _bytes(header: str) -> bytes:
    """A header as it came: bytes that are no UTF-8 stand in the text as lone surrogates."""
    return header.encode("utf-8", "surrogateescape")


class Hooks:
    """The receiver, in a thread of its own.

    Args:
        settings: The home.
        wake: Called for each delivery about the home's model.
        health: What `/healthz` tells.
    """

    def __init__(self, settings: Settings, wake: Callable[[], None], health: Callable[[], Mapping[str, Any]]) -> None:
        self._settings, self._wake, self._health = settings, wake, health
        self._deliveries = Deliveries(kept_secret(settings, SECRET))

    def start(self) -> None:
        """Listen; returns when it does.

        Raises:
            EvergreenError: The port is in use.
        """
        started: threading.Event = threading.Event()
        problems: list[OSError] = []
        threading.Thread(target=self._serve, args=(started, problems), daemon=True).start()
        started.wait()
        if problems:
            raise EvergreenError(
                f"port {self._settings.promoter_port}, wanted by the promoter, is in use",
                "Stop what listens there or set EVERGREEN_PROMOTER_PORT to another port",
            )

    def _serve(self, started: threading.Event, problems: list[OSError]) -> None:
        from aiohttp import web

        settings = self._settings

        async def listen() -> None:
            app = web.Application(client_max_size=LARGEST)
            app.router.add_post("/webhook", self._receive)
            app.router.add_get("/healthz", self._healthz)
            app.router.add_get("/metrics", _metrics)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            try:
                await web.TCPSite(runner, settings.promoter_host, settings.promoter_port).start()
            except OSError as error:
                problems.append(error)
                return
            finally:
                started.set()
            await asyncio.Event().wait()

        asyncio.run(listen())

    async def _receive(self, request: "web.Request") -> "web.Response":
        from aiohttp import web

        try:
            body = await request.read()
            self._deliveries.check(request.headers, body, time.time())
        except web.HTTPRequestEntityTooLarge:
            return _answer(413, "too large", f"more than {LARGEST} bytes")
        except Refused as error:
            return _answer(error.status, error.outcome, str(error))
        if _about(body) != self._settings.model_name:  # another model, or MLflow's test delivery
            return _answer(200, "ignored", "not about this model")
        self._wake()
        return _answer(200, "accepted", "looking")

    async def _healthz(self, request: "web.Request") -> "web.Response":
        from aiohttp import web

        return web.json_response(dict(self._health()))


async def _metrics(request: "web.Request") -> "web.Response":
    from aiohttp import web
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return web.Response(body=generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


def _answer(status: int, outcome: str, text: str) -> "web.Response":
    from aiohttp import web

    WEBHOOKS.labels(outcome).inc()
    return web.json_response({"error" if status >= 400 else "status": text}, status=status)


def _about(body: bytes) -> str:
    """Name of the model that a signed delivery is about."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(body)["data"]["name"])
    return ""


# --- the sending side: MLflow's server ---

SECRET, FERNET = "webhook.secret", "mlflow-webhooks.fernet"


def server_environment(settings: Settings) -> dict[str, str]:
    """What MLflow's server needs to deliver to loopback, and to read its own secrets after a restart."""
    return {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": kept_secret(settings, FERNET),  # a Fernet key is 32 bytes in base64
        # Seconds that it keeps its list of webhooks: one made after an event would hear of nothing for a minute.
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }


def register(settings: Settings, server: str) -> None:
    """Tell MLflow's server where the promoter listens; the same again changes nothing.

    It is told over HTTP: it alone has the key for the secret (a process reads that key when it imports MLflow).

    Args:
        settings: The home.
        server: MLflow's address.

    Raises:
        EvergreenError: MLflow cannot be reached, or its webhooks were made with another key.
    """
    from serving.registry import Registry

    wanted: dict[str, Any] = {
        "url": f"{settings.promoter_url or f'http://{LOOPBACK}:{settings.promoter_port}'}/webhook",
        "events": list(EVENTS),
        "secret": kept_secret(settings, SECRET),
    }
    with Registry(settings.model_copy(update={"mlflow_tracking_uri": server})).client() as client:
        ours = [w for w in client.list_webhooks() if w.name == NAME]
        for extra in ours[1:]:
            client.delete_webhook(extra.webhook_id)
        if ours:
            client.update_webhook(ours[0].webhook_id, status="ACTIVE", **wanted)
        else:
            client.create_webhook(name=NAME, **wanted)
