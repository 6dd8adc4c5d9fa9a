"""The plot of a section: freshness, memory, cost against quality, frontier, in one small PNG."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.page import RESULTS

Result = dict[str, Any]
IMAGES = RESULTS.parent / "images"


def save(name: str, result: Result) -> None:
    """Write docs/images/continual-<name>.png."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (fresh, memory), (cost, frontier) = axes
    primary = result["primary_action"]
    for n, (label, s) in enumerate(result["strategies"].items()):
        colour = plt.get_cmap("tab10" if len(result["strategies"]) <= 10 else "tab20")(n)
        _line(fresh, label, s["aged"], "age", colour)
        _line(memory, label, s["memory"], "lag", colour)
        seconds = s["cost"]["cpu_seconds"]
        if seconds:
            _point(cost, label, seconds, s["hit3"][primary], colour)
        if s["stability"]:
            frontier.scatter(s["stability"]["value"], s["hit3"][primary]["value"], color=colour, s=28)
            at = (s["stability"]["value"], s["hit3"][primary]["value"])
            frontier.annotate(label, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    fresh.set(title="Freshness", xlabel="age of the model, slots", ylabel="HIT@3 against the newest model")
    memory.set(title="Memory", xlabel="age of the window, slots", ylabel="HIT@3 lost since it was new")
    cost.set(title="Cost", xlabel="CPU seconds of one update", ylabel=f"HIT@3/{primary}", xscale="log")
    frontier.set(title="Frontier", xlabel="stability: HIT@3 on earlier exams", ylabel="plasticity: HIT@3, next window")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (fresh, memory):
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:.1%}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for formatter in (cost.xaxis.set_major_formatter, cost.xaxis.set_minor_formatter):
        formatter(lambda v, _: f"{v:g}")
    cost.tick_params(axis="x", which="both", labelsize=8)
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"continual-{name}.png", dpi=90)
    plt.close(figure)


def _line(axis: Axes, label: str, points: list[dict[str, Any]], x: str, colour: Any) -> None:
    known = [p for p in points if p.get("value") is not None and p["low"] is not None]
    at, value = [p[x] for p in known], [p["value"] for p in known]
    axis.plot(at, value, marker="o", markersize=3, linewidth=1.3, color=colour, label=label)
    axis.fill_between(at, [p["low"] for p in known], [p["high"] for p in known], color=colour, alpha=0.08, linewidth=0)


def _point(axis: Axes, label: str, x: float, estimate: dict[str, Any], colour: Any) -> None:
    value = estimate["value"]
    bars = [[value - estimate["low"]], [estimate["high"] - value]]
    axis.errorbar([x], [value], yerr=bars, fmt="o", color=colour, markersize=5, elinewidth=0.8, label=label)
