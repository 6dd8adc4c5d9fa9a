"""The training join: our offline store through Feast's interface, beside hand-written joins and Feast's own stores.

Labels come as a DataFrame, as Feast takes them; views are Parquet files. Everybody applies the same rule: of a key's
rows that are true and known at the label's instant the newest, unless it is older than the view's time to live.

    python -m benchmarks.features.offline
"""

import importlib
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import cpu_seconds, measure

# Engine: name in the table, modules to import.
ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hand_polars": ("hand-written, polars `join_asof`", ("pandas", "polars")),
    "hand_duckdb": ("hand-written, DuckDB `ASOF JOIN`", ("pandas", "duckdb")),
    "ours": ("**ours, through Feast**", ("feast", "feature_repo.offline_store")),
    "feast_duckdb": ("Feast's DuckDB store", ("feast", "feast.infra.offline_stores.duckdb")),
    "feast_dask": ("Feast's default store (dask)", ("feast", "feast.infra.offline_stores.dask")),
}
LABELS = 1_000_000
DASK_LABELS = 20_000  # Feast's default store takes a minute for these
MONTH_US = 30 * 86_400_000_000
# View: join key, number of keys, rows, time to live, number of float columns; 0 for one 32-float embedding instead.
VIEWS: dict[str, tuple[str, int, int, timedelta, int]] = {
    "u": ("user_id", 20_000, 1_000_000, timedelta(days=7), 6),
    "i": ("item_id", 10_000, 500_000, timedelta(days=14), 5),
    "e": ("item_id", 10_000, 100_000, timedelta(0), 0),
}


def generate(root: Path, labels: int, keys: str) -> None:
    """Views over a month, each row known up to an hour after it was true, and labels in the order of time."""
    draw = np.random.default_rng(0)

    def instants(rows: int) -> np.ndarray:
        return np.sort(draw.integers(0, MONTH_US, rows)) + 1_700_000_000_000_000

    def entities(count: int, rows: int) -> pl.Series:
        found = pl.Series(draw.integers(0, count, rows))
        return found if keys == "int64" else pl.Series([f"key-{k}" for k in range(count)]).gather(found)

    def save(name: str, columns: dict[str, Any]) -> None:
        utc = pl.col(c for c in ("event_timestamp", "created_timestamp") if c in columns).cast(pl.Datetime("us", "UTC"))
        pl.DataFrame(columns).with_columns(utc).write_parquet(root / f"{name}.parquet")

    for name, (key, count, rows, _, width) in VIEWS.items():
        event = instants(rows)
        values: dict[str, Any] = {f"{name}{i}": draw.normal(size=rows) for i in range(width)}
        if not width:
            embedding = pl.Series(draw.normal(size=(rows, 32)).astype(np.float32))
            values = {f"{name}0": embedding.cast(pl.List(pl.Float32))}
        created = event + draw.integers(0, 3_600_000_000, rows)
        both = {"event_timestamp": event, "created_timestamp": created}
        save(name, {key: entities(count, rows), **both, **values})
    users, items = entities(20_000, labels), entities(10_000, labels)
    shown = {"user_id": users, "item_id": items, "event_timestamp": instants(labels)}
    save("labels", {**shown, "label": draw.integers(0, 2, labels)})


# --- the joins: each takes the labels and gives the result as a table, or writes it to `out` -------------------------


def hand_polars(root: Path, labels: Any, out: Path | None) -> pa.Table | None:
    frame = pl.from_pandas(labels).sort("event_timestamp", maintain_order=True)
    for name, (key, _, _, ttl, _) in VIEWS.items():
        rows = (
            pl.scan_parquet(root / f"{name}.parquet")
            .with_columns(known=pl.max_horizontal("event_timestamp", "created_timestamp"))
            .sort("known", "event_timestamp", "created_timestamp")
            .filter(pl.col("event_timestamp") >= pl.col("event_timestamp").cum_max().over(key))
            .rename({"event_timestamp": "event"})
            .drop("created_timestamp")
            .collect()
        )
        values = [c for c in rows.columns if c not in (key, "event", "known")]
        frame = frame.join_asof(rows, left_on="event_timestamp", right_on="known", by=key, check_sortedness=False)
        if ttl:
            alive = pl.col("event") >= pl.col("event_timestamp") - ttl
            frame = frame.with_columns(pl.when(alive).then(pl.col(c)).alias(c) for c in values)
        frame = frame.drop("event", "known")
    if out is None:
        return frame.to_arrow()
    frame.write_parquet(out)
    return None


