"""How long a window of many rows takes: our sketch and comparison, and Evidently's stock preset on the same numbers.

50 columns: 40 numbers, 8 categories (one has 100,000 of them), user and item ids; ours also looks at an embedding of 16
numbers, and Evidently is spared both the ids and the embedding. Each run is a process of its own.
"""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import Measured, measure
from engagement.table import Feature, RankingTable, TableSpec
from monitoring import distance
from monitoring.cells import load_cells, save_cells
from monitoring.sketch import IDS, aligned, centres_of, feature_blocks, sketch, unseen
from monitoring.vectors import centroid_shift, tell_apart

NUMBERS, EMBEDDING, PER_REQUEST = 40, 16, 25
CATEGORIES = (2, 5, 10, 30, 100, 1_000, 10_000, 100_000)
USERS, ITEMS = 1_000_000, 200_000
ROWS, EVIDENTLY_ROWS = (1_000_000, 10_000_000), (20_000, 200_000, 1_000_000)
SPARED = 1_000  # categories; two columns with more take Evidently over two CPU minutes at 20,000 rows
REFERENCE_ROWS, PATIENCE = 1_000_000, 300  # rows of the reference; seconds that Evidently is given
SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("item_id", "candidate", "categorical"),
        *(Feature(f"category_{many}", "candidate", "categorical") for many in CATEGORIES),
        *(Feature(f"number_{i}", "candidate", "numeric") for i in range(NUMBERS)),
        Feature("embedding", "candidate", "embedding", width=EMBEDDING),
    ),
    ("save",),
    "save",
)


