"""Plots of a replay's numbers (`pipelines/replay_result.py`), one figure a question; intervals are error bars."""

from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

_COLOURS = [*qualitative.D3, *qualitative.Set2]
_ASIDE = 0.006  # of the axis, by which the points of one strategy stand beside those of the next
_HEATMAPS = 6  # strategies whose matrices are shown
Result = dict[str, Any]


def colour(result: Result, label: str) -> str:
    """A strategy's colour, the same in every figure."""
    return _COLOURS[list(result["strategies"]).index(label) % len(_COLOURS)]


def freshness(result: Result) -> go.Figure:
    """HIT@3 against the age of the model, relative to the newest one of the same strategy."""
    figure = _figure("age of the model, slots", "HIT@3 against the newest model", "+.0%")
    for label, s in result["strategies"].items():
        points = [p for p in s["aged"] if "value" in p]
        if points:
            figure.add_trace(_line(result, label, [p["age"] for p in points], points))
    figure.update_xaxes(tickvals=sorted({p["age"] for s in result["strategies"].values() for p in s["aged"]}))
    return figure


def stale(result: Result) -> go.Figure | None:
    """What a model loses that is never updated, by days since its training; None without `frozen`."""
    weeks = result.get("frozen", [])
    figure = _figure("days since the training of the frozen model", "its HIT@3 against the strategy's", "+.0%")
    for label in result["strategies"]:
        points = [(w["days"], w["against"][label]) for w in weeks if w["against"].get(label)]
        if points:
            figure.add_trace(_line(result, label, [d for d, _ in points], [p for _, p in points]))
    return figure if figure.data else None


def memory(result: Result) -> go.Figure:
    """The share of HIT@3 lost on old windows against when they were new, by their age."""
    figure = _figure("age of the window, slots", "HIT@3 lost since it was new", ".0%")
    for label, s in result["strategies"].items():
        points = [p for p in s["memory"] if "value" in p]
        figure.add_trace(_line(result, label, [p["lag"] for p in points], points))
    figure.update_xaxes(dtick=1)
    return figure


def heatmaps(result: Result) -> go.Figure:
    """R[i, j] of several strategies, on one scale."""
    labels = list(result["strategies"])[:_HEATMAPS]
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    figure = make_subplots(rows, columns, subplot_titles=labels, vertical_spacing=0.16 if rows > 1 else 0)
    for n, label in enumerate(labels):
        figure.add_trace(
            go.Heatmap(
                z=result["strategies"][label]["matrix"],
                coloraxis="coloraxis",
                hovertemplate="model %{y}, window %{x}: %{z:.3f}<extra></extra>",
            ),
            n // columns + 1,
            n % columns + 1,
        )
    figure.update_layout(
        template="plotly_white",
        height=110 + 300 * rows,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": "HIT@3"}},
    )
    figure.update_xaxes(title="window", dtick=4, constrain="domain", title_standoff=4, showgrid=False)
    figure.update_yaxes(autorange="reversed", dtick=4, showgrid=False)
    figure.update_yaxes(title="model of slot", col=1)
    return figure


def cost(result: Result) -> go.Figure:
    """HIT@3 against what an update costs."""
    figure = _figure("CPU seconds of one update (log)", f"HIT@3/{result['primary_action']}", ".3f")
    figure.update_xaxes(type="log", dtick="D2")
    for label, s in result["strategies"].items():
        if s["cost"]["cpu_seconds"]:
            figure.add_trace(_point(result, label, s["cost"]["cpu_seconds"], s["hit3"][result["primary_action"]]))
    return figure


def frontier(result: Result) -> go.Figure:
    """Stability against plasticity; the strengths of one strategy are joined by a line."""
    primary = result["primary_action"]
    figure = _figure("stability: HIT@3 on the exams of earlier windows", "plasticity: HIT@3 on the next window", ".3f")
    figure.update_xaxes(tickformat=".3f")
    families: dict[str, list[str]] = {}
    for label, s in result["strategies"].items():
        if s["stability"]:
            families.setdefault(label.partition("@")[0], []).append(label)
    for name, labels in families.items():
        labels.sort(key=lambda label: float(label.partition("@")[2] or 0))
        found = [result["strategies"][label] for label in labels]
        figure.add_trace(
            go.Scatter(
                x=[s["stability"]["value"] for s in found],
                y=[s["hit3"][primary]["value"] for s in found],
                mode="lines+markers+text",
                text=[label.partition("@")[2] if len(labels) > 1 else label for label in labels],
                textposition="top center",
                name=name,
                marker={"size": 9, "color": colour(result, labels[0])},
                line={"color": colour(result, labels[0]), "width": 1.5},
                cliponaxis=False,
            )
        )
    return figure


def _figure(x: str, y: str, form: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=420,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        xaxis_title=x,
        yaxis_title=y,
        showlegend=True,
    )
    figure.update_yaxes(tickformat=form)
    return figure


def _line(result: Result, label: str, x: list[float], points: list[dict[str, Any]]) -> go.Scatter:
    labels = list(result["strategies"])
    aside = _ASIDE * max(x) * (labels.index(label) - (len(labels) - 1) / 2)  # or the bars would hide each other
    return go.Scatter(
        x=[v + aside for v in x],
        y=[p["value"] for p in points],
        error_y=_bars(points),
        mode="lines+markers",
        name=label,
        line={"color": colour(result, label), "width": 2},
    )


def _point(result: Result, label: str, x: float, estimate: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=[x],
        y=[estimate["value"]],
        error_y=_bars([estimate]),
        mode="markers",
        name=label,
        marker={"color": colour(result, label), "size": 10},
    )


def _bars(points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [(p["high"] or p["value"]) - p["value"] for p in points],
        "arrayminus": [p["value"] - (p["low"] or p["value"]) for p in points],
        "thickness": 1,
        "width": 3,
    }
