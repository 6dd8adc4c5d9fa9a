"""Trailing numbers: a backfill, the next day alone, and the same windows by hand in DuckDB from the raw log.

`python -m benchmarks.features.aggregates [SCALE [RUNS]]` prints the table; SCALE is in millions of rows.
"""

import hashlib
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Measured, measure, median
from engagement.contract import Manifest, engagement_schema
from engagement.files import write_part
from engagement.index import Part, save_index, to_us
from engagement.store import EngagementStore

START, DAY, DAYS = datetime(2024, 1, 1, tzinfo=UTC), timedelta(days=1), 35
SHOWN = 10  # items a request
MANIFEST = Manifest("generated", ("save", "click", "hide"), "save", "impressions", ("hide",), (), ("kinds",))
WINDOWS = {"1h": 1, "1d": 24, "7d": 168, "30d": 720}
VIEWS = {
    "user_stats": ["user_id"],
    "item_stats": ["item_id"],
    "category_stats": ["category"],
    "user_category_stats": ["user_id", "category"],
}


def generate(home: Path, rows: int) -> None:
    """A store of `rows` engagements over 35 days: 20,000 users and 10,000 items a million rows, 50 categories."""
    rng, root = np.random.default_rng(0), home / "data"
    users, items = (np.array([f"{kind}{i:07d}" for i in range(n)]) for kind, n in _sizes(rows).items())
    parts: list[Part] = []
    for day in range(DAYS):
        requests = rows // DAYS // SHOWN
        start = to_us(START + day * DAY)
        at = np.sort(rng.integers(0, 86_400_000_000 - 60_000_000, requests)) + start
        owner = (len(users) * rng.random(requests) ** 2).astype(int)
        item = (len(items) * rng.random((requests, SHOWN)) ** 3).astype(int)
        event = np.repeat(at, SHOWN) + np.tile(np.arange(SHOWN) * 1_000_000, requests)
        created = event + np.where(rng.random(len(event)) < 0.02, rng.integers(0, 3 * 86_400_000_000, len(event)), 0)
        columns = {
            "request_id": np.repeat(np.char.add(f"{day}-", np.arange(requests).astype(str)), SHOWN),
            "user_id": np.repeat(users[owner], SHOWN),
            "item_id": items[item.ravel()],
            "event_timestamp": event,
            "created_timestamp": created,
            "position": np.tile(np.arange(SHOWN), requests),
            "sampled": np.zeros(len(event), bool),
            **{a: rng.random(len(event)) < p for a, p in zip(MANIFEST.actions, (0.05, 0.2, 0.01), strict=True)},
        }
        schema = engagement_schema(MANIFEST)
        table = pa.table({n: pa.array(columns[n]).cast(schema.field(n).type) for n in schema.names})
        directory = root / "engagements" / f"day={START + day * DAY:%Y-%m-%d}"
        parts.append(_part(root, "engagements", directory, table, int(event.min()), int(event.max())))
    created = pa.array([to_us(START - DAY)] * len(items), pa.timestamp("us", tz="UTC"))
    kinds = pa.array([[f"kind{i % 50}"] for i in rng.permutation(len(items))])
    table = pa.table({"item_id": items, "created_timestamp": created, "kinds": kinds})
    parts.append(_part(root, "items", root / "items", table, to_us(START - DAY), to_us(START - DAY)))
    MANIFEST.save(root)
    save_index(root, tuple(parts))


