"""What a rollout lets its judge see: requests known from the log, and where evidence about a split comes from.

A source of traffic drives requests itself (`replay.py`: on a laptop there may be no users), or watches those of real
users (`live.py`), or both (`Together`). It decides nothing; it counts, pairs and times.
"""

from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

import numpy as np
import polars as pl

from engagement.snapshot import Snapshot
from serving.evidence import Arm, Evidence, Pairs
from serving.plane import Doors
from serving.protocol import RankRequest

REQUESTS = 200
DAYS = 14
Columns = TypeVar("Columns", Arm, Pairs)


@dataclass(frozen=True)
class Asked:
    """One real request, to be asked again.

    Attributes:
        request: The request.
        saved: Items that the user then saved (did the primary action to); None where that is not known, or where a
            model may have been trained on it.
    """

    request: RankRequest
    saved: frozenset[str] | None = None


@dataclass(frozen=True)
class Stage:
    """What is served while evidence is gathered.

    Attributes:
        champion: Version that serves; empty for a first model.
        challenger: Version under test.
        percent: The challenger's share of the users; 0: dark.
        salt: Salt of the users' buckets (`buckets.py`).
        doors: Where to ask whom.
        since: From when on this split was in force, for all that is noted by the clock.
    """

    champion: str
    challenger: str
    percent: int
    salt: str
    doors: Doors
    since: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Portion:
    """What one look shows, and the mark up to which it was read.

    Attributes:
        evidence: What is new since the mark before.
        mark: JSON data of the source's own, kept with the rollout: nothing is shown twice, not after a crash either.
    """

    evidence: Evidence
    mark: Any = None


class Traffic(Protocol):
    """A source of evidence."""

    def look(self, stage: Stage, mark: Any) -> Portion:
        """Gather what is new, and return when it is worth a look: a source sets its own pace.

        Args:
            stage: What is served, since when.
            mark: That of the last look, at whatever stage; None at the first look of a rollout.

        Returns:
            Evidence of this stage alone: what happened before `stage.since` is passed over. An arm holds the requests
            of the users whom the split gives to it, whoever answered them.

        Raises:
            Unfit: The challenger cannot be judged, through its own fault.
            EvergreenError: Nothing can be gathered, through nobody's fault; the rollout stops and may be called again.
        """
        ...


class Together:
    """Several sources as one; the first one's look drives, the others add what they saw meanwhile.

    Args:
        sources: One or more.
    """

    def __init__(self, *sources: Traffic) -> None:
        self._sources = sources

    def look(self, stage: Stage, mark: Any) -> Portion:
        """One look at each source, in order."""
        marks = mark or [None] * len(self._sources)
        portions = [source.look(stage, m) for source, m in zip(self._sources, marks, strict=True)]
        evidence = portions[0].evidence
        for portion in portions[1:]:
            evidence = plus(evidence, portion.evidence)
        return Portion(evidence, [p.mark for p in portions])


def plus(one: Evidence, other: Evidence) -> Evidence:
    """Two portions of one stage as one; of memory, the first known numbers."""
    known, also = one.memory_mb, other.memory_mb
    return Evidence(
        percent=one.percent,
        champion=_joined(one.champion, other.champion),
        challenger=_joined(one.challenger, other.challenger),
        pairs=_joined(one.pairs, other.pairs),
        memory_mb=(known[0] if known[0] == known[0] else also[0], known[1] if known[1] == known[1] else also[1]),
    )


def _joined(one: Columns, other: Columns) -> Columns:
    """Columns end to end."""
    names = [f.name for f in fields(one) if f.name != "problems"]
    joined: dict[str, Any] = {n: np.concatenate((getattr(one, n), getattr(other, n))) for n in names}
    joined["problems"] = [*one.problems, *other.problems]
    return type(one)(**joined)


def latest_requests(snapshot: Snapshot, as_of: datetime, unseen_from: datetime | None = None) -> list[Asked]:
    """The last `REQUESTS` requests of the last `DAYS` days, oldest first.

    A request whose outcome may be used is asked as of the instant at which it was made, so that the user's history
    does not hold the outcome; the others as of `as_of`. The counters of items and users in the online store do hold
    it, for both versions alike: hits on replayed requests compare two models, they are not a feed's HIT@3.

    Args:
        snapshot: The log.
        as_of: Only what was shown before it.
        unseen_from: Models are trained on nothing from then on; None: only requests that are kept for exams for ever
            (`model.exam`) have their outcomes.
    """
    from model.exam import kept

    context = list(snapshot.manifest.context_features)
    rows = pl.DataFrame(snapshot.engagements(as_of - timedelta(days=DAYS), as_of))
    first = [pl.col("user_id").first(), pl.col("event_timestamp").min(), *(pl.col(c).first() for c in context)]
    saved = pl.col("item_id").filter(pl.col(snapshot.manifest.primary_action)).alias("saved")
    requests = rows.group_by("request_id").agg(pl.col("item_id"), saved, *first).sort("event_timestamp", "request_id")
    last = requests.tail(REQUESTS).to_dicts()
    held_R = kept(np.array([r["request_id"].encode() for r in last], "S"))
    found = []
    for r, held in zip(last, held_R, strict=True):
        usable = bool(held) or (unseen_from is not None and r["event_timestamp"] >= unseen_from)
        request = RankRequest.logged(r, context, r["event_timestamp"] if usable else as_of)
        found.append(Asked(request, frozenset(r["saved"]) if usable else None))
    return found