def hand_duckdb(root: Path, labels: Any, out: Path | None) -> pa.Table | None:
    import duckdb

    con = duckdb.connect(config={"temp_directory": tempfile.gettempdir()})
    con.execute("SET memory_limit = '4GB'")
    con.register("given", labels)
    con.execute("CREATE TEMP TABLE labels AS SELECT row_number() OVER () AS n, * FROM given")
    columns, joins = ["l.* EXCLUDE (n)"], []
    for name, (key, _, _, ttl, _) in VIEWS.items():
        known = "greatest(event_timestamp, created_timestamp)"
        con.execute(
            f"""CREATE TEMP TABLE {name} AS SELECT * EXCLUDE (newest, created_timestamp) FROM (
                SELECT *, {known} AS known, max(event_timestamp) OVER (
                    PARTITION BY {key} ORDER BY {known}, event_timestamp, created_timestamp ROWS UNBOUNDED PRECEDING
                ) AS newest FROM read_parquet('{root / name}.parquet')
            ) WHERE event_timestamp >= newest
            QUALIFY row_number() OVER (PARTITION BY {key}, known
                ORDER BY event_timestamp DESC, created_timestamp DESC) = 1"""
        )
        alive = f"{name}.event_timestamp >= l.event_timestamp - INTERVAL {int(ttl.total_seconds())} SECOND"
        for column in [r[0] for r in con.execute(f"DESCRIBE {name}").fetchall()]:
            if column not in (key, "event_timestamp", "known"):
                columns.append(f"CASE WHEN {alive if ttl else 'true'} THEN {name}.{column} END AS {column}")
        joins.append(f"ASOF LEFT JOIN {name} ON l.{key} = {name}.{key} AND l.event_timestamp >= {name}.known")
    query = f"SELECT {', '.join(columns)} FROM labels l {' '.join(joins)} ORDER BY l.n"
    if out is None:
        return con.sql(query).to_arrow_table()
    con.execute(f"COPY ({query}) TO '{out}' (FORMAT parquet)")
    return None


def ours(root: Path, labels: Any, out: Path | None) -> pa.Table | None:
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    job = _feast(root, labels, {"type": "feature_repo.offline_store.AsofOfflineStore"})
    if out is None:
        return job.to_arrow()
    job.persist(SavedDatasetFileStorage(path=str(out)))
    return None


def feast_duckdb(root: Path, labels: Any, out: Path | None) -> pa.Table | None:
    return _feast(root, labels, {"type": "duckdb"}).to_arrow()


def feast_dask(root: Path, labels: Any, out: Path | None) -> pa.Table | None:
    return _feast(root, labels, {"type": "dask"}).to_arrow()


def _feast(root: Path, labels: Any, offline_store: dict[str, str]) -> Any:
    """A job of a store with the three views."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Array, Float32, Float64, Int64, String

    config = RepoConfig(
        project="benchmark",
        provider="local",
        registry=str(Path(tempfile.mkdtemp(dir=root)) / "registry.pb"),
        offline_store=offline_store,
        online_store={"type": "sqlite"},
        entity_key_serialization_version=3,
        repo_path=root,
    )
    integers = labels["user_id"].dtype == np.int64
    kind, value_type = (Int64, ValueType.INT64) if integers else (String, ValueType.STRING)
    entity = {k: Entity(name=k, join_keys=[k], value_type=value_type) for k in ("user_id", "item_id")}
    views = [
        FeatureView(
            name=name,
            entities=[entity[key]],
            ttl=ttl,
            schema=[
                Field(name=key, dtype=kind),
                *(Field(name=f"{name}{i}", dtype=Float64 if width else Array(Float32)) for i in range(width or 1)),
            ],
            source=FileSource(
                name=name,
                path=str(root / f"{name}.parquet"),
                file_format=ParquetFormat(),
                timestamp_field="event_timestamp",
                created_timestamp_column="created_timestamp",
            ),
        )
        for name, (key, _, _, ttl, width) in VIEWS.items()
    ]
    store = FeatureStore(config=config)
    store.apply([*entity.values(), *views])
    refs = [f"{v.name}:{f.name}" for v in views for f in v.features]
    return store.get_historical_features(labels, refs, filter_by_created_timestamp=True)


# --- measuring -------------------------------------------------------------------------------------------------------


def once(engine: str, root: str, labels: int, to_file: bool) -> dict[str, Any]:
    """Run one join in this process; the labels are read and the engine is imported before the clock starts."""
    place, run = Path(root), globals()[engine]
    frame = pl.read_parquet(place / "labels.parquet", n_rows=labels).to_pandas()
    out = place / f"{engine}.parquet" if to_file else None
    for module in ENGINES[engine][1]:
        importlib.import_module(module)
    held = _resident_mb()
    start, cpu = time.perf_counter(), cpu_seconds()
    table = run(place, frame, out)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"wall": wall, "cpu": cpu, "peak": peak, "join": peak - held, "rows": 0, "sums": {}}
    parts = (pa.Table.from_batches([b]) for b in pq.ParquetFile(out).iter_batches()) if out else [table]
    for part in parts:
        found["rows"] += part.num_rows
        for name in [f"{v}{i}" for v, (*_, width) in VIEWS.items() for i in range(width or 1)]:
            found["sums"][name] = found["sums"].get(name, 0.0) + _total(part.column(name))
    return found


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _total(column: Any) -> float:
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return float(pc.sum(column.cast(pa.float64())).as_py() or 0) + 1000 * column.null_count


def _python_with_ibis(place: Path) -> str:
    """An interpreter that has ibis besides everything that is installed here: Feast's DuckDB store needs it."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    site = next(place.glob("lib/*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"])
    python = str(place / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "ibis-framework[duckdb]"], check=True, capture_output=True)
    return python


