"""The online side: how long one ranking request reads, and what publishing a million rows costs.

python -m benchmarks.features.online
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Measured, measure, median
from engagement.contract import Manifest
from engagement.table import TableSpec
from feature_repo.features import ARROW, View, declare, views
from tests.redis_lab import redis_server

AS_OF = datetime(2024, 3, 1, tzinfo=UTC)
AT = AS_OF + timedelta(hours=1)
UTC_US = pa.timestamp("us", "UTC")
CANDIDATES, ACTIONS, EMBEDDING, DAYS = 300, 100, 32, 50
USERS, ITEMS, REQUESTS = 2_000, 20_000, 400
READ = ("user_profile", "user_stats", "item_profile", "item_stats", "user_history")
READERS = {
    "Feast SDK, its SQLite store": ("feast", "stock-sqlite"),
    "Feast SDK, its Redis store": ("feast", "stock-redis"),
    "Feast SDK over our rows in SQLite": ("feast", "sqlite"),
    "Feast SDK over our rows in Redis": ("feast", "redis"),
    "OnlineReader, SQLite, no cache": ("reader", "sqlite"),
    "OnlineReader, SQLite, cache": ("cached", "sqlite"),
    "OnlineReader, Redis, no cache": ("reader", "redis"),
    "OnlineReader, Redis, cache": ("cached", "redis"),
    "Raw MGET of 300 × 37 packed floats": ("raw", "redis"),
}
WRITERS = {  # all of them read with our offline store
    "Feast to its SQLite store": ("stock-sqlite", False),
    "Feast to its SQLite store, pull_latest_features": ("stock-sqlite", True),
    "Feast to its Redis store, pull_latest_features": ("stock-redis", True),
    "Evergreen to SQLite": ("sqlite", True),
    "Evergreen to Redis": ("redis", True),
}


def spec() -> TableSpec:
    """Profiles with an embedding, the trailing numbers of three actions, and one context feature."""
    manifest = Manifest(
        name="bench",
        actions=("save", "click", "hide"),
        primary_action="save",
        exposure="impressions",
        user_features=("country", "age"),
        item_features=("kind", "tags", "price"),
        context_features=("surface",),
    )
    text, number = pa.string(), pa.float64()
    item = {"kind": text, "tags": pa.list_(text), "price": number, "embedding": pa.list_(pa.float32(), EMBEDDING)}
    return declare(manifest, pa.schema(list(item.items())), pa.schema([("country", text), ("age", number)]))


def prepare(home: str, users: int, items: int, days: int) -> None:
    """Write the Parquet of all views: profiles and histories once, numbers for each of `days` midnights."""
    for view in views(spec()):
        name, keys = ("u", users) if view.keys == ("user_id",) else ("i", items)
        for day in range(days if view.name.endswith("_stats") else 1):
            path = Path(home) / "views" / view.name / f"{day:04d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(_rows(view, name, keys, AS_OF - timedelta(days=day)), path)


def _rows(view: View, name: str, keys: int, at: datetime) -> pa.Table:
    rng = np.random.default_rng(len(view.name))
    make: dict[str, Callable[[], Any]] = {
        "string": lambda: [f"value {i}" for i in rng.integers(0, 50, keys)],
        "strings": lambda: [[f"tag {i}" for i in row] for row in rng.integers(0, 500, (keys, 3))],
        "float": lambda: rng.random(keys) * 100,
        "floats": lambda: _lists(rng.random(keys * EMBEDDING, np.float32), EMBEDDING),
        "int": lambda: rng.integers(0, 10**15, keys),
        "ints": lambda: _lists(rng.integers(0, 10**15, keys * ACTIONS), ACTIONS),
    }
    columns: dict[str, Any] = {view.keys[0]: [f"{name}{i}" for i in range(keys)]}
    columns["event_timestamp"] = columns["created_timestamp"] = pa.array([at] * keys, UTC_US)
    for column, kind in view.columns:
        columns[column] = pa.array(make[kind](), ARROW[kind])
    if view.name == "user_history":
        columns["item"] = _lists(pa.array([f"i{i}" for i in rng.integers(0, ITEMS, keys * ACTIONS)]), ACTIONS)
    return pa.table(columns)


def _lists(values: Any, width: int) -> pa.Array:
    ends = pa.array(np.arange(0, len(values) + 1, width, dtype=np.int32))
    return pa.ListArray.from_arrays(ends, pa.array(values))


def open_feast(home: str, kind: str, url: str, latest: bool = True) -> Any:
    """Feast with a store of its own or with ours; each keeps its rows under `home`."""
    from feature_repo import definitions

    root = Path(home)
    config = definitions.settings(root, root / "online" / "bench", "" if kind == "sqlite" else url)
    if kind.startswith("stock"):
        config["provider"] = "local"
        path = {"type": "sqlite", "path": str(root / "stock.db")}
        redis = {"type": "redis", "connection_string": url.removeprefix("redis://").split("/")[0]}
        config["online_store"] = path if kind == "stock-sqlite" else redis
        config["materialization"] = {"pull_latest_features": latest, "online_write_batch_size": 10_000}
    from feast import FeatureStore, RepoConfig

    return FeatureStore(config=RepoConfig(**config, repo_path=root))


def fill(home: str, kind: str, url: str) -> None:
    """Register the views and materialise all of them."""
    from feature_repo import definitions
    from feature_repo.generations import Generation, open_rows, serve, stamp, store_mark

    root = Path(home)
    definitions.apply(root, spec())
    store = open_feast(home, kind, url)
    if kind == "stock-sqlite":
        store.apply(definitions.objects(spec()))
    start = AS_OF - timedelta(days=1)
    store.materialize(start, AS_OF, feature_views=list(READ))
    if not kind.startswith("stock"):
        where = "" if kind == "sqlite" else url
        directory = root / "online" / "bench"
        stamp(open_rows(directory, where), AS_OF)
        Generation(directory, spec(), AS_OF, AS_OF, "", {}, store_mark(where)).save()
        serve(directory)


def requests(count: int) -> list[tuple[str, list[str]]]:
    """Users and candidates; candidates are drawn by popularity (Zipf), as hot items are in a feed."""
    rng = np.random.default_rng(7)
    weight = 1 / np.arange(1, ITEMS + 1)
    draws = [rng.choice(ITEMS, CANDIDATES, replace=False, p=weight / weight.sum()) for _ in range(count)]
    return [(f"u{rng.integers(USERS)}", [f"i{i}" for i in drawn]) for drawn in draws]


def read(home: str, how: str, kind: str, url: str) -> dict[str, float]:
    """Latency of one request after another, in milliseconds, and CPU of this process."""
    call = _reader(home, how, kind, url)
    made = requests(REQUESTS)
    for user, items in made[:20]:
        call(user, items)
    gc.collect()
    gc.freeze()  # as a server does after its start: Feast's 99th percentile is that of Python's full collection else
    taken, cpu = [], time.process_time()
    for user, items in made[20:]:
        start = time.perf_counter()
        call(user, items)
        taken.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / len(taken)
    p50, p99 = np.percentile(taken, [50, 99])
    return {"p50": p50 * 1e3, "p99": p99 * 1e3, "cpu": cpu * 1e3}


def _reader(home: str, how: str, kind: str, url: str) -> Callable[[str, list[str]], Any]:
    if how == "raw":
        import redis

        client = redis.Redis.from_url(url)
        packed = {f"raw:i{i}": np.zeros(37, np.float32).tobytes() for i in range(ITEMS)}
        client.mset(packed)
        return lambda user, items: np.frombuffer(b"".join(client.mget([f"raw:{i}" for i in items])), np.float32)
    if how == "feast":
        store = open_feast(home, kind, url)
        declared = [v for v in views(spec()) if v.name in READ]
        user_refs, item_refs = (
            [f"{v.name}:{n}" for v in declared if v.keys == (key,) for n, _ in v.columns]
            for key in ("user_id", "item_id")
        )

        def both(user: str, items: list[str]) -> None:
            store.get_online_features(user_refs, {"user_id": [user]}).to_dict()
            store.get_online_features(item_refs, {"item_id": items}).to_dict()

        return both
    from feature_repo.online import OnlineReader
    from feature_repo.online_cache import CACHE_ROWS

    cache = CACHE_ROWS if how == "cached" else 0
    reader = OnlineReader(Path(home), "" if kind == "sqlite" else url, cache)
    return lambda user, items: reader.read(user, items, {"surface": "home"}, AT)


def write(home: str, kind: str, url: str, latest: bool) -> int:
    """Materialise the items' numbers; the imports and the registry are there before."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        open_feast(home, kind, url, latest).materialize(
            AS_OF - timedelta(days=DAYS), AS_OF, feature_views=["item_stats"]
        )
    return 0


