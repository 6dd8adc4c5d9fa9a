"""Where versions run and how users are split between two of them: what a rollout needs, and no more.

On a laptop it is background processes behind Envoy (`stack.py`), on a cluster KServe's InferenceService
(`cluster/`). Every call is idempotent, returns once it is so, and may be repeated after a crash.
"""

from dataclasses import dataclass
from typing import Protocol

from engagement.errors import EvergreenError


class Unfit(EvergreenError):
    """The challenger itself cannot be served (it does not start, its files are damaged): a reason to roll back."""


@dataclass(frozen=True)
class Doors:
    """Base URLs (`http://host:port`) that speak the Open Inference Protocol v2.

    Attributes:
        gateway: Everybody's: the challenger gets its share of the users (or of the requests, see `sticky`).
        champion: The champion alone; empty where there is none.
        challenger: The challenger alone.
        sticky: Whether the gateway splits by the users' buckets; else it draws for each request.
    """

    gateway: str
    champion: str
    challenger: str
    sticky: bool = True


@dataclass(frozen=True)
class Serving:
    """What serves at a moment; empty names where nothing does."""

    champion: str = ""
    challenger: str = ""
    percent: int = 0


class Plane(Protocol):
    """One model's data plane."""

    def serving(self) -> Serving:
        """What answers now."""
        ...

    def open(self, champion: str, challenger: str, salt: str) -> Doors:
        """Run both versions and wait until they are ready; nobody gets the challenger yet ("dark").

        Args:
            champion: Version that serves; empty for a first model.
            challenger: Version under test.
            salt: Salt of the users' buckets.

        Raises:
            Unfit: The challenger cannot be served.
            EvergreenError: Anything else that is not the challenger's fault; nothing changed for anybody.
        """
        ...

    def split(self, percent: int) -> None:
        """Give the challenger that share of the users, 0..100; who was in stays in. No request is dropped."""
        ...

    def settle(self, champion: str, standby: str = "") -> None:
        """Whatever was before: `champion` alone answers everybody, and nothing else of a rollout is left.

        A challenger that becomes champion goes on without a restart. `standby` stays warm where the plane can, so that
        the way back takes no start; empty names: nobody.
        """
        ...

    def close(self) -> None:
        """Give back what was started for the time being only (a rollout without `evergreen up`)."""
        ...
