"""Checks to record, page and panel: verdicts and pairs as a drift check makes them."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from monitoring import page
from monitoring.compare import Pair
from monitoring.counts import Counts, aligned, categories, numbers
from monitoring.distance import jensenshannon, wasserstein
from monitoring.verdict import ColumnDrift, DataTest, DriftVerdict, Outcome, ServingHealth, SliceDrift

FIRST = datetime(2026, 3, 2, 3, tzinfo=UTC)
MODEL = "homefeed-ranker"
COUNTRIES = {3: "nl", 7: "de", 11: "fr"}


def pairs(shift: float = 0.0, rows: int = 40_000, seed: int = 0) -> list[Pair]:
    """Two numbers and a category; the first number and the category move by `shift`."""
    draw = np.random.default_rng(seed)

    def number(name: str, before: np.ndarray, now: np.ndarray) -> Pair:
        centre = float(np.median(before))
        return Pair(name, "numeric", centre, numbers(before, centre), numbers(now, centre), {})

    def country(share: float, n: int) -> Counts:
        return categories(draw.choice(list(COUNTRIES), n, p=[0.6 - share, 0.3, 0.1 + share]).astype(np.int64))

    few = rows // 4
    spend = (draw.lognormal(0, 1, rows), draw.lognormal(shift, 1, few))
    nl = Pair("country", "categorical", 0.0, country(0, rows), country(min(shift / 2, 0.5), few), COUNTRIES)
    age = (draw.normal(40, 12, rows).astype(int), draw.normal(40, 12, few).astype(int))
    return [number("spend", *spend), number("age_years", *age), nl]


def score(pair: Pair) -> float:
    """Our score of a pair, of all rows."""
    numeric = pair.kind == "numeric"
    at, *sides = aligned(pair.reference, pair.current, pair.centre if numeric else None)
    return wasserstein(at, *sides) if numeric else jensenshannon(*sides)


def column(name: str, value: float, kind: str = "numeric", group: str = "user", note: str = "") -> ColumnDrift:
    return ColumnDrift(name, kind, group, value, 0.05, 0.2, value >= 0.2, (0.01, 0.02), note if value >= 0.2 else "")


def verdict(
    drawn: Sequence[Pair] = (), as_of: datetime = FIRST, version: str = "7", hit3: float = 0.30
) -> DriftVerdict:
    """What a check says of these pairs, with everything else that a verdict can hold."""
    note = {"country": '"nl" 60 % → 30 %', "spend": "median 1.0 → 2.7"}
    columns = [column(p.name, score(p), p.kind, note=note.get(p.name, "")) for p in drawn]
    drifted = any(c.drifted for c in columns)
    columns += [column("score_save", 0.04, group="prediction"), column("new item_id", 0.05, "vocabulary", "item")]
    found = sum(c.drifted for c in columns)
    return DriftVerdict(
        as_of=as_of.isoformat(),
        model_version=version,
        slot=(FIRST - timedelta(days=3)).isoformat(),
        window=((as_of - timedelta(hours=6)).isoformat(), as_of.isoformat()),
        drifted=drifted,
        kind="population" if drifted else "none",
        evidence=("profiles moved, statistics did not",) if drifted else (),
        reason=f"{found} of {len(columns)} columns drifted: country" if drifted else "No column is above its threshold",
        columns=tuple(columns),
        slices=(SliceDrift("country=nl", "spend", 0.61, 0.3),) if drifted else (),
        broken={},
        skipped={"hour_of_day": "a clock"},
        requests=(9000, 2000),
        rows=(90_000, 20_000),
        users=(700, 300),
        late=0.01,
        data=(DataTest("volume", True, 2000, "≥ 120", "2000 requests"),),
        outcome=outcome(hit3),
        serving=ServingHealth(2500, 0.001, 0.0, {"popular": 0.002}, 8.0, 21.0),
        skew_share=0.002,
        reference="ab" * 20,
        code="fcd733d",
    )


def outcome(hit3: float, lost: bool = False) -> Outcome:
    shares, reason = {"save": 0.05}, f"HIT@3/save {hit3:.3f} {'is below' if lost else 'is as'} expected"
    interval, age = {"save": (hit3 - 0.02, hit3 + 0.02)}, 40.0
    return Outcome(900, 1100, {"save": hit3}, interval, shares, {"save": 0.06}, {"save": 0.83}, age, 0.31, lost, reason)


def write_check(checks: Path, as_of: datetime, drawn: Sequence[Pair] = (), **changed: object) -> Path:
    """A finished check in its place among the others; returns its directory."""
    out = checks / f"{as_of:%Y%m%dT%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    found = replace(verdict(drawn, as_of), **changed)  # type: ignore[arg-type]
    page.save(found, drawn, out)
    (out / "drift.json").write_text(found.to_json())
    return out
