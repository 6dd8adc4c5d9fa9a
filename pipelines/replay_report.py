"""A replay as one self-contained page: what each strategy gets, what it forgets, what it costs."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from pipelines import replay_plots as plots

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; } .small { color: #5a6b7b; font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid #e3e8ee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #5a6b7b; font-weight: 600; }
td i { display: block; font-style: normal; color: #7b8a99; font-size: .78rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
"""
_COLUMNS = (
    "strategy",
    "HIT@3",
    "vs finetune",
    "vs scratch",
    "gap closed",
    "forgetting",
    "backward transfer",
    "CPU s",
    "of scratch",
    "promote / hold",
)


def page(result: dict[str, Any]) -> str:
    """The page as HTML; it loads nothing from anywhere."""
    figures = [
        ("Freshness", _FRESHNESS, plots.freshness(result)),
        ("Without an update", _STALE, plots.stale(result)),
        ("Memory", _MEMORY, plots.memory(result)),
        ("The matrix R[i, j]", _MATRIX, plots.heatmaps(result)),
        ("Cost against quality", _COST, plots.cost(result)),
        ("Stability and plasticity", _FRONTIER, plots.frontier(result)),
    ]
    parts = [_head(result), _table(result)]
    first = True
    for title, told, figure in figures:
        if figure is not None:
            parts.append(f"<h2>{escape(title)}</h2>\n<p>{escape(told)}</p>\n{_html(figure, first)}")
            first = False
    title = f"Replay of {escape(result['dataset'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


_FRESHNESS = (
    "What a model loses as it grows old: models of several ages on the same windows, against the newest model of the "
    "same strategy."
)
_STALE = "The first model, never updated, against each strategy on the windows of the same week."
_MEMORY = (
    "What a strategy has forgotten of the windows it learned: HIT@3 on their held-out requests against "
    "what it had when they were new. Seasons that come back show as waves."
)
_MATRIX = "HIT@3 of the model of slot i on the held-out requests of window j; window 0 is the history before slot 0."
_COST = "CPU seconds stand for energy, too; each worker has one thread."
_FRONTIER = "Up: better on what comes; right: better on what was. A line joins the penalty strengths of one strategy."


def _head(result: dict[str, Any]) -> str:
    tests = result["windows"][1:]
    primary = result["primary_action"]
    requests = sum(w["comparable_requests"] for w in tests)
    random = result["random_hit3"][primary]
    sampled = " Only positives were logged; candidates were completed by sampling." * (
        result["exposure"] == "positives"
    )
    return (
        f"<h1>Replay of {escape(result['dataset'])}</h1>\n<p>{len(tests)} windows from {result['slots'][0]:.10} to "
        f"{result['slots'][-1]:.10}, {requests:,} requests with more than three candidates, {len(result['seeds'])} "
        f"seeds. Each strategy is tested on a window, then trained on it; HIT@3/{escape(primary)} of a random order is "
        f"{'–' if random is None else f'{random:.3f}'}.{sampled}</p>\n"
        f'<p class="small">recipe {escape(result["recipe"])} ({result["recipe_digest"]}), code {result["code"]}, data '
        f"{result['data'][:16]}, seeds {', '.join(map(str, result['seeds']))}. Intervals: 95 %, bootstrap over users, "
        "the same resamples for all strategies, on the mean over seeds.</p>"
    )


def _table(result: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in _COLUMNS)
    rows = "\n".join(_row(result, label, s) for label, s in result["strategies"].items())
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _row(result: dict[str, Any], label: str, s: dict[str, Any]) -> str:
    gap, cost, gate = s["gap_closed"], s["cost"], s["gate"]
    closed = "–" if gap is None else gap["why_none"] or _cell(gap["share"], ".0%")
    ratio = cost["cpu_seconds_to_scratch"]
    dot = f'<span class="dot" style="background:{plots.colour(result, label)}"></span>'
    cells = (
        dot + escape(label),
        _cell(s["hit3"][result["primary_action"]], ".3f"),
        _cell(s["against"].get("finetune"), "+.1%") if label != "finetune" else "–",
        _cell(s["against"].get("scratch"), "+.1%") if label != "scratch" else "–",
        closed,
        _cell(s["forgetting"], ".3f"),
        _cell(s["backward_transfer"], "+.3f"),
        f"{cost['cpu_seconds']:.1f}",
        f"1/{1 / ratio:.1f}" if ratio else "–",
        f"{gate['promote']} / {gate['hold']}",
    )
    return "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _cell(estimate: dict[str, float] | None, form: str) -> str:
    if estimate is None:
        return "–"
    low, high = (format(v, form) if v is not None else "?" for v in (estimate["low"], estimate["high"]))
    return f"{estimate['value']:{form}}<i>{low} to {high}</i>"


def _html(figure: go.Figure, with_library: bool) -> str:
    text: str = figure.to_html(full_html=False, include_plotlyjs=with_library, config={"displayModeBar": False})
    return text
