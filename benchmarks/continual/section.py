"""One replay as a section of the page: its table, sentences made of its numbers, a plot, the command."""

import json
import time
from typing import Any

from benchmarks.continual import plot
from benchmarks.continual.homes import RANGES, settings
from benchmarks.measure import cpu_seconds
from benchmarks.ranker.data import cache
from model.config import DEFAULT_STRATEGY
from pipelines.replay import replay
from pipelines.replay_report import page

Result = dict[str, Any]
_TABLE = (
    "| strategy | HIT@3 | vs finetune | vs scratch | gap closed | lost on old windows | backward transfer | "
    "CPU s an update | of scratch | promote / hold |\n|---|---|---|---|---|---|---|---|---|---|"
)


def run(name: str, data: str, strategies: list[str], seeds: int, jobs: int) -> str:
    """Replay, keep JSON and page in the cache and the plot with the docs, and give the section."""
    started, used = time.perf_counter(), cpu_seconds()
    when = RANGES[data]
    result = replay(settings(data), when.start, when.end, strategies, seeds, jobs, _tell)
    wall, cpu = time.perf_counter() - started, cpu_seconds() - used
    print(f"{name}: {wall:.0f} s, {cpu:.0f} CPU s", flush=True)  # nearly nothing where the replay was known
    room = cache() / "continual"
    (room / f"{name}.json").write_text(json.dumps(result, indent=1))
    (room / f"{name}.html").write_text(page(result))
    plot.save(name, result)
    return section(name, result)


def section(name: str, result: Result) -> str:
    """The section's Markdown."""
    tests = result["windows"][1:]
    comparable = sum(w["comparable_requests"] for w in tests)
    exams = sum(w["exam_requests"] for w in result["windows"])
    head = (
        f"{result['dataset']}, {len(tests)} updates from {result['slots'][0]:.10} to {result['slots'][-1]:.10}, recipe "
        f"{result['recipe']}, {len(result['seeds'])} seed(s); HIT@3 of `{result['primary_action']}` over "
        f"{comparable:,} "
        f"requests (random: {_number(result['random_hit3'][result['primary_action']])}), exams of {exams:,} held-out "
        f"requests. `python -m benchmarks.continual {name}`"
    )
    rows = [row(result, label) for label in result["strategies"]]
    told = " ".join(sentences(result))
    return "\n".join([head, "", _TABLE, *rows, "", told, "", f"![{name}](../images/continual-{name}.png)"])


def row(result: Result, label: str) -> str:
    """One line of the table."""
    s = result["strategies"][label]
    gap, cost, gate, ratio = s["gap_closed"], s["cost"], s["gate"], s["cost"]["cpu_seconds_to_scratch"]
    closed = "–" if gap is None else gap["why_none"] or shown(gap["share"], ".0%")
    cells = (
        f"`{label}`",
        shown(s["hit3"][result["primary_action"]], ".3f"),
        *("–" if label == other else shown(s["against"].get(other), "+.1%") for other in ("finetune", "scratch")),
        "–" if label in ("finetune", "scratch") else closed,
        shown(lost(result, label), ".1%"),
        shown(s["backward_transfer"], "+.3f"),
        f"{cost['cpu_seconds']:.1f}",
        f"1/{1 / ratio:.1f}" if ratio else "–",
        f"{gate['promote']} / {gate['hold']}",
    )
    return f"| {' | '.join(cells)} |"


def sentences(result: Result) -> list[str]:
    """What the numbers say, of those that there are."""
    strategies, found = result["strategies"], []
    lag = worst_lag(result)
    if lag is not None:
        found.append(
            f"Lost on old windows: HIT@3 on the exams of windows {lag} slots old, where `finetune` loses most, against "
            "what the same lineage had when they were new."
        )
    default = strategies.get(DEFAULT_STRATEGY)
    if default and default["gap_closed"]:
        gap, ratio = default["gap_closed"], default["cost"]["cpu_seconds_to_scratch"]
        cost = f" at 1/{1 / ratio:.1f} of scratch's CPU seconds" if ratio else ""
        if gap["why_none"]:
            found.append(
                f"There is no gap from `finetune` up to `scratch` ({shown(gap['gap'], '+.1%')}: {gap['why_none']}); "
                f"`{DEFAULT_STRATEGY}` runs{cost}."
            )
        else:
            found.append(
                f"`{DEFAULT_STRATEGY}` closes {shown(gap['share'], '.0%')} of the gap between `finetune` and "
                f"`scratch`{cost}."
            )
    weeks = [w for w in result.get("frozen", []) if w["days"] == 28 and w["against"].get("finetune")]
    if weeks:
        found.append(f"After 28 days `frozen` is {shown(weeks[0]['against']['finetune'], '+.1%')} against `finetune`.")
    return found


def worst_lag(result: Result) -> int | None:
    """The age of windows on which fine-tuning loses most; ages of one pair of model and window are left out."""
    points = result["strategies"].get("finetune", {}).get("memory", [])[:-1]
    known = [p for p in points if p.get("value") is not None and p["lag"]]
    return max(known, key=lambda p: p["value"])["lag"] if known else None


def lost(result: Result, label: str) -> dict[str, Any] | None:
    """What a strategy loses where fine-tuning loses most."""
    lag = worst_lag(result)
    if lag is None:
        return None
    point: dict[str, Any] = result["strategies"][label]["memory"][lag]
    return point if point.get("value") is not None else None


def shown(estimate: dict[str, Any] | None, form: str) -> str:
    """A value with its interval."""
    if not estimate:
        return "–"
    low, high = (format(v, form) if v is not None else "?" for v in (estimate["low"], estimate["high"]))
    return f"{estimate['value']:{form}} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _tell(text: str, done: int, total: int) -> None:
    print(f"  {done}/{total} {text}", flush=True)
