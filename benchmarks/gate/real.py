"""Two real pairs on MovieLens: what the simulated ones are set to, and the gate's error on re-drawn real users."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.gate.pairs import PER_USER, Pairs, draw
from benchmarks.ranker.data import split
from engagement.table import RankingTable
from model import gate_rules as rules
from model.bootstrap import ratios, sums_by_user
from model.config import laptop
from model.metrics import hits
from model.predict import score
from model.train import train

DRAWS, REQUESTS, RESAMPLES = 1000, 300, 1000
RECENT = 0.12  # share of the training requests that the update learns


def run() -> str:
    """The section of docs/results/gate.md."""
    pairs = _measured()
    equal = draw(796, 214, 100, np.random.default_rng(0))
    lines = ["| pair | requests | users | HIT@3 | correlation | std of a request's difference | design effect |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [_row(name, pair) for name, pair in pairs.items()]
    lines += [_row("simulated", equal), ""]
    lines.append(
        f"Users of the real pairs re-drawn ({DRAWS:,} times some {REQUESTS} requests), hits thinned until the "
        f"challenger is worse by the margin ({rules.MARGIN:.0%}) of all users, or equal:"
    )
    lines += ["", "| pair | not worse, although worse by the margin | not worse, being equal |", "|---|---|---|"]
    for name, pair in pairs.items():
        shares = [_passed(pair, true) for true in (-rules.MARGIN, 0.0)]
        lines.append(f"| {name} | **{shares[0]:.1%}** | {shares[1]:.1%} |")
    return "\n".join(lines)


def _measured() -> dict[str, Pairs]:
    """Two seeds, and a model with its update, on the test window."""
    known, later = split("movielens", "test")
    cut = int(known.time[int(known.requests * (1 - RECENT))])
    old, recent = known.between(0, cut), known.between(cut, int(known.time[-1]) + 1)
    with tempfile.TemporaryDirectory() as room:
        a, b = (train(old, laptop(), "scratch", None, seed, Path(room) / str(seed)) for seed in (0, 1))
        update = train(recent, laptop(), "finetune", a, 0, Path(room) / "update")
    by_name = {"two seeds": (b, a), "an update and its champion": (update, a)}
    return {name: _pair(later, score(x, later), score(y, later)) for name, (x, y) in by_name.items()}


def _pair(table: RankingTable, challenger: np.ndarray, champion: np.ndarray) -> Pairs:
    after, before = hits(table, challenger), hits(table, champion)
    order = np.argsort(after.user, kind="stable")
    a, b = (h.column(table.spec.primary_action)[order, None].astype(np.int8) for h in (after, before))
    return Pairs(np.bincount(after.user), b, a)


def _row(name: str, pair: Pairs) -> str:
    """Means over the pairs of one kind."""
    a, b = pair.challenger.astype(float), pair.champion.astype(float)
    user = np.repeat(np.arange(len(pair.counts)), pair.counts)
    x_US, y_US = (sums_by_user(v, user) for v in (a - b, b))
    found = ratios(x_US, y_US, pair.counts, 10, 0)
    alone = (a - b).std(0) * np.sqrt(len(a)) / b.sum(0)  # the standard error if requests were independent
    correlation = np.mean([np.corrcoef(a[:, s], b[:, s])[0, 1] for s in range(a.shape[1])])
    effect = (found.error_M**2).mean() / (alone**2).mean()
    return (
        f"| {name} | {len(a)} | {len(pair.counts)} | {b.mean():.3f} → {a.mean():.3f} | {correlation:.3f} | "
        f"{(a - b).std():.3f} | {effect:.2f} |"
    )


def _passed(pair: Pairs, true: float) -> float:
    """Share of re-drawn evidence on which a challenger of this true difference counts as not worse."""
    rng, users = np.random.default_rng(0), round(REQUESTS / PER_USER)
    keep = (1 + true) * pair.champion.sum() / pair.challenger.sum()
    passed = 0
    for i in range(DRAWS):  # of the two, the one that is ahead of where it should be loses hits
        before_U = pair.by_user(rng.binomial(pair.champion, min(1.0, 1 / keep)))
        after_U = pair.by_user(rng.binomial(pair.challenger, min(1.0, keep)))
        some = rng.integers(0, len(pair.counts), users)
        found = ratios(after_U[some] - before_U[some], before_U[some], pair.counts[some], RESAMPLES, i)
        passed += rules.not_worse(float(found.bounds(rules.CONFIDENCE)[0][0]))
    return passed / DRAWS
