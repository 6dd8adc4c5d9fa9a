"""Promoters in processes of their own beside a real Envoy and light predictors, and what people see of them.

All of this runs in children that are forked from `kills_lab`'s server.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.fault.kills_lab import open_home, requests
from tests.fault.serving_light import light_plane, light_rollout
from tests.promoter_lab import BEGINNING

PATIENCE = 60.0  # seconds to wait for what must come
BUCKETS = (0, 40, 500, 2500, 5000, 9999)


def go_up(home: Path) -> None:
    """`evergreen up`, as far as the gateway and the champion go."""
    open_home(home, permanent=True)


def run_promoter(home: Path, port: int, die_at: str = "") -> None:
    """`python -m serving.promoter` on the light plane; it dies at that point (`POINTS`). Says all into a file."""
    from serving import promoter

    os.environ |= {"EVERGREEN_HOME": str(home), "EVERGREEN_PROMOTER_PORT": str(port)}
    sys.stdout = sys.stderr = (home / f"promoter-{port}.log").open("w")

    def plane(settings, registry):
        found = light_plane(settings, registry)
        return found if found.permanent else None

    def roll(settings, registry, version, again, wanted, why):
        return light_rollout(settings, registry).run(version, requests(), promoter._say, again, wanted, why)

    promoter.permanent_plane, promoter.roll_with_known_requests, promoter.POLL = plane, roll, 0.3
    if die_at:
        POINTS[die_at]()
    sys.exit(promoter.main())


def _die_before_the_first_split() -> None:
    from serving.laptop_plane import LaptopPlane

    LaptopPlane.split = lambda plane, percent: _die()


def _die_at_half() -> None:
    from serving.laptop_plane import LaptopPlane

    real = LaptopPlane.split

    def split(plane, percent):
        real(plane, percent)
        if percent == 50:
            _die()

    LaptopPlane.split = split


def _die_decided() -> None:
    from serving.agreement import ADOPTED, Agreement

    real = Agreement.decide

    def decide(agreement, decision, *known, **more):
        real(agreement, decision, *known, **more)
        if decision != ADOPTED:
            _die()

    Agreement.decide = decide


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


POINTS = {
    "before the first split": _die_before_the_first_split,
    "at 50 %": _die_at_half,
    "right after the decision": _die_decided,
}


def set_alias(home: Path, alias: str, version: str) -> None:
    """A person in the MLflow UI."""
    settings, registry = open_home(home)
    with registry.client() as client:
        client.set_registered_model_alias(settings.model_name, alias, version)


def settled(home: Path, decisions: int) -> dict[str, Any]:
    """Wait until so many decisions were made after the beginning and all agrees; then what everybody says."""
    settings, registry = open_home(home)
    plane, deadline = light_plane(settings, registry), time.monotonic() + PATIENCE
    while True:
        shown = registry.agreement.shown  # before the aliases: they may be halfway there
        made = registry.agreement.decisions()[BEGINNING:]
        agreed, aliases, serving = registry.agreed(), registry.aliases(), plane.serving()
        done = "candidate" not in aliases and shown and not serving.challenger
        if (len(made) >= decisions and done and serving.champion == agreed.champion) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return {
        "aliases": {k: v for k, v in aliases.items() if k != "challenger"},
        "ledger": (agreed.champion, agreed.previous),
        "answers": _answers(plane.gateway.url, settings.model_name),
        "decisions": [(d["decision"], d["version"]) for d in made],
        "pids": [entry["pid"] for entry in registry.agreement.ledger.entries()],
    }


def _answers(door: str, model: str) -> list[tuple[int, str]]:
    """Status and version of what users of different buckets get."""
    from serving.client import Call, Client
    from tests.fault.serving_light import ACTIONS

    with Client(model, ACTIONS) as client:
        asked = requests()[0].request
        answers = client.ask_all([Call(door, asked, {"x-bucket": str(bucket)}) for bucket in BUCKETS])
    return sorted({(answer.status, answer.version) for answer in answers})
