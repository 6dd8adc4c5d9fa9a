"""The log day by day: how much came, from how many, how late, and what could not be used.

Tests of a window's data (`data_tests.py`) compare days with earlier days. Reading is a day at a time and a few columns,
so memory does not grow with the length of the log.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import numpy as np
import polars as pl

from engagement.contract import TIMESTAMP
from engagement.files import read_part
from engagement.reading import frame, reading
from engagement.snapshot import Snapshot
from engagement.table import RankingTable

LATE = timedelta(hours=1)
"""A row is late if it became known **>** this after it was shown."""

STRETCHED = timedelta(days=1)
"""A request is stretched if its rows were shown **>** this apart: a clock jumped, or an id was used twice."""

AHEAD = timedelta(days=1)
"""Rows in quarantine for a time in the future belong to a window if they claim to be from before its end and this."""

HARMLESS = ("duplicate", "changed")
"""Reasons of the quarantine that lose nothing: the store holds the row."""

CONTRADICTS = ("other_user", "repeated_item")
"""Reasons for which a row of the same key is in the store, and one of the two is wrong."""


@dataclass(frozen=True)
class Day:
    """One UTC day of the log; candidates that were drawn, not logged, count nowhere.

    Attributes:
        rows: Candidates shown.
        users: Users to whom.
        acted: Rows with each action.
        late: Rows that became known late (`LATE`).
        hours: Hours of the day (0 to 23) in which something was shown.
    """

    rows: int
    users: int
    acted: Mapping[str, int]
    late: int
    hours: frozenset[int]


@dataclass(frozen=True)
class Log:
    """What a snapshot says of a window and the days before it.

    Attributes:
        days: Each day that has a row.
        actions: Names of the actions, the primary one first.
        requests: Requests of the window's days.
        stretched: Those of them that are stretched (`STRETCHED`).
        quarantined: Rows of the window in the quarantine that the store lacks, by reason; `HARMLESS` ones not.
    """

    days: Mapping[date, Day]
    actions: tuple[str, ...]
    requests: int
    stretched: int
    quarantined: Mapping[str, int]


def read_log(snapshot: Snapshot, table: RankingTable, start: datetime, end: datetime, before: timedelta) -> Log:
    """Read a window and what came before it.

    Args:
        snapshot: What was known.
        table: Ranking table of the window, to tell which bad rows were delivered again and are good now.
        start: Start of the window.
        end: Its end.
        before: How far back the days before it are read.
    """
    manifest = snapshot.manifest
    others = tuple(a for a in manifest.actions if a != manifest.primary_action)
    actions = (manifest.primary_action, *others)
    days = {d: _day(rows, actions) for d, rows in _days(snapshot, start - before, end, ["user_id", *actions])}
    requests, stretched = _requests(snapshot, start, end)
    return Log(days, actions, requests, stretched, _quarantined(snapshot, table, start, end))


def volume(snapshot: Snapshot, start: datetime, end: datetime) -> tuple[int, int]:
    """Rows that were shown in [start, end) and are known, and how many of them became known late."""
    shown, known = pl.col("event_timestamp"), pl.col("created_timestamp")
    wanted = shown.is_between(start, end, closed="left")
    parts = [rows.filter(wanted) for _, rows in _days(snapshot, start, end, [])]
    return sum(rows.height for rows in parts), sum(rows.filter(known - shown > LATE).height for rows in parts)


def _days(
    snapshot: Snapshot, start: datetime, end: datetime, columns: list[str]
) -> Iterator[tuple[date, pl.DataFrame]]:
    """Logged rows of each UTC day that overlaps [start, end), as known at the snapshot's instant."""
    by_day: dict[date, list[str]] = {}
    for part in snapshot.parts("engagements"):
        day = date.fromisoformat(part.path.split("/")[1].removeprefix("day="))
        if start.date() <= day <= end.date():
            by_day.setdefault(day, []).append(part.path)
    wanted = ["event_timestamp", "created_timestamp", "sampled", *columns]
    seen = pl.all_horizontal(pl.col("event_timestamp", "created_timestamp") < snapshot.as_of) & ~pl.col("sampled")
    for day, paths in sorted(by_day.items()):
        yield day, pl.concat([frame(read_part(snapshot.root / p, wanted)).filter(seen) for p in paths])


def _day(rows: pl.DataFrame, actions: tuple[str, ...]) -> Day:
    shown, known = pl.col("event_timestamp"), pl.col("created_timestamp")
    told = rows.select(
        *(pl.col(a).sum().alias(f"acted {a}") for a in actions),
        users=pl.col("user_id").hash().n_unique(),
        late=(known - shown > LATE).sum(),
    ).row(0, named=True)
    return Day(
        rows=rows.height,
        users=told["users"],
        acted={a: told[f"acted {a}"] for a in actions},
        late=told["late"],
        hours=frozenset(rows["event_timestamp"].dt.hour().unique().to_list()),
    )


def _requests(snapshot: Snapshot, start: datetime, end: datetime) -> tuple[int, int]:
    """Requests with a row in the days of the window, and how many of them are stretched."""
    first, last = pl.col("event_timestamp").min().alias("first"), pl.col("event_timestamp").max().alias("last")
    spans = [
        rows.group_by(pl.col("request_id").hash()).agg(first, last)
        for _, rows in _days(snapshot, start, end, ["request_id"])
    ]
    if not spans:
        return 0, 0
    whole = pl.concat(spans).group_by("request_id").agg(pl.col("first").min(), pl.col("last").max())
    return whole.height, int((whole["last"] - whole["first"] > STRETCHED).sum())


def _quarantined(snapshot: Snapshot, table: RankingTable, start: datetime, end: datetime) -> dict[str, int]:
    """Bad rows that claim to be of the window and are not in the store, by reason; each row of a file counts once."""
    files = sorted(p for p in (snapshot.root / "quarantine").glob("*.parquet") if not p.name.startswith("corrupt-"))
    kept = ["table", "reason", "file", "row_number", "row"]
    wanted = (pl.col("table") == "engagements") & ~pl.col("reason").is_in(HARMLESS)
    bad = [frame(read_part(p, kept)).filter(wanted) for p in files]
    rows = pl.concat(bad).unique(["file", "row_number", "row"]) if bad else pl.DataFrame()
    if not rows.height:
        return {}
    given = [pl.col("row").str.json_path_match(f"$.{n}").alias(n) for n in ("request_id", "item_id", "event_timestamp")]
    rows = rows.select("reason", *given)
    shown = reading(rows["event_timestamp"], TIMESTAMP)
    ahead = rows["reason"] == "future_timestamp"
    rows = rows.filter((shown >= start) & ((shown < end) | (ahead & (shown < end + AHEAD))))
    wrong = rows.filter(pl.col("reason").is_in(CONTRADICTS) | _lacking(rows, table))
    return dict(sorted(wrong.group_by("reason").len().iter_rows()))


def _lacking(rows: pl.DataFrame, table: RankingTable) -> pl.Series:
    """Whether the table lacks each row's request and item: what was delivered again, corrected, is there."""
    asked = np.array([r.encode() for r in rows["request_id"].drop_nulls().unique()], dtype=np.bytes_)
    found = np.flatnonzero(np.isin(table.request_id, asked)).tolist()
    held = {
        (table.request_id[i].decode(), item.decode())
        for i in found
        for item in table.item_id[table.offsets[i] : table.offsets[i + 1]].tolist()
    }
    pairs = zip(rows["request_id"], rows["item_id"], strict=True)
    return pl.Series([pair not in held for pair in pairs], dtype=pl.Boolean)