def warm(home: str, kind: str, url: str, latest: bool) -> None:
    """Import what `write` needs and prepare its tables; not measured."""
    from feature_repo import definitions

    definitions.apply(Path(home), spec())
    store = open_feast(home, kind, url, latest)
    if kind == "stock-sqlite":
        store.apply(definitions.objects(spec()))
    store.provider.batch_engine  # noqa: B018 (imports it)


def run(scale: int = 1, runs: int = 3) -> str:
    """Measure both and return a section of Markdown."""
    with redis_server() as url:
        return "\n\n".join([_reading(url, runs), _publishing(url, scale, runs)])


def _reading(url: str, runs: int) -> str:
    with tempfile.TemporaryDirectory() as home:
        prepare(home, USERS, ITEMS, 1)
        for kind in ("stock-sqlite", "stock-redis", "sqlite", "redis"):
            measure("benchmarks.features.online:fill", home=_own(home, kind), kind=kind, url=url)
        found: dict[str, list[Any]] = {name: [] for name in READERS}
        for _ in range(runs):
            for name, (how, kind) in READERS.items():
                done = measure("benchmarks.features.online:read", home=_own(home, kind), how=how, kind=kind, url=url)
                found[name].append(done.result)
    lines = [
        f"One request: a user and {CANDIDATES} candidates drawn by popularity from {ITEMS:,} items, profiles with an "
        f"embedding of {EMBEDDING}, trailing numbers, the last {ACTIONS} actions. {REQUESTS} requests a process, "
        f"medians of {runs} processes; again: `python -m benchmarks.features.online`.",
        "",
        "| read by | p50 ms | p99 ms | CPU ms a request |",
        "|---|---|---|---|",
    ]
    for name, results in found.items():
        p50, p99, cpu = (float(np.median([r[k] for r in results])) for k in ("p50", "p99", "cpu"))
        lines.append(f"| {name} | {p50:.1f} | {p99:.1f} | {cpu:.1f} |")
    lines += [
        "",
        "The SDK's rows stop at Python lists; the reader's include hashing and encoding to the ranking table.",
    ]
    return "\n".join(lines)


