"""Tables and plot of the simulated canaries."""

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np

from benchmarks.canary.drive import METHODS, STAGES, Result
from benchmarks.page import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

PLOT = RESULTS.parent / "images" / "canary_exposed.png"


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share (Journal of the American Statistical Association 22, 1927)."""
    if not n:
        return 0.0, 1.0
    p, d = k / n, 1 + z * z / n
    radius = z / d * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle = (p + z * z / (2 * n)) / d
    return float(max(middle - radius, 0)), float(min(middle + radius, 1))


def share(k: int, n: int) -> str:
    """A share with its interval."""
    low, high = wilson(k, n)
    return f"{k} of {n} ({k / max(n, 1):.1%}; {low:.1%}–{high:.1%})" if n else "–"


def overall(results: Sequence[Result]) -> str:
    """One line a method over all canaries, each scenario weighing the same within what a method was given."""
    lines = [
        "| judge | false rollbacks of healthy models | false promotions of harmful ones | exposed before rollback, "
        "median | p90 | requests until a healthy promotion, median |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        mine = [r for r in results if r.method == method.name]
        good, bad = [r for r in mine if not r.harmful], [r for r in mine if r.harmful]
        if not good or not bad:
            continue
        done = [r.requests for r in good if r.promoted]
        lines.append(
            f"| {_bold(method.name)} | {share(sum(not r.promoted for r in good), len(good))} "
            f"| {share(sum(r.promoted for r in bad), len(bad))} | {_exposed(bad, 0.5)} | {_exposed(bad, 0.9)} "
            f"| {np.median(done) if done else 0:,.0f} |"
        )
    return "\n".join(lines)


def _exposed(results: Sequence[Result], q: float) -> str:
    """A quantile of the requests exposed; a promoted model is exposed to all requests from then on."""
    value = np.quantile([np.inf if r.promoted else r.exposed for r in results], q, method="higher")
    return f"{value:,.0f}" if np.isfinite(value) else "all"


def detection(results: Sequence[Result]) -> str:
    """Detected by scenario and method, and the requests exposed."""
    names = [m.name for m in METHODS]
    head = "| harm | " + " | ".join(_bold(n) for n in names) + " |"
    lines = [head, "|---|" + "---|" * len(names)]
    for scenario in _order(r.scenario for r in results if r.harmful):
        cells = []
        for name in names:
            mine = [r for r in results if (r.scenario, r.method) == (scenario, name)]
            if not mine:
                cells.append("–")
                continue
            found = np.mean([not r.promoted for r in mine])
            cells.append(f"{found:.0%}: {_exposed(mine, 0.5)} ({_exposed(mine, 0.9)})")
        lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def healthy(results: Sequence[Result]) -> str:
    """False rollbacks of our judge by kind of healthy model, with the rule that was wrong or could not be met."""
    lines = ["| healthy model | rolled back | why |", "|---|---|---|"]
    for scenario in _order(r.scenario for r in results if not r.harmful):
        mine = [r for r in results if (r.scenario, r.method) == (scenario, METHODS[0].name)]
        lost = [r for r in mine if not r.promoted]
        why = ", ".join(f"{r.why} at {r.stage} %" for r in lost[:6]) or "–"
        lines.append(f"| {scenario} | {share(len(lost), len(mine))} | {why} |")
    return "\n".join(lines)


def stages(results: Sequence[Result]) -> str:
    """Where and by which rule our judge finds each harm."""
    lines = ["| harm | canaries | " + " | ".join(f"at {s} %" for s in STAGES) + " | rules |", "|---|---|" + "---|" * 6]
    for scenario in _order(r.scenario for r in results if r.harmful):
        mine = [r for r in results if (r.scenario, r.method) == (scenario, METHODS[0].name) and not r.promoted]
        at = [sum(r.stage == s for r in mine) for s in STAGES]
        rules = {why: sum(r.why == why for r in mine) for why in _order(r.why for r in mine)}
        said = ", ".join(f"{why} {k}" for why, k in sorted(rules.items(), key=lambda item: -item[1])[:4])
        lines.append(f"| {scenario} | {len(mine)} | " + " | ".join(map(str, at)) + f" | {said} |")
    return "\n".join(lines)


def plot(results: Sequence[Result]) -> None:
    """Requests exposed until the rollback by scenario, each method a mark; promotions stand at the right edge."""
    scenarios = _order(r.scenario for r in results if r.harmful)
    figure, axes = plt.subplots(figsize=(9, 6))
    for k, method in enumerate(METHODS):
        middle = []
        for scenario in scenarios:
            mine = [r for r in results if (r.scenario, r.method) == (scenario, method.name)]
            exposed = [1e6 if r.promoted else max(r.exposed, 10) for r in mine]
            middle.append(np.quantile(exposed, 0.5, method="higher") if exposed else np.nan)
        marker = "o" if k == 0 else "v^sDPX"[k - 1]
        axes.plot(middle, np.arange(len(scenarios)) + 0.09 * (k - 3), marker, label=method.name, ms=9 if k == 0 else 6)
    axes.set_xscale("log")
    axes.set_yticks(range(len(scenarios)), scenarios)
    axes.invert_yaxis()
    axes.set_xticks([10, 100, 1e3, 1e4, 1e5, 1e6], ["none", "100", "1,000", "10,000", "100,000", "promoted"])
    axes.set_xlabel("requests that users got from the harmful model before it was taken back (median)")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=4, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


def _bold(name: str) -> str:
    return f"**{name}**" if name == METHODS[0].name else name


def _order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
