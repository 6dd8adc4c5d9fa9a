"""What the promoter does next: one pure function from what it sees to one action.

Order is everything here. First the registry must show what was decided; then what a person changed in it is read as a
wish; a wish is taken up, checked, rolled out, answered; and what serves follows the ledger throughout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from serving.agreement import Agreed
from serving.plane import Serving
from serving.registry import CANDIDATE, CHAMPION, DIGEST, GATE, PREVIOUS, RUN_KEY


@dataclass(frozen=True)
class Wish:
    """A person's wish that was taken up.

    Attributes:
        id: Names it.
        version: Version to roll out.
        by: Who wishes it.
        before: The last rollout when it was taken up; another one of this version is its own, and is resumed.
    """

    id: str
    version: str
    by: str
    before: str


@dataclass(frozen=True)
class Observed:
    """What is so at a moment.

    Attributes:
        aliases: Version by alias, in the registry.
        agreed: What the ledger says.
        shown: Whether the registry has been brought in line with it. If so, what differs was changed by a person.
        serving: What answers; None where nothing serves permanently.
        unfinished: Version whose rollout is half done, or ended and did not answer its wish yet; empty for none.
        wish: The wish that was taken up.
        answered: Whether the ledger holds a decision about it.
        obstacle: Why the wished version must not be rolled out; empty when its evidence and files are sound.
        deleted: Agreed versions that the registry does not have any more: no alias can tell of them.
    """

    aliases: Mapping[str, str]
    agreed: Agreed
    shown: bool = True
    serving: Serving | None = None
    unfinished: str = ""
    wish: Wish | None = None
    answered: bool = False
    obstacle: str = ""
    deleted: frozenset[str] = frozenset()

    def due(self, version: str) -> str:
        """What the alias of an agreed version must say."""
        return "" if version in self.deleted else version


@dataclass(frozen=True)
class Rest:
    """All agrees."""


@dataclass(frozen=True)
class Conform:
    """Bring traffic and aliases in line with the ledger."""


@dataclass(frozen=True)
class GoBack:
    """`champion` was moved to the previous champion: a rollback by hand."""

    version: str


@dataclass(frozen=True)
class PutBack:
    """`champion` was moved or deleted: it must tell what serves. Where it went (if anywhere) is a wish."""

    wished: str


@dataclass(frozen=True)
class TakeUp:
    """Give a new wish its identity."""

    version: str


@dataclass(frozen=True)
class Drop:
    """The wish went away before its rollout began."""

    wish: Wish


@dataclass(frozen=True)
class Refuse:
    """Answer a wish with no."""

    wish: Wish
    why: str


@dataclass(frozen=True)
class RollOut:
    """Begin a rollout or finish one that a crash left; without a wish it was a pipeline's or a command's."""

    version: str
    wish: Wish | None


@dataclass(frozen=True)
class Conclude:
    """Tell an answered wish on its version, and take the alias `candidate` from it."""

    wish: Wish


@dataclass(frozen=True)
class Settle:
    """Let the agreed champion answer everybody."""


Action = Rest | Conform | GoBack | PutBack | TakeUp | Drop | Refuse | RollOut | Conclude | Settle


def decide(o: Observed) -> Action:
    """The next action; repeated until it is `Rest`."""
    if not o.shown:
        return Conform()
    champion, wished = o.aliases.get(CHAMPION, ""), o.aliases.get(CANDIDATE, "")
    ours = o.wish is not None and o.wish.version == o.unfinished and not o.answered
    if champion != o.due(o.agreed.champion):
        back = champion != "" and champion == o.agreed.previous
        if back and o.unfinished:  # nobody wants it any more: it comes back before the champion goes
            return RollOut(o.unfinished, o.wish if ours else None)
        return GoBack(champion) if back else PutBack(champion)
    if o.wish and o.answered:
        return Conclude(o.wish)
    if o.wish and o.wish.version != wished and not ours:
        return Drop(o.wish)
    if wished and not o.wish:
        return TakeUp(wished)
    if o.wish and o.obstacle and not ours:
        return Refuse(o.wish, o.obstacle)
    if o.serving and _differs(o.serving, o):
        return Settle()
    if o.wish:
        return RollOut(o.wish.version, o.wish)
    if o.unfinished:
        return RollOut(o.unfinished, None)
    if o.aliases.get(PREVIOUS, "") != o.due(o.agreed.previous):
        return Conform()
    return Rest()


def _differs(serving: Serving, o: Observed) -> bool:
    """Whether somebody gets another version than the ledger says; an unfinished rollout keeps its split."""
    return serving.champion != o.agreed.champion or (serving.challenger != "" and not o.unfinished)


def obstacle(tags: Mapping[str, str], signed: Mapping[str, str]) -> str:
    """Why a version lacks passing evidence; empty when it has it.

    Evidence is what was signed at registration: verdict `promote`, and at least one rule of the gate, all passed. The
    tags of today must say the same; what somebody typed over them is no evidence.

    Args:
        tags: The version's tags now.
        signed: Its tags when it was registered (`Registry.evidence`).
    """
    rules = {k: v for k, v in signed.items() if k.startswith(f"{GATE}.")}
    failed = next((f"{k.removeprefix(f'{GATE}.')}: {v}" for k, v in rules.items() if not v.startswith("pass:")), "")
    if signed.get(GATE) != "promote":
        reason = signed.get(f"{GATE}_reason") or failed
        return f"the gate said {signed.get(GATE, 'nothing')}" + (f" ({reason})" if reason else "")
    if not rules or failed:
        return f"the gate's rule {failed}" if failed else "none of the gate's rules is on record"
    for key in (GATE, *rules, RUN_KEY, DIGEST):
        if tags.get(key) != signed.get(key):
            return f"tag {key} was changed after the gate"
    return ""
