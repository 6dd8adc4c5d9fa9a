"""What most likely moved: a pipeline that delivers wrong values, who and what is there, or what people do.

What tells them apart is which columns moved together, and how. A broken feed moves one source and nothing beside it,
or maps its values (another unit, a default in place of many values). Another population moves profiles, contexts and
vocabularies, and what is counted of them follows. Another behaviour moves what is counted and predicted while the
profiles stay as they were.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from monitoring.shape import default_fill, unit_change
from monitoring.verdict import ColumnDrift, Kind, Outcome, SliceDrift

if TYPE_CHECKING:
    from monitoring.compare import Pair

BEHAVIOUR = ("statistic", "prediction")
"""Groups that tell what people do, or what the model expects them to do; all others tell who and what is there."""

ALONE_RATIO = 2.5
"""A source that moved alone looks broken if its score is **≥** this many thresholds; below, it is a mild movement."""

BESIDE = 0.5
"""One other column may have drifted, too, with **<** this share of its ratio: that much happens by chance."""

MISSING_RISE = 0.2
"""Missing values of a source that moved alone speak for a broken feed from this rise on."""

STRENGTH = 4.0
"""A column that passed its threshold many times over speaks no louder than one that passed it so many times."""

PROFILE_SHARE = 0.35
"""It is the population if profiles hold **≥** this share of all that moved.

Less than half: counts and rates of new users and items differ from those of old ones, so a moved population moves
them too, but other behaviour moves no profile."""

CALIBRATION = 1.5
"""Predicted by observed chance beyond which, either way, people do something else than the model expects."""

SENTENCES = 6


def diagnose(
    columns: Sequence[ColumnDrift],
    broken: Mapping[str, str],
    outcome: Outcome | None,
    slices: Sequence[SliceDrift],
    pairs: "Sequence[Pair]" = (),
) -> tuple[Kind, tuple[str, ...]]:
    """The likely kind of a drift, with sentences that speak for it, the strongest first.

    Args:
        columns: Every compared column.
        broken: What is wrong with each column that cannot be right: gone, stuck, missing.
        outcome: Quality on matured labels.
        slices: Where it moved.
        pairs: Both sides of the compared columns: with them, another unit and a default value are recognised.
    """
    if broken:
        return "broken", _told([f"{name} {why}" for name, why in broken.items()], slices)
    moved = sorted((c for c in columns if c.drifted), key=lambda c: -c.ratio)
    if not moved:
        return "none", ()
    wrong = _wrong_values(columns, moved, {p.name: p for p in pairs})
    if wrong:
        return "broken", _told(wrong, slices)
    profiles = [c for c in moved if c.group not in BEHAVIOUR]
    deeds = [c for c in moved if c.group in BEHAVIOUR]
    who = _strength(profiles)
    if who > 0 and who >= PROFILE_SHARE * (who + _strength([c for c in deeds if not c.prediction])):
        follow = [f"{_listed(deeds)} followed"] if deeds else []
        return "population", _told([*_sentences(profiles), *follow], slices)
    still = [] if profiles else ["No column of users, items or contexts moved"]
    return "behaviour", _told([*_calibration(outcome), *_sentences(deeds), *still], slices)


def source(name: str) -> str:
    """Where a column comes from: trailing numbers from their view, each profile column from a feed of its own."""
    view = name.split("__")[0]
    return view if view.endswith("_stats") else name.removeprefix("new ")


def _wrong_values(
    columns: Sequence[ColumnDrift], moved: Sequence[ColumnDrift], pairs: Mapping[str, "Pair"]
) -> list[str]:
    """Why the source that moved most looks broken; empty if it does not."""
    worst = next((c for c in moved if not c.prediction), None)
    if worst is None:
        return []
    beside = [c for c in columns if source(c.name) != source(worst.name) and not c.prediction]
    others = sorted((c.ratio for c in beside if c.drifted), reverse=True)
    alone = not others or (len(others) == 1 and others[0] < BESIDE * worst.ratio)
    pair = pairs.get(worst.name)
    found = []
    if pair is not None and sum(c.drifted for c in beside) <= len(beside) // 4:
        found += [f"{worst.name} {how}" for how in (unit_change(pair),) if how]
    if alone and pair is not None:
        found += [f"{worst.name} {how}" for how in (default_fill(pair),) if how]
    rise = worst.missing[1] - worst.missing[0]
    if alone and rise >= MISSING_RISE:
        found.append(f"{worst.name} is missing in {worst.missing[1]:.0%} of the rows, {worst.missing[0]:.0%} before")
    hard = worst.ratio >= ALONE_RATIO and worst.kind != "vocabulary"
    if alone and (found or hard):
        rest = f"of the {len(beside)} columns of other sources {len(others) or 'none'} did"
        found.append(f"{source(worst.name)} moved alone ({_column(worst)}); {rest}")
    return found


def _strength(columns: Sequence[ColumnDrift]) -> float:
    """How loud columns speak: a source as loud as its loudest, for many trailing counts of the same rows are one."""
    loudest: dict[str, float] = {}
    for column in columns:
        held = loudest.get(source(column.name), 0.0)
        loudest[source(column.name)] = max(held, min(column.ratio, STRENGTH))
    return sum(loudest.values())


def _calibration(outcome: Outcome | None) -> list[str]:
    held = outcome.calibration if outcome else {}
    off = {a: c for a, c in held.items() if not 1 / CALIBRATION < c < CALIBRATION}
    return [f"{a} is predicted {c:.2f} times as often as it is observed" for a, c in off.items()]


def _sentences(columns: Sequence[ColumnDrift]) -> list[str]:
    return [f"{c.name} moved: {_column(c)}" for c in columns]


def _column(column: ColumnDrift) -> str:
    note = f"{column.note}; " if column.note else ""
    return f"{note}score {column.score:.2f}, threshold {column.threshold:.2f}"


def _listed(columns: Sequence[ColumnDrift]) -> str:
    names = [c.name for c in columns]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _told(sentences: Sequence[str], slices: Sequence[SliceDrift]) -> tuple[str, ...]:
    """The strongest sentences, and where it moved most."""
    where = [f"Most of it in {s.slice} ({s.share:.0%} of the rows): {s.column}" for s in slices[:1]]
    return (*sentences[:SENTENCES], *where)
