"""A small world full of traps, and what its features must be by the definitions, in plain Python.

Built once a process: Feast is imported and a repository made a single time for all tests of `feature_repo/`.
"""

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.importers import contract_dir
from engagement.snapshot import Snapshot
from engagement.store import EngagementStore
from engagement.table import RankingTable
from feature_repo.repo import FeatureRepo
from tests.synth import START, write_contract_dir

DAY, HOUR, MICRO = timedelta(days=1), timedelta(hours=1), timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ACTIONS = ("save", "click", "hide")
WINDOWS = {"1h": HOUR, "1d": DAY, "7d": 7 * DAY, "30d": 30 * DAY}
AS_OF = START + 55 * DAY + timedelta(hours=3)
WINDOW = (START + 9 * DAY, AS_OF)
UTC_US = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class World:
    home: Path
    snapshot: Snapshot
    repo: FeatureRepo
    table: RankingTable
    sample: pa.Table
    rows: list  # every stored engagement, also those that nobody knew at AS_OF


def scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="features-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def world() -> World:
    home = scratch()
    store = EngagementStore(home / "data")
    store.append(contract_dir.read(_dataset(home / "source")))
    snapshot, repo = store.snapshot(AS_OF), FeatureRepo(home / "features")
    repo.build(snapshot)
    table = repo.table(snapshot, *WINDOW, home / "table")
    repo.materialize(snapshot)
    rows = store.snapshot(START + 400 * DAY).engagements().to_pylist()
    return World(home, snapshot, repo, table, pq.read_table(home / "table" / "sample.parquet"), rows)


def import_synth(home: Path, **options) -> EngagementStore:
    store = EngagementStore(home / "data")
    store.append(contract_dir.read(write_contract_dir(home / "source", **options)))
    return store


def _dataset(path: Path) -> Path:
    """Twelve ordinary days, a month of silence, and then rows that hit every edge."""
    write_contract_dir(path, users=5, items=14, days=12, late_share=0.1)
    shown = pl.read_parquet(path / "engagements").group_by("user_id").agg(pl.col("event_timestamp").max())
    last = dict(shown.iter_rows())  # what is shown in an hour leaves the longest window 30 days after the hour's end
    closed = {u: last[u].replace(minute=0, second=0, microsecond=0) + HOUR + 30 * DAY for u in ("u1", "u4")}
    tick = START + 47 * DAY + 5 * HOUR
    late = START + 45 * DAY + timedelta(hours=10)
    rows = [
        # (request, user, item, shown, known after, save, click, hide)
        ("gap-1", "u0", "i1", late, timedelta(0), True, False, False),
        ("gap-1", "u0", "i2", late + timedelta(seconds=1), timedelta(0), False, False, False),
        # two requests of one user at one instant, and a third exactly when an action became known
        ("tie-1", "u0", "i3", late + timedelta(minutes=5), timedelta(0), False, True, False),
        ("tie-2", "u0", "i4", late + timedelta(minutes=5), timedelta(0), True, True, False),
        ("tie-3", "u0", "i5", late + timedelta(minutes=7), timedelta(0), False, False, True),
        ("slow-1", "u0", "i6", late + timedelta(minutes=2), timedelta(minutes=5), True, False, False),
        # exactly at midnight; a microsecond before the next
        ("midnight-1", "u0", "i1", START + 46 * DAY, timedelta(0), True, False, False),
        ("midnight-2", "u2", "i1", START + 47 * DAY - timedelta(microseconds=1), timedelta(0), True, False, False),
        # shown on day 46, known on day 49 only
        *(("late-1", "u3", f"i{i}", START + 46 * DAY, 3 * DAY, i % 2 == 0, False, i == 3) for i in range(5)),
        # at the end of the time to live of u1's and u4's last numbers, and just after it
        ("ttl-1", "u1", "i7", closed["u1"] + 7 * DAY, timedelta(0), False, False, False),
        ("ttl-2", "u4", "i7", closed["u4"] + 7 * DAY + MICRO, timedelta(0), False, False, False),
        # exactly at ticks and just before one; shown half an hour before a tick and known exactly at it
        ("tick-1", "ticker", "i10", tick, timedelta(0), True, False, False),
        ("tick-2", "ticker", "i10", tick + HOUR, timedelta(0), False, True, False),
        ("tick-3", "ticker", "i11", tick + 2 * HOUR - MICRO, timedelta(0), True, False, False),
        ("tick-4", "ticker", "i10", tick + 2 * HOUR, timedelta(0), False, False, False),
        ("tick-5", "ticker", "i12", tick + HOUR / 2, HOUR / 2, True, False, True),
        ("tick-6", "ticker", "i12", tick + 25 * HOUR, timedelta(0), False, False, False),
        # an item before it was available, and after
        ("fresh-1", "u2", "fresh", START + 50 * DAY, timedelta(0), True, False, False),
        ("fresh-2", "u2", "fresh", START + 51 * DAY + timedelta(hours=7), timedelta(0), False, True, False),
        # an item without a category, and again
        ("bare-1", "u2", "bare", START + 51 * DAY, timedelta(0), True, False, False),
        ("bare-2", "u2", "bare", START + 51 * DAY + 2 * HOUR, timedelta(0), False, False, False),
        # a user of whom nothing is known; a request that nobody knew of at AS_OF; one across AS_OF
        ("new-1", "stranger", "i8", START + 52 * DAY + timedelta(hours=1), timedelta(0), True, False, False),
        ("hidden", "u2", "i9", START + 53 * DAY, 9 * DAY, True, False, False),
        ("edge", "u2", "i9", AS_OF - timedelta(seconds=1), timedelta(0), False, False, False),
        ("edge", "u2", "i8", AS_OF + timedelta(seconds=1), timedelta(0), True, False, False),
    ]
    event = [r[3] for r in rows]
    columns = {
        "request_id": [r[0] for r in rows],
        "user_id": [r[1] for r in rows],
        "item_id": [r[2] for r in rows],
        "event_timestamp": pa.array(event, UTC_US),
        "created_timestamp": pa.array([e + r[4] for e, r in zip(event, rows, strict=True)], UTC_US),
        "position": pa.array([0] * len(rows), pa.int16()),
        **{a: [r[5 + i] for r in rows] for i, a in enumerate(ACTIONS)},
        "surface": [None if r[0] == "gap-1" else "home" for r in rows],
    }
    table = pa.table(columns)
    pq.write_table(pa.concat_tables([table, table.slice(0, 3)]), path / "engagements" / "injected.parquet")
    items = pq.read_table(path / "items" / "items.parquet")
    tags = {"tags": [["a"] * 9]}
    _add(path / "items" / "injected.parquet", items, "fresh", "created_timestamp", START + 51 * DAY, tags)
    _add(path / "items" / "bare.parquet", items, "bare", "created_timestamp", START + 5 * DAY, {"tags": [[]]})
    users = pq.read_table(path / "users" / "users.parquet")
    _add(path / "users" / "a.parquet", users, "u0", "event_timestamp", START + 46 * DAY, {"country": ["at"]})
    _add(path / "users" / "b.parquet", users, "u0", "event_timestamp", AS_OF, {"country": ["future"]})
    return path


