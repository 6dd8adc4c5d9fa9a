"""How far our scores, from counts by bucket, are from those that Evidently and SciPy work out from the rows."""

import os
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import wasserstein_distance

from monitoring.counts import aligned, categories, drawn, numbers, points
from monitoring.distance import FEW_VALUES, binned, jensenshannon, psi, wasserstein

METHODS = ("psi", "jensenshannon", "wasserstein")
ROWS, DRIFTS, CATEGORIES = 4_000, (0.0, 0.25, 0.5, 1.0, 2.0), (2, 30, 2_000)
DRAWN = 5_000  # as many as a page gets

Draw = Callable[[np.random.Generator, float, int], np.ndarray]
# Columns in the manner of the features, drifted by k.
DRAWS: dict[str, Draw] = {
    "plain": lambda rng, k, n: rng.normal(0.2 * k, 1 + 0.1 * k, n),
    "rates": lambda rng, k, n: rng.beta(2 + k, 30, n),
    "counts, log": lambda rng, k, n: np.log1p(rng.poisson(40 + 9 * k, n)),
    "few counts": lambda rng, k, n: rng.poisson(2 + 0.4 * k, n).astype(float),
    "heavy tails": lambda rng, k, n: rng.standard_t(3, n) * (1 + k),
    "far from nought": lambda rng, k, n: 1e6 + rng.normal(5 * k, 10, n),
    "holes": lambda rng, k, n: np.where(rng.random(n) < 0.1 + 0.2 * k, np.nan, rng.lognormal(0.1 * k, 1, n)),
    "one far away": lambda rng, k, n: np.append(rng.normal(0, 1, n - 1), 1e4 * k),
    "two humps": lambda rng, k, n: np.where(rng.random(n) < 0.3 + 0.1 * k, rng.normal(-5, 1, n), rng.normal(9, 2, n)),
    "uniform": lambda rng, k, n: rng.random(n) * (1 + 0.2 * k),
}


def section() -> str:
    """Markdown: the largest differences on the same bins, and what the buckets change."""
    lines = [
        f"Columns of {ROWS:,} rows a side, drifted by {', '.join(f'{k:g}' for k in DRIFTS)}; Evidently's `ValueDrift` "
        "is the other side. *Same bins*: its own bins counted by us, its categories, and for Wasserstein values that "
        "lie at bucket points.",
        "",
        "| the same bins | comparisons | largest difference |",
        "|---|--:|--:|",
        *(f"| {name} | {len(apart)} | {max(apart):.1e} |" for name, apart in same_bins().items()),
        "",
        "What the buckets change: scores of the counts beside those of the rows themselves, the largest difference "
        "over these drifts. PSI jumps where a bucket across an edge puts rows into an empty bin, which counts as "
        "0.0001 or less; "
        f"{DRAWN:,} drawn values cannot show one row of {ROWS:,} that is far away.",
        "",
        "| column | Wasserstein | Wasserstein of values drawn from the counts | PSI | Jensen–Shannon |",
        "|---|--:|--:|--:|--:|",
        *(f"| {name} | " + " | ".join(f"{d:.4f}" for d in by_buckets(draw)) + " |" for name, draw in DRAWS.items()),
    ]
    return "\n".join(lines)