def _sizes(rows: int) -> dict[str, int]:
    return {"u": rows // 50, "i": rows // 100}


def _part(root: Path, room: str, directory: Path, table: pa.Table, first: int, last: int) -> Part:
    path, digest, size = write_part(directory, table)
    return Part(room, path.relative_to(root).as_posix(), digest, size, table.num_rows, first, last, first)


def build(home: str, views: str, days: int) -> dict:
    """Bring the views up to the end of so many days; returns what was read of the log and written."""
    from feature_repo.views import Inputs, build_views

    root = Path(views)
    snapshot = EngagementStore(Path(home) / "data").snapshot(START + days * DAY)
    old = {p.name[:64] for p in (root.parent / "partials").glob("*.parquet")}
    new = [p for p in snapshot.parts("engagements") if p.sha256 not in old]
    before = {p: p.stat().st_mtime_ns for p in root.glob("*_stats/*.parquet")}
    build_views(root, Inputs(snapshot))
    files = [p for p in root.glob("*_stats/*.parquet") if before.get(p) != p.stat().st_mtime_ns]
    return {
        "read": sum(p.rows for p in new),
        "written": sum(pq.read_metadata(p).num_rows for p in files),
        "megabytes": sum(p.stat().st_size for p in files) / 1e6,
    }


def by_hand(home: str, out: str, days: int) -> dict:
    """The rows of all ticks with DuckDB, one query a view."""
    import duckdb

    last = to_us(START + days * DAY) // 3_600_000_000
    database = duckdb.connect(config={"temp_directory": tempfile.gettempdir()})
    database.execute(
        f"""CREATE TABLE log AS SELECT l.user_id, l.item_id, i.kinds[1] AS category,
            epoch_us(l.event_timestamp) // 3600000000 AS s, epoch_us(l.created_timestamp) // 3600000000 AS k,
            l.save, l.click, l.hide
        FROM read_parquet('{home}/data/engagements/*/*.parquet', hive_partitioning = false) l
        JOIN read_parquet('{home}/data/items/*.parquet') i USING (item_id)
        WHERE NOT l.sampled AND l.event_timestamp < make_timestamptz({last * 3_600_000_000})"""
    )
    written = 0
    for view, keys in VIEWS.items():
        file = f"{out}/{view}.parquet"
        database.execute(f"COPY ({_query(keys, last)}) TO '{file}' (FORMAT parquet, COMPRESSION zstd)")
        written += pq.read_metadata(file).num_rows
    return {"read": database.sql("SELECT count(*) FROM log").fetchall()[0][0], "written": written, "megabytes": 0.0}


def _query(keys: list[str], last: int) -> str:
    key = ", ".join(keys)
    return f"""
        WITH mine AS ({_running(keys, last)}), everyone AS ({_running([], last)}),
        until AS (SELECT *, coalesce(lead(tick) OVER (PARTITION BY {key} ORDER BY tick), {last + 1}) AS next FROM mine),
        midnights AS (
            SELECT * REPLACE (unnest(generate_series((tick // 24 + 1) * 24, next - 1, 24)) AS tick)
            FROM until WHERE impressions_30d > 0
        ),
        emitted AS (FROM until UNION ALL FROM midnights)
        SELECT {", ".join(f"m.{k}" for k in keys)}, m.tick, {", ".join(_columns())}
        FROM emitted m ASOF JOIN everyone e ON m.tick >= e.tick
        ORDER BY m.tick, {", ".join(f"m.{k}" for k in keys)}"""


def _cells() -> list[tuple[str, str, str]]:
    """(name, column of the log, window) of every count."""
    cells = [(f"impressions_{w}", "n", w) for w in WINDOWS] + [(f"count_save_{w}", "save", w) for w in WINDOWS]
    return [*cells, ("click", "click", "30d"), ("hide", "hide", "30d")]


def _columns() -> list[str]:
    names = {f"rate_save_{w}": (f"count_save_{w}", f"impressions_{w}") for w in WINDOWS}
    names |= {f"rate_{a}_30d": (a, "impressions_30d") for a in ("click", "hide")}
    counts = [f"m.{n}::DOUBLE AS {n}" for n, what, _ in _cells() if what in ("n", "save")]
    prior = "if(e.{1} > 0, e.{0} / e.{1}, 0.0)"
    rate = "(m.{0} + 20 * " + prior + ") / (m.{1} + 20) AS {2}"
    return [*counts, *(rate.format(c, n, name) for name, (c, n) in names.items())]


def _running(keys: list[str], last: int) -> str:
    """Sums of entries and leavings of each window, cumulated by key."""
    key = "".join(f"{k}, " for k in keys)

    def sums(of: str, sign: str = "") -> str:
        return ", ".join(
            f"{sign}if(greatest(s, k) < s + {WINDOWS[w]}, {c}, 0) AS {n}" if of in ("", w) else f"0 AS {n}"
            for n, c, w in _cells()
        )

    leave = [f"SELECT {key}s + {h + 1} AS tick, {sums(w, '-')} FROM hourly WHERE greatest(s, k) < s + {h}"
             for w, h in WINDOWS.items()]  # fmt: skip
    enter = f"SELECT {key}greatest(s, k) + 1 AS tick, {sums('')} FROM hourly WHERE greatest(s, k) < s + 720"
    total = ", ".join(f"sum(sum({n})) OVER ({_over(keys)} ORDER BY tick)::BIGINT AS {n}" for n, _, _ in _cells())
    return f"""
        WITH hourly AS (
            SELECT {key}s, k, count(*) AS n, count_if(save) AS save, count_if(click) AS click, count_if(hide) AS hide
            FROM log GROUP BY ALL
        ),
        moves AS ({" UNION ALL ".join([enter, *leave])})
        SELECT {key}tick, {total} FROM moves WHERE tick <= {last} GROUP BY {key}tick"""


def _over(keys: list[str]) -> str:
    return f"PARTITION BY {', '.join(keys)}" if keys else ""


def check(views: Path, hand: Path, sample: int = 20_000) -> int:
    """Compare rows of every view, drawn at random, with those by hand; returns how many. Fails on a difference."""
    import polars as pl

    for view, keys in VIEWS.items():
        mine = pl.scan_parquet(views / view / "*.parquet").drop("created_timestamp").collect()
        theirs = pl.read_parquet(hand / f"{view}.parquet")
        assert len(mine) == len(theirs), (view, len(mine), len(theirs))
        drawn = mine.sample(min(sample, len(mine)), seed=0).with_columns(
            (pl.col("event_timestamp").dt.timestamp("us") // 3_600_000_000).alias("tick")
        )
        beside = drawn.join(theirs, on=[*keys, "tick"], how="left", suffix=":hand")
        for name in (c for c in theirs.columns if c not in (*keys, "tick")):
            same = np.isclose(beside[name], beside[f"{name}:hand"], rtol=1e-12, atol=0)
            assert same.all(), (view, name, beside.filter(pl.Series(~same)).head())
    return sample


def _digest(root: Path) -> str:
    files = sorted(root.glob("*/2*.parquet"))
    return hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()


def run(scale: int = 1, runs: int = 3) -> str:
    """Measure and return the page's section."""
    rows = 1_000_000 * scale
    measured: dict[str, list[Measured]] = {"backfill": [], "next day": [], "DuckDB by hand": []}
    with tempfile.TemporaryDirectory() as room:
        home = Path(room)
        generate(home, rows)
        for i in range(runs):
            steps, whole, hand = (home / f"{kind}{i}" / "views" for kind in ("steps", "whole", "hand"))
            hand.mkdir(parents=True)
            here = {"home": str(home)}
            measure(f"{__spec__.name}:build", views=str(steps), days=DAYS - 1, **here)
            measured["next day"].append(measure(f"{__spec__.name}:build", views=str(steps), days=DAYS, **here))
            measured["backfill"].append(measure(f"{__spec__.name}:build", views=str(whole), days=DAYS, **here))
            measured["DuckDB by hand"].append(measure(f"{__spec__.name}:by_hand", out=str(hand), days=DAYS, **here))
            assert _digest(steps) == _digest(whole)
            compared = check(whole, hand)
    lines = [
        f"### Trailing numbers, {rows:,} rows of log over {DAYS} days",
        "",
        f"Four views, windows of 1 h, 1 d, 7 d and 30 d, as of every hour; {_sizes(rows)['u']:,} users, "
        f"{_sizes(rows)['i']:,} items, 50 categories. Median of {runs}. `python -m benchmarks.features.aggregates`.",
        "",
        "| | rows of log read | rows written | MB written | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        m = median(found)
        size = f"{m.result['megabytes']:.0f}" if m.result["megabytes"] else "–"
        lines.append(
            f"| {name} | {m.result['read']:,} | {m.result['written']:,} | {size} "
            f"| {m.wall:.1f} | {m.cpu:.1f} | {m.peak_mb:,.0f} |"
        )
    told = f"Backfill and increments gave the same bytes, DuckDB the same numbers ({compared:,} rows a view compared)."
    return "\n".join([*lines, "", told, ""])


if __name__ == "__main__":
    print(run(*(int(a) for a in sys.argv[1:])))
