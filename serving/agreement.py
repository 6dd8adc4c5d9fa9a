"""Who is champion: the one thing that registry, traffic and ledger must agree on, and where it is decided.

A decision is one line appended to the ledger, durably: that is the commit. Everything else (aliases, traffic, tags,
MLflow runs) is brought in line with it afterwards, by whoever comes first, and may be killed and repeated at will.

`shown.json` says which decision the registry's aliases show. Until they show the last one, what they say is what a
killed process left; afterwards, an alias that differs was moved by a person, and that is a wish.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from engagement.errors import EvergreenError
from serving.files import write_json
from serving.ledger import Ledger

KIND = "decision"  # tells these entries of the ledger from a rollout's transitions
ADOPTED = "adopted"  # the champion of a registry that had no ledger yet
PROMOTED = "promoted"
ROLLED_BACK = "rolled back"  # a canary came back; the champion stays
REFUSED = "refused"  # a wish without evidence or signature
BACK_BY_HAND = "rolled back by hand"  # the previous champion serves again
BACK_FAILED = "rollback failed"  # it could not be served: the champion before serves on
PUT_BACK = "alias put back"  # `champion` was moved or deleted: it must tell what serves
# Those after which the aliases must be looked at again; the others change nothing that they show.
_TURNS = frozenset({ADOPTED, PROMOTED, BACK_BY_HAND, BACK_FAILED, PUT_BACK})


ANSWERS = frozenset({PROMOTED, ROLLED_BACK, REFUSED})  # those that end a wish


@dataclass(frozen=True)
class Order:
    """On whose behalf something is decided.

    Attributes:
        wish: Names the wish, so that it is answered once; empty: nobody's in particular.
        by: Who wanted it; empty: the user of this process.
    """

    wish: str = ""
    by: str = ""


@dataclass(frozen=True)
class Agreed:
    """What the ledger says.

    Attributes:
        champion: Version that is to serve; empty before the first.
        previous: Where a rollback goes; empty where there is nowhere to go.
        turn: The decision that made it so, of those that concern the aliases; empty where there was none.
        was: Champion before it.
        digest: Digest of that decision.
    """

    champion: str = ""
    previous: str = ""
    turn: str = ""
    was: str = ""
    digest: str = ""


class Agreement:
    """Decisions of one home.

    Args:
        directory: `settings.serving`.
    """

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory / "ledger.jsonl")
        self._shown = directory / "shown.json"
        self._lock = directory / ".agreement.lock"

    def decisions(self) -> list[dict[str, Any]]:
        """All decisions, oldest first."""
        return [entry for entry in self.ledger.entries() if entry.get("kind") == KIND]

    def now(self) -> Agreed:
        """What is agreed at this moment."""
        last = next((d for d in reversed(self.decisions()) if d["decision"] in _TURNS), None)
        return Agreed(*(last[k] for k in ("champion", "previous", "decision", "was", "digest"))) if last else Agreed()

    def decide(
        self,
        decision: str,
        version: str,
        why: str,
        order: Order = Order(),  # noqa: B008 (frozen)
        champion: str | None = None,
        previous: str | None = None,
    ) -> None:
        """Commit a decision. One that answers the same wish again, or repeats the last about its version, is not made.

        Args:
            decision: One of the words above.
            version: Version that it is about.
            why: Why, in words.
            order: Whose wish it answers.
            champion: Champion from now on; None: as before.
            previous: Where a rollback goes from now on; None: as before.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock):  # one that rests on what was agreed a moment ago would bring that back
            now = self.now()
            line = {
                "kind": KIND,
                "decision": decision,
                "version": str(version),
                "champion": now.champion if champion is None else champion,
                "previous": now.previous if previous is None else previous,
                "was": now.champion,
                "wish": order.wish,
                "why": why,
            }
            if not self._made(line):
                self.ledger.append({**line, **({"by": order.by} if order.by else {})})

    def go_back(self, order: Order) -> str:
        """Commit that the previous champion serves again; one that is not carried out yet is not done twice.

        Returns:
            The champion from now on.

        Raises:
            EvergreenError: There is no previous champion.
        """
        now = self.now()
        if now.turn == BACK_BY_HAND and not self.shown:  # killed half-way
            return now.champion
        if not now.previous:
            raise EvergreenError("there is no previous champion to go back to", "Use `evergreen promote VERSION`")
        self.decide(BACK_BY_HAND, now.previous, f"v{now.champion} taken back", order, now.previous, "")
        return now.previous

    def about(self, wish: str, version: str) -> dict[str, Any] | None:
        """The decision that answered a wish, if it was made."""
        same = (d for d in reversed(self.decisions()) if d["wish"] == wish and d["version"] == version)
        return next((d for d in same if d["decision"] in ANSWERS), None)

    def _made(self, line: Mapping[str, Any]) -> bool:
        if line["wish"] and line["decision"] in ANSWERS:
            return self.about(line["wish"], line["version"]) is not None
        if line["decision"] == ADOPTED:
            return bool(self.now().turn)
        if line["decision"] in _TURNS:
            return False
        last: Mapping[str, Any]
        last = next((d for d in reversed(self.decisions()) if d["version"] == line["version"]), {})
        return all(last.get(k) == line[k] for k in ("decision", "champion", "why"))

    @property
    def shown(self) -> bool:
        """Whether the aliases were brought in line with the last decision."""
        try:
            shown = json.loads(self._shown.read_text())["decision"]
        except (OSError, ValueError, KeyError, TypeError):
            shown = ""
        return bool(shown == self.now().digest)

    def show(self, agreed: Agreed) -> None:
        """Remember that the aliases show this."""
        write_json(self._shown, {"decision": agreed.digest})