def sides(draw: Draw, drift: float, rows: int = ROWS, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) float64 that are float32s: a reference and a window."""
    rng = np.random.default_rng(seed)
    return draw(rng, 0.0, rows).astype(np.float32).astype(float), draw(rng, drift, rows).astype(np.float32).astype(
        float
    )


def evidently(reference: np.ndarray, current: np.ndarray, methods: Sequence[str] = METHODS) -> list[float]:
    """Evidently's own scores; of categories where the arrays hold objects."""
    os.environ["DO_NOT_TRACK"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pandas as pd
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import ValueDrift

        kind = "categorical_columns" if reference.dtype == object else "numerical_columns"
        frames = [
            Dataset.from_pandas(pd.DataFrame({"x": side}), DataDefinition(**{kind: ["x"]}))
            for side in (current, reference)
        ]
        found = Report([ValueDrift(column="x", method=method) for method in methods]).run(*frames).dict()
    return [float(metric["value"]) for metric in found["metrics"]]


def known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def on_its_bins(a: np.ndarray, b: np.ndarray) -> list[float]:
    """PSI and Jensen-Shannon of Evidently's bins, counted by us."""
    if len(np.unique(known(a))) <= FEW_VALUES:  # then each value is a bin of its own
        values = np.unique(known(np.concatenate([a, b])))
        p, q = ((known(side)[:, None] == values).sum(axis=0) for side in (a, b))
    else:
        edges = np.histogram_bin_edges(known(np.concatenate([a, b])), bins="sturges")
        p, q = (np.histogram(known(side), edges)[0] for side in (a, b))
    return [psi(p, q), jensenshannon(p, q)]


def at_points(values: np.ndarray, centre: float) -> np.ndarray:
    """The values, each moved to the point of its bucket."""
    return points(np.concatenate([numbers(v, centre).keys for v in known(values)[:, None]]), centre)


def of_categories(many: int, drift: float) -> tuple[list[float], list[float]]:
    """PSI and Jensen-Shannon of a categorical column, ours and theirs."""
    rng = np.random.default_rng(many)
    hashes = rng.integers(1, 2**62, many)
    a = (many * rng.random(ROWS) ** 2).astype(int)
    b = (many * rng.random(ROWS) ** (2 + drift)).astype(int)
    _, p, q = aligned(categories(hashes[a]), categories(hashes[b]), None)
    names = [np.array([f"c{v}" for v in side], object) for side in (a, b)]
    return [psi(p, q), jensenshannon(p, q)], evidently(*names, METHODS[:2])


def same_bins() -> dict[str, list[float]]:
    """Every difference by method, on the same bins."""
    apart: dict[str, list[float]] = {}

    def note(kind: str, mine: list[float], theirs: list[float]) -> None:
        for method, a, b in zip(METHODS, mine, theirs, strict=False):
            apart.setdefault(f"{method}, {kind}", []).append(abs(a - b))

    for draw in DRAWS.values():
        for drift in DRIFTS:
            a, b = sides(draw, drift)
            note("numbers", on_its_bins(a, b), evidently(a, b, METHODS[:2]))
            centre = float(np.nanmedian(a))
            at, p, q = aligned(numbers(a, centre), numbers(b, centre), centre)
            theirs = evidently(at_points(a, centre), at_points(b, centre), ("wasserstein",))
            apart.setdefault("wasserstein, numbers", []).append(abs(wasserstein(at, p, q) - theirs[0]))
    for many in CATEGORIES:
        for drift in DRIFTS:
            note("categories", *of_categories(many, drift))
    return apart


def by_buckets(draw: Draw) -> list[float]:
    """The largest change over the drifts: Wasserstein, the same of drawn values, PSI, Jensen-Shannon."""
    apart = []
    for drift in DRIFTS:
        a, b = sides(draw, drift)
        centre = float(np.nanmedian(a))
        counts = [numbers(side, centre) for side in (a, b)]
        at, p, q = aligned(*counts, centre)
        exact = wasserstein_distance(known(a), known(b)) / known(a).std()
        x, y = (known(drawn(c, centre, DRAWN)) for c in counts)
        of_drawn = wasserstein_distance(x, y) / x.std()
        bins = binned(at, p, q)
        theirs = evidently(a, b, METHODS[:2])
        apart.append(
            [
                abs(wasserstein(at, p, q) - exact),
                abs(of_drawn - exact),
                abs(psi(*bins) - theirs[0]),
                abs(jensenshannon(*bins) - theirs[1]),
            ]
        )
    return np.max(apart, axis=0).tolist()
