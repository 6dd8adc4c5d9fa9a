"""Step 1: name the run by its inputs and fix what it trains and is judged on."""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from components.base import step
from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.slots import previous_slots
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from evergreen.settings import Settings

if TYPE_CHECKING:
    from serving.registry import Version

# The evidence window is the last n slots before `as_of`: the fewest that hold this many requests with more than
# three candidates, and at most MAX_EVIDENCE_SLOTS. Sparse logs get a longer window, dense ones stay fresh.
MIN_EVIDENCE_REQUESTS = 300
MAX_EVIDENCE_SLOTS = 4
# An early run must learn the hours since the last slot, where the drift is: its evidence is the newest
# so many hours if they hold as many requests. The canary judges on live traffic after that, as always.
EARLY_EVIDENCE_HOURS = (1, 2, 3, 6, 12, 24, 48)
EARLY = ("drift", "quality")  # what asks for a run between two slots

# Teacher safety: an update inherits what its champion believes, the errors too. After each so many updates in a row,
# after this many verdicts `hold` in a row, and when drift asked for the run, a model from scratch competes as well.
UPDATES_BETWEEN_SCRATCH = 8
HELD_RUNNING = 2

TRAINED = "train.json"  # in a run's directory: numbers of each training, by how the model came to be

_ROOMS = (
    "components",
    "engagement",
    "evergreen",
    "feature_repo",
    "model",
    "monitoring",
    "pipelines",
    "serving",
)


class NothingNew(EvergreenError):
    """There is no engagement that the champion has not learned and that a challenger could be judged on."""