def _add(path: Path, like: pa.Table, key: str, time: str, at: datetime, values: dict) -> None:
    first = {n: like.column(n).slice(0, 1) for n in like.column_names}
    changed = {**first, like.column_names[0]: [key], time: pa.array([at], UTC_US), **values}
    pq.write_table(pa.table(changed).cast(like.schema), path)


# --- the definitions -------------------------------------------------------------------------------------------------


def us(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta(microseconds=1)


def known(row: dict) -> datetime:
    return max(row["event_timestamp"], row["created_timestamp"])


def history(rows: list, user: str, t: datetime) -> list:
    """(time, item, mask) of the last hundred actions known strictly before `t`, oldest first."""
    mine = [r for r in rows if r["user_id"] == user and not r["sampled"] and known(r) < t]
    acted = [r for r in mine if any(r[a] for a in ACTIONS)]
    acted.sort(key=lambda r: (known(r), r["event_timestamp"], r["item_id"]))
    masks = [sum(r[a] << i for i, a in enumerate(ACTIONS)) for r in acted]
    return [(us(r["event_timestamp"]), r["item_id"], mask) for r, mask in zip(acted, masks, strict=True)][-100:]


@dataclass(frozen=True)
class Row:
    """An engagement, in microseconds; of no category before its item is available."""

    keys: dict
    shown: int
    known: int
    categorised: int
    actions: dict


def logged(rows: list, items: list) -> list[Row]:
    """Real rows with the category of their item: the first of its tags."""
    of = {i["item_id"]: ((i["tags"] or [None])[0], us(i["created_timestamp"])) for i in items}
    real, found = [r for r in rows if not r["sampled"]], []
    for r in real:
        category, available = of.get(r["item_id"], (None, 0))
        shown, told = us(r["event_timestamp"]), us(r["created_timestamp"])
        keys = {"user_id": r["user_id"], "item_id": r["item_id"], "category": category}
        found.append(Row(keys, shown, told, max(told, available), {a: bool(r[a]) for a in ACTIONS}))
    return found


def stats(rows: list[Row], keys: dict, t: datetime) -> dict:
    """The statistics that a request at `t` reads: those of the newest hour that has a row, unless it expired."""
    tick = t.replace(minute=0, second=0, microsecond=0)
    mine = [r for r in rows if all(r.keys[k] == v for k, v in keys.items())]
    grouped = "category" in keys
    while tick >= t - 7 * DAY:
        if _has_row(mine, us(tick), grouped):
            break
        tick -= HOUR
    else:
        return {}
    found, inside, everyone = {}, mine, rows
    for window in reversed(WINDOWS):  # each is part of the longer one
        inside = [r for r in inside if _inside(r, us(tick), window, grouped)]
        everyone = [r for r in everyone if _inside(r, us(tick), window, False)]
        found[f"impressions_{window}"] = len(inside)
        found[f"count_save_{window}"] = sum(r.actions["save"] for r in inside)
        for action in ACTIONS:
            if action == "save" or window == "30d":
                prior = sum(r.actions[action] for r in everyone) / len(everyone) if everyone else 0.0
                count = sum(r.actions[action] for r in inside)
                found[f"rate_{action}_{window}"] = (count + 20 * prior) / (len(inside) + 20)
    return found


def _has_row(mine: list[Row], tick: int, grouped: bool) -> bool:
    """Whether something entered or left a window at the tick; or it is midnight and the longest one is not empty."""
    if tick % us(EPOCH + DAY) == 0 and any(_inside(r, tick, "30d", grouped) for r in mine):
        return True
    before = tick - us(EPOCH + HOUR)
    return any(_inside(r, tick, w, grouped) != _inside(r, before, w, grouped) for r in mine for w in WINDOWS)


def _inside(row: Row, tick: int, window: str, grouped: bool) -> bool:
    known_at = row.categorised if grouped else row.known
    return tick - WINDOWS[window] // MICRO <= row.shown < tick and known_at < tick
