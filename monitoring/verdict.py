"""What one check found, as a value that travels: JSON in the artifact, read by page, metrics, trigger and alerts."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from engagement.errors import EvergreenError

Kind = Literal["none", "broken", "population", "behaviour"]
"""What most likely moved: nothing; a pipeline that delivers wrong values; who and what is there; what people do."""


@dataclass(frozen=True)
class ColumnDrift:
    """The comparison of one column with its like in the reference.

    Attributes:
        name: A declared feature, `score_<action>`, or for a vocabulary `new <column>`.
        kind: `numeric` (score: normed Wasserstein), `categorical` (Jensen-Shannon distance), `embedding` (area under
            the curve of a classifier that tells the windows apart, 0.5 = it cannot) or `vocabulary` (share of rows with
            a value that the reference did not have).
        group: What the column tells of: `user`, `item`, `context`, `statistic` (trailing numbers), `prediction`.
        score: Distance of the window from its like.
        usual: Median of that score over ordinary past windows.
        threshold: What the score is compared with.
        drifted: `score ≥ threshold`.
        missing: Share of values that are missing, in the reference and now.
        note: What moved, in words: `median 3.1 → 12`, `"lens" 0 % → 100 %`; empty where nothing drifted.
    """

    name: str
    kind: str
    group: str
    score: float
    usual: float
    threshold: float
    drifted: bool
    missing: tuple[float, float]
    note: str = ""

    @property
    def ratio(self) -> float:
        """Score by threshold: drifted from 1 on, whatever the column."""
        return self.score / self.threshold

    @property
    def prediction(self) -> bool:
        """Whether it is a predicted score, not a feature."""
        return self.group == "prediction"


@dataclass(frozen=True)
class SliceDrift:
    """A part of the window in which something moved.

    Attributes:
        slice: `country=nl`, `new users`.
        column: What moved most in it.
        score: Its score there.
        share: Share of the window's requests (or candidates) in the slice.
    """

    slice: str
    column: str
    score: float
    share: float


@dataclass(frozen=True)
class Outcome:
    """What matured labels say of the model's quality.

    Attributes:
        requests: Comparable requests whose labels have matured.
        immature: Requests that are left out because their labels have not: they are not counted as negative.
        hit3: HIT@3 by action.
        interval: Its 95 % bootstrap interval over users, by action.
        predicted: Mean predicted chance by action.
        observed: Rate by action.
        calibration: `predicted / observed` by action; 1 is perfect. Absent where nothing was observed.
        age_hours: From the end of the model's training window to the middle of the matured window.
        expected: HIT@3 of the primary action that a model of this age has, by the age curve; None where it is unknown.
        lost: Whether HIT@3 of the primary action is below what is expected, by more than chance.
        reason: One sentence.
        random: HIT@3 by action that a random order has on the same requests: how easy they are.
        primary: The primary action, which `expected` and `lost` tell of; empty where an earlier release wrote it.
    """

    requests: int
    immature: int
    hit3: dict[str, float]
    interval: dict[str, tuple[float, float]]
    predicted: dict[str, float]
    observed: dict[str, float]
    calibration: dict[str, float]
    age_hours: float
    expected: float | None
    lost: bool
    reason: str
    random: dict[str, float] = field(default_factory=dict)
    primary: str = ""


@dataclass(frozen=True)
class ServingHealth:
    """What the serving log says of the window.

    Attributes:
        requests: Requests that came.
        errors: Share that failed (5xx but for 504).
        shed: Share turned away by overload (429) or too late (504).
        fallbacks: Share of the answers that were degraded, by kind.
        p50_ms: Median latency.
        p99_ms: 99th percentile.
        problems: One sentence for each limit that is passed.
    """

    requests: int
    errors: float
    shed: float
    fallbacks: dict[str, float]
    p50_ms: float | None
    p99_ms: float | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataTest:
    """One test of the data of a window, as it must be before a retrain may use it.

    Attributes:
        name: `volume`, `missing: country`.
        passed: Whether it holds.
        value: What was measured.
        limit: The rule in words: `≥ 120`.
        text: One sentence; for a failed test it says what is wrong.
    """

    name: str
    passed: bool
    value: float
    limit: str
    text: str


@dataclass(frozen=True)
class DriftVerdict:
    """The outcome of one check.

    Attributes:
        as_of: ISO instant of the check.
        model_version: The model that was checked.
        slot: ISO instant of the retrain that made the model.
        window: ISO start and end of the window that was looked at.
        drifted: Whether any column is above its threshold; never for a window that is too small or empty.
        kind: What most likely moved.
        evidence: Sentences that speak for that kind, the strongest first.
        reason: One sentence for the whole check.
        columns: Every compared column.
        slices: Where it moved, worst first.
        broken: What is wrong with each column whose feed looks broken. Such a window must not be trained on.
        skipped: Why each other column was not compared.
        requests: In the reference and in the window.
        rows: Likewise.
        users: Likewise, estimated for the reference.
        late: Share of the window's rows that became known more than an hour after they happened.
        data: Every test of the window's data.
        outcome: Quality on matured labels; None where none have matured.
        serving: The serving log; None where nothing was logged.
        skew: Features that serving reads otherwise than training, each with how many values and why.
        skew_share: Share of all compared values that differ; None where the parity was not looked at.
        reference: Digest of the reference.
        code: Version of the code.
    """

    as_of: str
    model_version: str
    slot: str
    window: tuple[str, str]
    drifted: bool
    kind: Kind
    evidence: tuple[str, ...]
    reason: str
    columns: tuple[ColumnDrift, ...]
    slices: tuple[SliceDrift, ...]
    broken: dict[str, str]
    skipped: dict[str, str]
    requests: tuple[int, int]
    rows: tuple[int, int]
    users: tuple[int, int]
    late: float = 0.0
    data: tuple[DataTest, ...] = ()
    outcome: Outcome | None = None
    serving: ServingHealth | None = None
    skew: dict[str, str] = field(default_factory=dict)
    skew_share: float | None = None
    reference: str = ""
    code: str = ""

    @property
    def worst(self) -> tuple[ColumnDrift, ...]:
        """Every compared column, the one furthest above its threshold first."""
        return tuple(sorted(self.columns, key=lambda c: -c.ratio))

    @property
    def drifted_columns(self) -> tuple[str, ...]:
        """Names of the drifted columns, worst first."""
        return tuple(c.name for c in self.worst if c.drifted)

    @property
    def share(self) -> float:
        """Share of the compared features, predictions not among them, that drifted; 0 where none were compared."""
        features = [c.drifted for c in self.columns if not c.prediction]
        return sum(features) / len(features) if features else 0.0

    def to_json(self) -> str:
        """JSON text that `from_json` reads back, in the same order: the primary action stays the first."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "DriftVerdict":
        """The inverse of `to_json`."""
        data = json.loads(text)
        found = {name: _READ.get(name, _same)(data[name]) for name in (f.name for f in fields(cls)) if name in data}
        return cls(**found)

    @classmethod
    def load(cls, path: Path) -> "DriftVerdict":
        """Read a saved verdict.

        Raises:
            EvergreenError: The file is missing or not a verdict.
        """
        try:
            return cls.from_json(path.read_text())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{path} holds no drift verdict ({error})"
            raise EvergreenError(problem, "Run the drift check again") from error


def _same(value: Any) -> Any:
    return value


def _column(data: dict[str, Any]) -> ColumnDrift:
    return ColumnDrift(**{**data, "missing": tuple(data["missing"])})


def _outcome(data: dict[str, Any] | None) -> Outcome | None:
    return data and Outcome(**{**data, "interval": {a: tuple(i) for a, i in data["interval"].items()}})  # type: ignore[return-value]


def _serving(data: dict[str, Any] | None) -> ServingHealth | None:
    return data and ServingHealth(**{**data, "problems": tuple(data["problems"])})  # type: ignore[return-value]


_READ: dict[str, Any] = {
    **dict.fromkeys(("window", "evidence", "requests", "rows", "users"), tuple),
    "columns": lambda held: tuple(_column(c) for c in held),
    "slices": lambda held: tuple(SliceDrift(**s) for s in held),
    "data": lambda held: tuple(DataTest(**t) for t in held),
    "outcome": _outcome,
    "serving": _serving,
}