@dataclass(frozen=True)
class Plan:
    """What one retrain reads: everything that its result depends on.

    Attributes:
        run_key: Names the run; a function of all inputs but the champion.
        as_of: The instant whose knowledge the run is limited to.
        snapshot: Digest of the data snapshot.
        code: Digest of Evergreen's own source.
        recipe: Name of the model and training configuration (`model/config.py`).
        strategy: Continual-learning strategy asked for.
        seed: Seed of everything random.
        reason: What asked for the run: `slot`, `drift`, `quality` or `person`.
        champion: Registry version that the run starts from and is judged against, empty for the first run.
        champion_digest: Digest of its files, so that later steps can tell an unpacked copy is intact.
        also_scratch: Why a model from scratch is trained beside the update; empty if none is.
        train_start: The table begins here; a model from scratch trains on requests in [train_start, train_end).
        update_start: An update trains on requests in [update_start, train_end): what is new since the champion. Equal
            to `train_start` unless both are trained.
        train_end: The challenger is judged on requests in [train_end, as_of), which neither model has seen.
    """

    run_key: str
    as_of: datetime
    snapshot: str
    code: str
    recipe: str
    strategy: str
    seed: int
    reason: str
    champion: str
    champion_digest: str
    also_scratch: str
    train_start: datetime
    update_start: datetime
    train_end: datetime

    def to_json(self) -> str:
        """One line of JSON, the form in which the plan travels between steps."""
        return json.dumps(asdict(self), default=lambda v: v.isoformat(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`."""
        data = json.loads(text)
        times = {k: datetime.fromisoformat(data[k]) for k in ("as_of", "train_start", "update_start", "train_end")}
        return cls(**{**data, **times, "seed": int(data["seed"])})

    def directory(self, settings: Settings) -> Path:
        """Where this run keeps its checkpoints and its result."""
        return settings.runs / self.run_key


@cache
def code_version() -> str:
    """Digest (12 hex) of Evergreen's Python source: two runs with the same one ran the same code."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for room in _ROOMS for p in (root / room).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def name_run(settings: Settings, snapshot: Snapshot, strategy: str) -> str:
    """The run's name: `<as_of>-<digest of inputs>`. The same inputs always give the same name."""
    inputs = [
        snapshot.as_of.isoformat(),
        snapshot.digest,
        code_version(),
        settings.recipe,
        strategy,
        settings.seed,
    ]
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:10]
    return f"{snapshot.as_of:%Y%m%dT%H%M}-{digest}"


def evidence_start(snapshot: Snapshot, after: datetime | None, reason: str) -> datetime:
    """Start of the evidence window: a slot before `as_of`, or after drift some hours; where given, later than `after`.

    Args:
        snapshot: What is known at `as_of`.
        after: End of the champion's training window; requests before it are no evidence.
        reason: What asked for the run.

    Raises:
        NothingNew: No slot, or no request, lies between the champion's training window and `as_of`.
    """
    early = [snapshot.as_of - timedelta(hours=h) for h in EARLY_EVIDENCE_HOURS if reason in EARLY]
    slots = previous_slots(snapshot.as_of, MAX_EVIDENCE_SLOTS)
    starts = sorted((s for s in {*early, *slots} if after is None or s > after), reverse=True)
    if not starts:
        raise NothingNew(
            f"the champion already learned everything up to {after:%Y-%m-%d %H:%M} and no slot has passed since",
            "Choose a later --as-of",
        )
    times = _comparable_requests(snapshot, starts[-1])
    if not times:
        raise NothingNew(
            f"there are no requests with more than three candidates since {starts[-1]:%Y-%m-%d %H:%M}",
            "Choose another --as-of, or import more engagement",
        )
    enough = (s for s in starts if sum(t >= s for t in times) >= MIN_EVIDENCE_REQUESTS)
    return next(enough, starts[-1])


def _comparable_requests(snapshot: Snapshot, start: datetime) -> list[datetime]:
    """Times of the requests since `start` that have more than three candidates."""
    import polars as pl

    rows = pl.DataFrame(snapshot.engagements(start).select(["request_id", "event_timestamp"]))
    requests = rows.group_by("request_id").agg(pl.len(), pl.col("event_timestamp").min())
    return requests.filter(pl.col("len") > 3)["event_timestamp"].to_list()


def why_also_scratch(reason: str, champion: "Version", newer: "list[Version]") -> str:
    """Why a model from scratch shall compete with the update of this champion; empty if it need not.

    A model from scratch that loses is not tried again before as many updates have passed.

    Args:
        reason: What asked for the run.
        champion: The champion.
        newer: The versions registered after it, newest first.
    """
    from serving.registry import GATE, UPDATES

    verdicts = [v.tags.get(GATE) for v in newer[:HELD_RUNNING]]
    updates = int(champion.tags.get(UPDATES, 0))
    if reason in EARLY:
        return f"asked for by {reason}"
    if verdicts == ["hold"] * HELD_RUNNING:
        return "held twice running"
    if updates and updates % UPDATES_BETWEEN_SCRATCH == 0:
        return f"{updates} updates since scratch"
    return ""


def draw_plan(
    settings: Settings,
    snapshot: Snapshot,
    run_key: str,
    strategy: str,
    reason: str,
    champion: tuple[str, str],
    trained_to: datetime | None,
    also_scratch: str = "",
) -> Plan:
    """The plan of one slot, live or replayed.

    Args:
        settings: The home.
        snapshot: What is known at the slot's instant.
        run_key: The run's name.
        strategy: Continual-learning strategy; `scratch` reads the full history each time.
        reason: What asked for the run.
        champion: The champion's name and the digest of its files; both empty without one.
        trained_to: End of the champion's training window; None without one.
        also_scratch: Why a model from scratch is trained as well; of no effect where the strategy makes one anyway.

    Raises:
        EvergreenError: There is nothing to judge on, or no history to train on.
    """
    train_end = evidence_start(snapshot, trained_to, reason)
    update_start = trained_to if strategy != "scratch" else None
    also_scratch = also_scratch if update_start else ""
    train_start = update_start if update_start and not also_scratch else EngagementStore(settings.data).time_range()[0]
    if (update_start or train_start) >= train_end:
        raise EvergreenError(
            f"there is no history before {train_end:%Y-%m-%d %H:%M} to train on", "Choose a later --as-of"
        )
    return Plan(
        run_key=run_key,
        as_of=snapshot.as_of,
        snapshot=snapshot.digest,
        code=code_version(),
        recipe=settings.recipe,
        strategy=strategy,
        seed=settings.seed,
        reason=reason,
        champion=champion[0],
        champion_digest=champion[1],
        also_scratch=also_scratch,
        train_start=train_start,
        update_start=update_start or train_start,
        train_end=train_end,
    )


def plan_run(settings: Settings, as_of: datetime, strategy: str, reason: str) -> Plan:
    """Plan a retrain; a second call for the same run returns the plan that the first one fixed.

    Raises:
        EvergreenError: There is no data, or nothing new since the champion's training window.
    """
    from serving.registry import CHAMPION, DIGEST, Registry

    snapshot = EngagementStore(settings.data).snapshot(as_of)
    run_key = name_run(settings, snapshot, strategy)
    path = settings.runs / run_key / "plan.json"
    if path.exists():
        path.touch()  # it runs again, as the monitor's `situation_at` sees
        return Plan.from_json(path.read_text())
    registry = Registry(settings)
    versions = registry.versions()
    champion = next((v for v in versions if CHAMPION in v.aliases), None)
    plan = draw_plan(
        settings,
        snapshot,
        run_key=run_key,
        strategy=strategy,
        reason=reason,
        champion=(champion.version, champion.tags[DIGEST]) if champion else ("", ""),
        trained_to=datetime.fromisoformat(champion.tags["train_end"]) if champion else None,
        also_scratch=why_also_scratch(reason, champion, versions[: versions.index(champion)]) if champion else "",
    )
    if champion:
        registry.fetch(champion.version)
    snapshot.save()
    write_text(path, plan.to_json())
    return plan


@step
def make_plan(as_of: str, strategy: str, reason: str) -> str:
    """Fix the run's name, snapshot and windows; returns the plan as JSON."""
    from datetime import datetime

    from components.base import begin
    from components.plan import plan_run

    return plan_run(begin(), datetime.fromisoformat(as_of), strategy, reason).to_json()