def _own(home: str, kind: str) -> str:
    """A directory a store, over the same Parquet."""
    directory = Path(home) / kind
    directory.mkdir(exist_ok=True)
    if not (directory / "views").exists():
        (directory / "views").symlink_to(Path(home) / "views")
    return str(directory)


def _publishing(url: str, scale: int, runs: int) -> str:
    lines = [
        f"`store.materialize` of 1 M source rows × {scale}, {len(_stats_columns())} numbers each: {DAYS} midnights of "
        f"{ITEMS * scale:,} items, and one midnight of {ITEMS * DAYS * scale:,}.",
        "",
        "| keys | published by | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|",
    ]
    for items, days in ((ITEMS * scale, DAYS), (ITEMS * DAYS * scale, 1)):
        with tempfile.TemporaryDirectory() as home:
            measure("benchmarks.features.online:prepare", home=home, users=10, items=items, days=days)
            found: dict[str, list[Measured]] = {name: [] for name in WRITERS}
            for turn in range(runs):
                for name, (kind, latest) in WRITERS.items():
                    if kind.startswith("stock") and turn:
                        continue  # minutes; its spread does not matter at this distance
                    own = _own(home, f"{kind}-{latest}-{turn}")
                    found[name].append(
                        measure("benchmarks.features.online:published", home=own, kind=kind, url=url, latest=latest)
                    )
        for name, done in found.items():
            middle = median(done)
            wall, cpu = (float(np.median([d.result[k] for d in done])) for k in ("wall", "cpu"))
            lines.append(f"| {items:,} | {name} | {wall:.1f} | {cpu:.1f} | {middle.peak_mb:,.0f} |")
    return "\n".join(lines)


def published(home: str, kind: str, url: str, latest: bool) -> dict[str, float]:
    """`write` timed without imports and registration."""
    from benchmarks.measure import cpu_seconds

    warm(home, kind, url, latest)
    start, cpu = time.perf_counter(), cpu_seconds()
    write(home, kind, url, latest)
    return {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - cpu}


def _stats_columns() -> list[str]:
    return [n for v in views(spec()) if v.name == "item_stats" for n, _ in v.columns]


if __name__ == "__main__":
    print(run(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