def run(scale: int = 1, runs: int = 3) -> str:
    """Measure at `scale` million labels: in memory with Feast's stores beside at 1, streamed to a file above."""
    labels, to_file = scale * LABELS, scale > 1
    head = (
        "| engine | keys | labels | rows out | wall s | CPU s | peak MB | of it the join | CPU vs best hand-written |"
    )
    lines = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as place:
        ibis = "" if to_file else _python_with_ibis(Path(place) / "ibis")
        for keys in ("int64", "string"):
            root = Path(place) / keys
            root.mkdir()
            generate(root, labels, keys)
            peers = {"feast_duckdb": labels, "feast_dask": DASK_LABELS} if keys == "int64" and not to_file else {}
            truth: dict[int, dict[str, float]] = {}
            engines = {"hand_polars": labels, "hand_duckdb": labels, "ours": labels}
            lines += _rows(root, keys, to_file, engines, runs, truth)
            for engine, count in peers.items():
                lines += _rows(root, keys, to_file, {engine: count}, 1, truth, ibis)
    where = "written to one Parquet file" if to_file else "as an Arrow table"
    return f"""### Training join, {labels:,} labels

{labels:,} labels (a DataFrame) joined to 3 views (1,000,000 x 6 floats, 500,000 x 5 floats, 100,000 x one 32-float
embedding; two with a time to live; rows known up to an hour late), the result {where}. Medians of {runs} interleaved
runs, each in its own process (Feast's stores: one run). Rerun: `python -m benchmarks.features.offline`.

{chr(10).join(lines)}

"The join" is the peak above what the process held before it: labels and imports, of which Feast's are some 250 MB.
"""


def _rows(
    root: Path,
    keys: str,
    to_file: bool,
    engines: dict[str, int],
    runs: int,
    truth: dict[int, dict[str, float]],
    python: str = sys.executable,
) -> list[str]:
    """Lines of the table: the engines in turn, `runs` times; all must give the column sums of the first (`truth`)."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(runs):
        for engine, labels in engines.items():
            arguments = {"engine": engine, "root": str(root), "labels": labels, "to_file": to_file}
            done = measure("benchmarks.features.offline:once", python=python, **arguments)
            found[engine].append(done.result)
    measures = ("wall", "cpu", "peak", "join")
    middle = {e: {k: statistics.median(r[k] for r in rs) for k in measures} for e, rs in found.items()}
    hands = [m["cpu"] for e, m in middle.items() if e.startswith("hand")]
    for engine, results in found.items():
        expected = truth.setdefault(engines[engine], results[0]["sums"])
        if any(abs(results[0]["sums"][c] - v) > 1e-6 * max(1.0, abs(v)) for c, v in expected.items()):
            raise RuntimeError(f"{engine} gives other values: {results[0]['sums']} instead of {expected}")
    lines = []
    for engine, m in middle.items():
        ratio = f"{m['cpu'] / min(hands):.2f}" if hands else ""
        cells = [ENGINES[engine][0], keys, f"{engines[engine]:,}", f"{found[engine][0]['rows']:,}"]
        cells += [f"{m['wall']:.1f}", f"{m['cpu']:.1f}", f"{m['peak']:,.0f}", f"{m['join']:,.0f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print(run(1))
    print(run(10, runs=1))
