"""How often the gate promotes, by true difference and amount of evidence, beside what others do."""

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np

from benchmarks.gate.pairs import PER_USER, Pairs, draw
from benchmarks.gate.year import STD
from benchmarks.page import RESULTS
from model import gate_rules as rules
from model.bootstrap import one_sided, ratios
from model.power import power
from model.slices import holm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

SIZES = (100, 300, 1_000, 3_000, 10_000)
FEW = ((100, 20), (100, 30), (100, 50), (300, 20), (300, 30), (300, 50), (1000, 20))
DIFFERENCES = (-rules.MARGIN, -0.025, 0.0, 0.005, 0.01, 0.02, 0.05)
WORLDS, PAIRS = 8, 250  # worlds differ in their users' activity; so many pairs in each
PLOT = RESULTS.parent / "images" / "gate_power.png"


@dataclass(frozen=True)
class Decisions:
    """Of many pairs, what each way to decide says; (S,) bool.

    Attributes:
        not_worse: A loss of the margin is excluded (rule 4).
        update: The gate, for a challenger trained to a later instant: not worse, and better or fresher.
        rival: The gate, for one trained to the same instant: not worse, and better.
        naive: HIT@3 is not below the champion's.
        unpaired: Welch's interval from two independent samples of requests excludes the margin.
        unpaired_better: It excludes a difference of zero from below.
        percentile: A percentile bootstrap excludes the margin.
        error: Mean standard error of the relative difference.
    """

    not_worse: np.ndarray
    update: np.ndarray
    rival: np.ndarray
    naive: np.ndarray
    unpaired: np.ndarray
    unpaired_better: np.ndarray
    percentile: np.ndarray
    error: float


def decide(pairs: Pairs, resamples: int, seed: int) -> Decisions:
    """Decide about every pair; the gate by its own code and thresholds."""
    a, b = pairs.challenger, pairs.champion
    before_US = pairs.by_user(b)
    found = ratios(pairs.by_user(a) - before_US, before_US, pairs.counts, resamples, seed)
    low_S, _ = found.bounds(rules.CONFIDENCE)
    value_S, not_worse_S = found.value_M, low_S > -rules.MARGIN
    better_S = (low_S > 0) & (value_S > STD)
    mean_a, mean_b = a.mean(0), b.mean(0)
    welch_S = 1.96 * np.sqrt((a.var(0) + b.var(0)) / len(a)) / mean_b
    return Decisions(
        not_worse=not_worse_S,
        update=not_worse_S & (better_S | (value_S >= -STD)),
        rival=not_worse_S & better_S,
        naive=value_S >= 0,
        unpaired=mean_a / mean_b - 1 - welch_S > -rules.MARGIN,
        unpaired_better=mean_a / mean_b - 1 - welch_S > 0,
        percentile=np.quantile(found.drawn_BM, (1 - rules.CONFIDENCE) / 2, axis=0) > -rules.MARGIN,
        error=float(found.error_M.mean()),
    )


def decisions(requests: int, users: int, differences: tuple[float, ...]) -> Iterator[tuple[float, dict[str, float]]]:
    """For each true difference the share of pairs that each way promotes."""
    resamples = rules.RESAMPLES if requests <= 1000 else 500  # time; 500 move a rate by less than its own noise
    shares: dict[float, list[dict[str, float]]] = {d: [] for d in differences}
    for world in range(WORLDS):
        rng = np.random.default_rng([requests, users, world])
        equal = draw(requests, users, PAIRS, rng)
        for true in differences:
            found = decide(equal.with_difference(true, rng), resamples, world)
            shares[true].append({name: float(np.mean(value)) for name, value in vars(found).items()})
    for true, by_world in shares.items():
        yield true, {name: float(np.mean([s[name] for s in by_world])) for name in by_world[0]}


def run() -> str:
    """The section on rates and power; draws the power curve."""
    n = WORLDS * PAIRS
    lines = [
        f"{n:,} simulated pairs in every cell, {PER_USER} requests a user. Share promoted by the gate for an update "
        "(not worse, and better or fresher), by a naive comparison (`challenger ≥ champion`), and by an unpaired test "
        f"of non-inferiority (Welch). Truly worse by the margin ({rules.MARGIN:.0%}) must stay at or below 5 %.",
        "",
        "| requests | true difference | **the gate** | not worse alone | naive | unpaired | predicted power |",
        "|---|---|---|---|---|---|---|",
    ]
    curves: dict[float, list[dict[str, float]]] = {d: [] for d in DIFFERENCES}
    rivals = []
    for requests in SIZES:
        users = round(requests / PER_USER)
        for true, s in decisions(requests, users, DIFFERENCES):
            curves[true].append(s)
            gap = rules.MARGIN + true
            told = f"{power(s['error'], gap, users, rules.CONFIDENCE):.1%}" if gap > 0 else "–"
            lines.append(
                f"| {requests:,} | {true:+.1%} | **{s['update']:.1%}** | {s['not_worse']:.1%} | {s['naive']:.1%} | "
                f"{s['unpaired']:.1%} | {told} |"
            )
            if true >= 0:
                rivals.append(f"| {requests:,} | {true:+.1%} | **{s['rival']:.1%}** | {s['unpaired_better']:.1%} |")
    lines += ["", "`better` claimed (two models trained to the same instant; with +0.0 % that is an error):", ""]
    lines += ["| requests | true difference | **the gate** | unpaired |", "|---|---|---|---|", *rivals]
    plot(curves)
    return "\n".join([*lines, "", f"![Power of the gate](../images/{PLOT.name})"])


