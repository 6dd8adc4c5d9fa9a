"""What one drift check found, as a value that travels: JSON in the artifact, its reason in page and log."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engagement.errors import EvergreenError


@dataclass(frozen=True)
class ColumnDrift:
    """The comparison of one column.

    Attributes:
        name: Column name.
        kind: `numeric` or `categorical`.
        prediction: Whether it is a predicted score, not a feature.
        score: Distance between the windows, by `rules.METHOD[kind]`.
        floor: What chance alone reaches for these windows.
        threshold: What the score is compared with.
        drifted: `score ≥ threshold`.
        missing: Share of rows without a value, in the reference and now.
    """

    name: str
    kind: str
    prediction: bool
    score: float
    floor: float
    threshold: float
    drifted: bool
    missing: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Score by threshold: drifted from 1 on, whatever the column."""
        return self.score / self.threshold


@dataclass(frozen=True)
class DriftVerdict:
    """The outcome of one check.

    Attributes:
        drifted: Whether the window drifted by `rules.window_drifted`; never for a window too small or empty.
        reason: One sentence.
        as_of: ISO instant of the check.
        model_version: The model whose reference this was.
        share: Share of drifted features among the tested ones, by `rules.drift_share`.
        columns: Every compared column, features first.
        broken: What is wrong with each column whose feed looks broken. Such a window must not be trained on.
        skipped: Why each other column was not compared.
        churn: Share of current rows with a value unseen in the reference, by column.
        rows: Rows that were compared, in the reference and now.
        users: Users among them.
        window_rows: Rows that were given; more than `rows` if a window was sampled.
        quality: Numbers recorded with the check, such as `HIT@3/save`.
        skew: Features that serving reads otherwise than training, each with how many values and why.
        skew_share: Share of all compared values that differ; None where the parity was not looked at.
    """

    drifted: bool
    reason: str
    as_of: str
    model_version: str
    share: float
    columns: tuple[ColumnDrift, ...]
    broken: dict[str, str]
    skipped: dict[str, str]
    churn: dict[str, float]
    rows: tuple[int, int]
    users: tuple[int, int]
    window_rows: tuple[int, int]
    quality: dict[str, float]
    skew: dict[str, str] = field(default_factory=dict)
    skew_share: float | None = None

    @property
    def worst(self) -> tuple[ColumnDrift, ...]:
        """Every compared column, the one furthest above its threshold first."""
        return tuple(sorted(self.columns, key=lambda c: -c.ratio))

    @property
    def drifted_columns(self) -> tuple[str, ...]:
        """Names of the drifted columns, worst first."""
        return tuple(c.name for c in self.worst if c.drifted)

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "DriftVerdict":
        """The inverse of `to_json`."""
        data = json.loads(text)
        columns = [ColumnDrift(**{**c, "missing": tuple(c["missing"])}) for c in data["columns"]]
        pairs = {name: tuple(data[name]) for name in ("rows", "users", "window_rows")}
        return cls(**{**data, **pairs, "columns": tuple(columns)})

    @classmethod
    def load(cls, path: Path) -> "DriftVerdict":
        """Read a saved verdict.

        Raises:
            EvergreenError: The file is missing or not a verdict.
        """
        try:
            return cls.from_json(path.read_text())
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = f"{path} holds no drift verdict ({error})"
            raise EvergreenError(problem, "Run the drift check again") from error
