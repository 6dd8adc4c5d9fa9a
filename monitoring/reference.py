"""What a model knows of the world it was trained on, small enough to travel with it."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engagement.errors import EvergreenError
from engagement.table import RankingTable, TableSpec, micros
from monitoring import rules
from monitoring.cells import load_cells, save_cells
from monitoring.like import Cell, begins, cells_of, ends
from monitoring.sketch import Sketch, Vocabulary, centres_of, feature_blocks, joined, together, vocabulary
from monitoring.stack import Stack

if TYPE_CHECKING:
    from monitoring.compare import Window

DIRECTORY = "reference"  # in a bundle
OLD = "reference.parquet"  # what bundles of earlier releases held
CELLS, PREDICTIONS, VOCABULARIES = "cells.parquet", "predictions.parquet", "vocabularies.parquet"
FORMAT = 1
_WHOLE = ("", 0)
_HOUR = 3_600_000_000


@dataclass(frozen=True)
class Reference:
    """The reference of one model.

    Attributes:
        spec: What the columns mean.
        start: Of what was learned, its parents' share included, as far back as it is kept.
        end: Of the training window.
        hours: Length of the windows that checks look at: the fewest whole hours that usually hold enough requests.
        centres: By name of a numeric feature.
        names: Of frequent categories, by column, then by hash.
        cells: One sketch for each (week, hour-of-week cell) that was seen (`monitoring/like.py`).
        usual: By column, the scores that past windows of this length had against the weeks before each.
        holidays: Days (ISO dates) that count as Sundays.
        predictions: Likewise one sketch a cell, of what this model itself predicts; its parents' are not kept.
        vocabularies: By hashed column, every value that the model or its parents learned.
        users: How many users a window of this length usually has.
        rows: And how many rows.
        slot: ISO instant of the retrain that made the model.
        began: When the first model of its line began to learn: how long trailing numbers had to fill.
    """

    spec: TableSpec
    start: datetime
    end: datetime
    hours: int
    centres: Mapping[str, float]
    names: Mapping[str, Mapping[int, str]]
    cells: Mapping[Cell, Sketch]
    usual: Mapping[str, tuple[float, ...]]
    holidays: frozenset[str]
    predictions: Mapping[Cell, Sketch] = field(default_factory=dict)
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    users: float = 0.0
    rows: float = 0.0
    slot: str = ""
    began: datetime | None = None

    @classmethod
    def of(cls, window: "Window", parent: "Reference | None", holidays: frozenset[str] = frozenset()) -> "Reference":
        """The reference of a model that was trained on `window`; of an update, what its parent knew is kept.

        Args:
            window: What was learned. Its scored `part` may reach beyond its end: what a model predicts of requests that
                it did not learn from is the better reference of its predictions.
            parent: Of the champion that was updated; None for a model from scratch; no use if its features differ.
            holidays: Days that count as Sundays.
        """
        from monitoring.calibrate import calibrate

        table, spec = window.table, window.table.spec
        known = parent if parent and parent.spec == spec else None
        centres = known.centres if known else centres_of(table)
        newest = table.between(micros(window.end - timedelta(days=rules.PAST_MOST)), micros(window.end))
        hours, users, rows = window_hours(newest, window.start, window.end)
        found = cls(
            spec=spec,
            start=window.start,
            began=window.start,
            end=window.end,
            hours=hours,
            centres=centres,
            names=window.names,
            cells={k: _slim(s) for k, s in cells_of(newest, holidays, centres).items()},
            usual={},
            holidays=holidays,
            predictions=cells_of(window.part, holidays, {}, window.scores) if window.part.requests else {},
            vocabularies={f.name: vocabulary(block.ravel()) for f, block in feature_blocks(table) if f.hashed},
            users=users,
            rows=rows,
        )
        whole = found if known is None else found._after(known)
        return calibrate(whole, replace(window, table=newest), known)._newest()

    def _after(self, parent: "Reference") -> "Reference":
        """With what a parent knew of the time before."""
        cells = {k: s for k, s in parent.cells.items() if ends(k) <= self.start or parent.end <= self.start}
        names = {c: {**parent.names.get(c, {}), **self.names.get(c, {})} for c in {*parent.names, *self.names}}
        return replace(
            self,
            start=min(self.start, parent.start),
            began=parent.began or parent.start,
            names=names,
            cells=_merged(cells, self.cells),
            vocabularies={n: joined([parent.vocabularies[n], v]) for n, v in self.vocabularies.items()},
        )

    def _newest(self) -> "Reference":
        """Without the cells that are older than what is kept."""
        oldest = self.end - timedelta(days=rules.KEEP_DAYS)
        cells = {k: s for k, s in self.cells.items() if ends(k) > oldest}
        return replace(self, start=max(self.start, oldest), cells=cells)

    @cached_property
    def stack(self) -> Stack:
        """Every column of the cells, ready to be mixed."""
        return Stack.of(self.cells)

    @cached_property
    def predicted(self) -> Stack:
        """Likewise of the predictions."""
        return Stack.of(self.predictions)

    @cached_property
    def totals(self) -> tuple[int, int, int]:
        """Requests, rows and (estimated) distinct users of what is kept."""
        users = self.vocabularies.get("user_id")
        held = self.cells.values()
        return sum(s.requests for s in held), sum(s.rows for s in held), round(users.distinct) if users else 0

    @cached_property
    def digest(self) -> str:
        """Names it: 12 hex digits of the SHA-256 of what `save` writes."""
        with tempfile.TemporaryDirectory() as room:
            self.save(Path(room))
            files = [file.read_bytes() for file in sorted(Path(room).iterdir())]
        return hashlib.sha256(b"".join(files)).hexdigest()[:12]

    def thin(self, users: int, rows: int) -> float:
        """`rules.thin` of a window, by what is scarcer in it: people for their columns, rows for those of items."""
        return min(rules.thin(users, self.users), rules.thin(rows, self.rows))

    def save(self, directory: Path) -> None:
        """Write it; the same reference gives the same bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        save_cells(directory / CELLS, self.cells)
        save_cells(directory / PREDICTIONS, self.predictions)
        save_cells(directory / VOCABULARIES, {_WHOLE: Sketch(0, 0, {}, self.vocabularies)})
        told = {
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "start": self.start.isoformat(),
            "end": self.end.isoformat(),
            "hours": self.hours,
            "users": self.users,
            "rows": self.rows,
            "slot": self.slot,
            "began": (self.began or self.start).isoformat(),
            "centres": dict(self.centres),
            "names": {c: {str(h): n for h, n in sorted(names.items())} for c, names in self.names.items()},
            "usual": {c: list(scores) for c, scores in self.usual.items()},
            "holidays": sorted(self.holidays),
        }
        (directory / "reference.json").write_text(json.dumps(told, indent=1, sort_keys=True))

    @classmethod
    def load(cls, directory: Path) -> "Reference":
        """Read it.

        Args:
            directory: `<bundle>/reference`.

        Raises:
            EvergreenError: There is none, or it is of an earlier release.
        """
        try:
            told = json.loads((directory / "reference.json").read_text())
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']}, not {FORMAT}")
            return cls(
                spec=TableSpec.from_json(told["spec"]),
                start=datetime.fromisoformat(told["start"]),
                end=datetime.fromisoformat(told["end"]),
                hours=told["hours"],
                users=told["users"],
                rows=told["rows"],
                began=datetime.fromisoformat(told.get("began", told["start"])),
                slot=told["slot"],
                centres=told["centres"],
                names={c: {int(h): n for h, n in names.items()} for c, names in told["names"].items()},
                cells=load_cells(directory / CELLS),
                usual={c: tuple(scores) for c, scores in told["usual"].items()},
                holidays=frozenset(told["holidays"]),
                predictions=load_cells(directory / PREDICTIONS),
                vocabularies=load_cells(directory / VOCABULARIES)[_WHOLE].vocabularies,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "Retrain: a model brings its reference along"
            if (directory.parent / OLD).exists() and not directory.exists():
                raise EvergreenError("this model's drift reference is of an earlier release", remedy) from error
            raise EvergreenError(f"{directory} holds no drift reference ({error})", remedy) from error


def window_hours(table: RankingTable, start: datetime, end: datetime) -> tuple[int, float, float]:
    """The shortest of `rules.HOURS` whose windows usually hold enough, and such windows' median users and rows."""
    hours, users, rows = rules.HOURS[-1], 0.0, 0.0
    for hours in rules.HOURS:
        edges = np.arange(micros(end), micros(start) - 1, -hours * _HOUR)[: rules.HOURS_WINDOWS + 1][::-1]
        if len(edges) < 2:
            break
        at = np.searchsorted(table.time, edges)
        rows = float(np.median(np.diff(table.offsets[at])))
        many = [len(np.unique(table.user_id[a:b])) for a, b in zip(at, at[1:], strict=False)]
        users = float(np.median(many))
        if rows >= rules.ENOUGH_ROWS and users >= rules.ENOUGH_USERS:
            break
    return hours, users, rows


def _slim(cell: Sketch) -> Sketch:
    """Without vocabularies, that are kept as one, and with fewer vectors."""
    vectors = {
        n: replace(v, sample=_coarse(v.sample[:: max(1, -(-len(v.sample) // rules.CELL_VECTORS))]))
        for n, v in cell.vectors.items()
    }
    return replace(cell, vocabularies={}, vectors=vectors)


def _coarse(sample: np.ndarray) -> np.ndarray:
    """To ten bits of precision, which compress to half; not as a float16, in which large numbers are infinite."""
    return (np.ascontiguousarray(sample, np.float32).view(np.uint32) & np.uint32(0xFFFF_E000)).view(np.float32)


def _merged(old: Mapping[Cell, Sketch], new: Mapping[Cell, Sketch]) -> dict[Cell, Sketch]:
    both = {k: together([old[k], new[k]]) if k in old and k in new else old.get(k) or new[k] for k in {*old, *new}}
    return {k: _slim(both[k]) for k in sorted(both, key=begins)}