def few() -> str:
    """The section on few users."""
    lines = [
        f"Promoted although truly worse by the margin, {WORLDS * PAIRS:,} pairs in every row; nominal is 2.5 % of the "
        "interval, 5 % of the gate:",
        "",
        "| requests | users | **the gate** | not worse alone | percentile bootstrap | naive | unpaired |",
        "|---|---|---|---|---|---|---|",
    ]
    for requests, users in FEW:
        _, s = next(decisions(requests, users, (-rules.MARGIN,)))
        lines.append(
            f"| {requests:,} | {users} | **{s['update']:.1%}** | {s['not_worse']:.1%} | {s['percentile']:.1%} | "
            f"{s['naive']:.1%} | {s['unpaired']:.1%} |"
        )
    return "\n".join(lines)


def slices() -> str:
    """The section on slices: how often any is called worse, and how often one that is."""
    lines = [
        "24 slices of a seventh of the requests each, overlapping. Every slice exactly at its margin "
        f"({rules.SLICE_MARGIN:.0%}): how often any is called worse (nominal {rules.SLICE_ALPHA:.0%}); equal models: "
        "the same; one slice 30 % worse, all else equal: how often it is found.",
        "",
        "| requests | all at the margin | equal | one 30 % worse |",
        "|---|---|---|---|",
    ]
    for requests in (300, 1_000, 3_000):
        users, rng = round(requests / PER_USER), np.random.default_rng(requests)
        held = np.zeros((3, 1000), bool)
        equal = draw(requests, users, held.shape[1], rng)
        user_Q, of_KQ = np.repeat(np.arange(users), equal.counts), rng.random((24, requests)) < 1 / 7
        worse = equal.with_difference(-rules.SLICE_MARGIN, rng).challenger
        much = np.where(of_KQ[:1].T, equal.with_difference(-0.3, rng).challenger, equal.challenger)
        for case, challenger in enumerate((worse, equal.challenger, much)):
            e_QS = challenger - (1 - rules.SLICE_MARGIN) * equal.champion
            for s in range(held.shape[1]):
                p_K = []
                for of_Q in of_KQ:
                    code = np.unique(user_Q[of_Q], return_inverse=True)[1]
                    enough = of_Q.sum() >= rules.MIN_SLICE_REQUESTS and code.max() + 1 >= rules.MIN_SLICE_USERS
                    p_K.append(one_sided(np.bincount(code, e_QS[of_Q, s])) if enough else 1.0)
                held[case, s] = holm(np.array(p_K)).min() < rules.SLICE_ALPHA
        lines.append(f"| {requests:,} | " + " | ".join(f"{h.mean():.1%}" for h in held) + " |")
    return "\n".join(lines)


def plot(curves: dict[float, list[dict[str, float]]]) -> None:
    """Promoted share against evidence, a line a true difference; dashed is the naive comparison."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(curves)))
    for (true, by_size), colour in zip(curves.items(), colours, strict=True):
        axes[0].plot(SIZES, [s["update"] for s in by_size], "o-", color=colour, label=f"{true:+.1%}")
        axes[0].plot(SIZES, [s["naive"] for s in by_size], ":", color=colour)
        axes[1].plot(SIZES, [s["rival"] for s in by_size], "o-", color=colour)
        axes[1].plot(SIZES, [s["unpaired_better"] for s in by_size], ":", color=colour)
    titles = ("an update goes live (dotted: naive ≥)", "“better” is claimed (dotted: unpaired test)")
    for axis, title in zip(axes, titles, strict=True):
        axis.axhline(0.05, color="grey", lw=0.8)
        axis.set(xscale="log", xlabel="comparable requests", title=title, ylim=(-0.02, 1.02))
        axis.title.set_size(10)
    axes[0].set_ylabel("share of pairs")
    axes[0].legend(title="true difference", fontsize=8)
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