def section(ours: tuple[int, ...] = ROWS, theirs: tuple[int, ...] = EVIDENTLY_ROWS) -> str:
    """Markdown: both side by side."""
    lines = [
        "Sketching a window and comparing each of its columns (PSI, Jensen–Shannon, Wasserstein, unseen values, "
        "embeddings) with a stored reference, beside `DataDriftPreset` on as many rows of reference and window. "
        f"50 columns: {NUMBERS} numbers, {len(CATEGORIES)} categories (one of 100,000), user and item ids; Evidently "
        f"is spared the ids and our embedding of {EMBEDDING}, and but for one line the two columns of over {SPARED:,} "
        "categories, which take it minutes. Reading is included, imports are not. "
        "Peak is the most of the process that was in memory at once, libraries included; own leaves out the pages of "
        "the memory-mapped table, which the system takes back when it needs them.",
        "",
        "| | rows | wall s | CPU s | peak MB | own memory, peak MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        reference = build(Path(scratch) / "reference", REFERENCE_ROWS, seed=0)
        measure("benchmarks.drift.speed:remember", table=str(reference))
        for rows in ours:
            window = build(Path(scratch) / "window", rows, seed=1)
            done = measure("benchmarks.drift.speed:ours", table=str(window), reference=str(reference))
            lines.append(_line("Evergreen", rows, done, f"{done.result['own_mb']:,.0f}"))
        for rows in theirs:
            lines.append(_evidently(rows, SPARED))
        lines.append(_evidently(theirs[0], CATEGORIES[-1]))
    return "\n".join(lines)


def _line(who: str, rows: int, done: Measured, own: str = "") -> str:
    return f"| {who} | {rows:,} | {done.wall:.1f} | {done.cpu:.1f} | {done.peak_mb:,.0f} | {own} |"


def _evidently(rows: int, most: int) -> str:
    who = f"Evidently, categories up to {most:,}"
    try:
        return _line(who, rows, measure("benchmarks.drift.stock:preset", timeout=PATIENCE, rows=rows, most=most))
    except subprocess.TimeoutExpired:
        return f"| {who} | {rows:,} | did not finish in {PATIENCE} s | | | |"
    except RuntimeError as error:
        return f"| {who} | {rows:,} | failed: {str(error).strip().splitlines()[-1][:80]} | | | |"


def build(directory: Path, rows: int, seed: int) -> Path:
    """A saved ranking table, written a part at a time."""
    rng, requests = np.random.default_rng(seed), rows // PER_REQUEST
    directory.mkdir(exist_ok=True)
    candidates = {"item_cat": (len(CATEGORIES) + 1, np.int64), "item_num": (NUMBERS + EMBEDDING, np.float32)}
    blocks = {
        name: np.lib.format.open_memmap(directory / f"{name}.npy", "w+", dtype, (rows, width))
        for name, (width, dtype) in candidates.items()
    }
    for start in range(0, rows, 500_000):
        n = min(500_000, rows - start)
        blocks["item_num"][start : start + n] = numeric(rng, n)
        blocks["item_cat"][start : start + n, 0] = _hashes(ITEMS, 99)[popular(rng, ITEMS, n)]
        for i, many in enumerate(CATEGORIES, 1):
            blocks["item_cat"][start : start + n, i] = _hashes(many, many)[popular(rng, many, n)]
    empty = np.zeros(0, np.int64)
    small = {
        "request_id": np.zeros(requests, "S1"),
        "user_id": np.zeros(requests, "S1"),
        "time": np.arange(requests, dtype=np.int64),
        "offsets": np.arange(0, rows + 1, PER_REQUEST),
        **{name: np.zeros(requests, np.int64) for name in ("history_start", "history_end")},
        "request_cat": _hashes(USERS, 98)[popular(rng, USERS, requests)][:, None],
        "request_num": np.zeros((requests, 0), np.float32),
        "item_id": np.zeros(rows, "S1"),
        "labels": np.zeros((rows, 1), np.uint8),
        "sampled": np.zeros(rows, bool),
        **dict.fromkeys(("history_time", "history_item", "history_actions"), empty),
    }
    saved = directory.with_name(f"{directory.name}-saved")
    RankingTable(SPEC, **small, **blocks).save(saved)
    shutil.rmtree(directory)
    return saved


def numeric(rng: np.random.Generator, rows: int) -> np.ndarray:
    """(rows, numbers and embedding) float32: rates, counts, ages and plain numbers, 2 % of them missing."""
    found = rng.standard_normal((rows, NUMBERS + EMBEDDING), np.float32)
    found[:, 0:NUMBERS:4] = 1 / (1 + np.exp(2 - found[:, 0:NUMBERS:4]))
    found[:, 1:NUMBERS:4] = np.log1p(np.floor(np.exp(1 + found[:, 1:NUMBERS:4])))
    found[:, 2:NUMBERS:4] = np.exp(found[:, 2:NUMBERS:4])
    found[:, :NUMBERS][rng.random((rows, NUMBERS), np.float32) < 0.02] = np.nan
    return found


def _hashes(many: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 2**63 - 1, many)


def popular(rng: np.random.Generator, many: int, n: int) -> np.ndarray:
    return (many * rng.random(n) ** 2).astype(np.int64)  # the first ones come more often


def remember(table: str) -> None:
    """Store the reference of a window beside it, as a model's bundle does."""
    held = RankingTable.load(Path(table))
    save_cells(Path(table) / "reference.parquet", {("2026-W01", 0): sketch(held, centres_of(held))})
    np.savez(Path(table) / "centres.npz", **{n: np.array(c) for n, c in centres_of(held).items()})


def ours(table: str, reference: str) -> dict:
    """Sketch a window and compare it with a stored reference."""
    own = _OwnMemory()
    start = time.perf_counter()
    with np.load(Path(reference) / "centres.npz") as stored:
        centres = {name: float(stored[name]) for name in stored}
    known = load_cells(Path(reference) / "reference.parquet")["2026-W01", 0]
    window = RankingTable.load(Path(table))
    seen = sketch(window, centres)
    sketched = time.perf_counter() - start
    scores = {}
    for name, counts in seen.columns.items():
        at, a, b = aligned(known.columns[name], counts, centres.get(name))
        scores[name] = [distance.psi(a, b), distance.jensenshannon(a, b)]
        if name in centres:
            scores[name].append(distance.wasserstein(at, a, b))
    for feature, block in feature_blocks(window):
        if feature.name in IDS:
            scores[feature.name] = [unseen(known.vocabularies[feature.name], block[:, 0])]
    for name, vectors in seen.vectors.items():
        scores[name] = [tell_apart(known.vectors[name], vectors), centroid_shift(known.vectors[name], vectors)]
    worst = max(float(np.nanmax(score[-1])) for name, score in scores.items() if name in centres)
    return {"columns": len(scores), "sketched_s": sketched, "worst_wasserstein": worst, "own_mb": own.peak()}


class _OwnMemory:
    """Watches the memory that is this process's alone, without mapped files."""

    def __init__(self) -> None:
        self._most, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            status = Path(f"/proc/{os.getpid()}/status").read_text()
            anonymous = status.split("RssAnon:")[1].split()[0]
            self._most = max(self._most, int(anonymous) / 1024)

    def peak(self) -> float:
        """MB so far, and stop."""
        self._done.set()
        self._thread.join()
        return self._most
