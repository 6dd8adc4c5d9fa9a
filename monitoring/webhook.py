"""Delivery of alerts to a webhook, as Alertmanager's webhook receiver does it (payload version 4).

What speaks with Alertmanager's webhooks speaks with ours. The address may hold a secret (a token in its path): it comes
from the environment, and no line that is logged has more of it than the host.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_exponential

ATTEMPTS = 3
PATIENCE = 3.0  # seconds for one attempt, from the connection to the last byte of the answer's header
PAUSE = 0.5  # seconds before the second attempt; twice that before the third
RECEIVER = "evergreen"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
IN_CLUSTER = (".svc", ".svc.cluster.local")  # how names of Kubernetes services end, which no resolver outside knows
NOT_ENDED = "0001-01-01T00:00:00Z"  # how Alertmanager says that an alert fires still


def deliver(url: str, payload: Mapping[str, Any]) -> str:
    """Post a payload; never raises. Not to be called from within an event loop.

    Connection errors, timeouts, 429 and 5xx are tried `ATTEMPTS` times; any other answer but 2xx is final, also a
    redirect, which could lead the secret of the address elsewhere. Plain http is for loopback and for services of the
    cluster only.

    Returns:
        Empty, or why it was not delivered, in one line that does not hold the address.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    if not host or parts.scheme not in ("http", "https"):
        return "the address (EVERGREEN_ALERT_URL) is not an http or https URL"
    near = host in LOOPBACK or host.endswith(IN_CLUSTER)
    if parts.scheme == "http" and not near:
        remedy = "set an https address in EVERGREEN_ALERT_URL"
        return f"{host} is not on loopback, no service of the cluster and not reached by https: {remedy}"
    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(PAUSE),
        retry=retry_if_result(lambda found: found[1]),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else ("", False),
    )
    problem, _ = attempts(lambda: asyncio.run(_post(url, payload, not near)))
    return f"{host} {problem}" if problem else ""


async def _post(url: str, payload: Mapping[str, Any], proxied: bool) -> tuple[str, bool]:
    """One attempt: what went wrong, empty if nothing, and whether another attempt may help."""
    import aiohttp

    try:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=proxied) as session,
            session.post(url, json=payload, allow_redirects=False) as answer,
        ):
            if 200 <= answer.status < 300:
                return "", False
            return f"answered {answer.status}", answer.status == 429 or answer.status >= 500
    except TimeoutError:
        return f"did not answer in {PATIENCE:g} s", True
    except (aiohttp.ClientError, OSError, ValueError) as error:  # their texts may hold the address
        return f"could not be reached ({type(error).__name__})", True


def payload(alerts: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Alertmanager's webhook payload, version 4, for one group of alerts: those of a model.

    Args:
        alerts: Fields of `Alert`, and `ends_at`: empty while it fires.
        model: What they are grouped by.
    """
    labels = [a["labels"] for a in alerts]
    told = [_told(a) for a in alerts]
    return {
        "receiver": RECEIVER,
        "status": "firing" if any(a["status"] == "firing" for a in told) else "resolved",
        "alerts": told,
        "groupLabels": {"model": model},
        "commonLabels": _common(labels),
        "commonAnnotations": _common([a["annotations"] for a in told]),
        "externalURL": "",
        "version": "4",
        "groupKey": f'{{}}:{{model="{model}"}}',
        "truncatedAlerts": 0,
    }


def _told(alert: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "status": "resolved" if alert["ends_at"] else "firing",
        "labels": alert["labels"],
        "annotations": {
            "summary": alert["summary"],
            "description": alert["description"],
            "runbook_url": alert["runbook"],
        },
        "startsAt": alert["starts_at"],
        "endsAt": alert["ends_at"] or NOT_ENDED,
        "generatorURL": "",
        "fingerprint": fingerprint(alert["labels"]),
    }


def _common(held: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all have, with the same value."""
    return dict(set.intersection(*(set(h.items()) for h in held))) if held else {}


def fingerprint(labels: Mapping[str, str]) -> str:
    """Name of an alert by its labels, as Alertmanager computes it: FNV-1a of names and values, each ended by 0xFF."""
    digest = 14695981039346656037
    for name in sorted(labels):
        for byte in b"%s\xff%s\xff" % (name.encode(), labels[name].encode()):
            digest = (digest ^ byte) * 1099511628211 % 2**64
    return f"{digest:016x}"
