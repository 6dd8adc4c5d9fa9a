"""The dashboard of a model in the Evidently UI: what moves over time, one panel a question.

Every panel plots `MeanValue` numbers of the runs. A `ValueDrift` series cannot be plotted over time: its threshold is
part of its name, and each column has a threshold of its own. The ratio of score and threshold can, and it compares
columns. A number that a run does not have is a gap in its line.

The dashboard follows the worst features, so each check writes it anew, until a person rearranges it in the UI: from
then on it is theirs.
"""

import json
import math
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from monitoring.verdict import ColumnDrift, DriftVerdict

if TYPE_CHECKING:
    from evidently.sdk.models import DashboardPanelPlot, PanelMetric

SHOWN = 8  # lines in a panel; more cannot be told apart
THRESHOLD, PERFECT = "threshold", "perfect"  # lines at 1, beside which the others are read
KINDS = ("broken", "population", "behaviour")


def numbers(verdict: DriftVerdict) -> dict[str, float]:
    """The numbers of a check by the name under which panels plot them; what is not known is absent, never NaN."""
    found = {
        **_drift(verdict),
        **{ratio_name(c): c.ratio for c in verdict.columns},
        **{f"unseen {_vocabulary(c)}": c.score for c in verdict.columns if c.kind == "vocabulary"},
        "requests": float(verdict.requests[1]),
        "rows": float(verdict.rows[1]),
        "users": float(verdict.users[1]),
        "late rows": verdict.late,
        **_outcome(verdict),
        **_serving(verdict),
        **({"skew": verdict.skew_share} if verdict.skew_share is not None else {}),
        **dict.fromkeys((THRESHOLD, PERFECT), 1.0),
    }
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def ratio_name(column: ColumnDrift) -> str:
    """Name of the series that tells how near a column is to its threshold."""
    return f"{column.name} (drift / threshold)"


def dashboard(project_id: uuid.UUID, verdicts: Sequence[DriftVerdict]) -> str:
    """The dashboard as JSON text.

    Args:
        project_id: Of the model.
        verdicts: The newest checks; single features are those that came nearest to their threshold in them.
    """
    from evidently.legacy.utils import NumpyEncoder
    from evidently.sdk.models import DashboardModel, DashboardTabModel

    panels = _panels(verdicts)
    for panel in panels:  # the same ids each time, so that a dashboard written twice is one dashboard
        panel.id = uuid.uuid5(project_id, panel.title)
    content = [json.loads(json.dumps(p.dict(), cls=NumpyEncoder)) for p in panels]
    tab = DashboardTabModel(id=_mark(project_id, content), title="Drift", panels=[p.id for p in panels])
    return json.dumps(DashboardModel(tabs=[tab], panels=panels).dict(), cls=NumpyEncoder)


def is_ours(project_id: uuid.UUID, text: str) -> bool:
    """Whether nobody changed a dashboard since `dashboard` wrote it: the id of its tab is a digest of its panels."""
    held = json.loads(text)
    marks = [tab["id"] for tab in held["tabs"]]
    order = [p["id"] for p in held["panels"]] == (held["tabs"][0]["panels"] if held["tabs"] else [])
    return order and marks == [str(_mark(project_id, held["panels"]))]


def _mark(project_id: uuid.UUID, content: list[dict[str, object]]) -> uuid.UUID:
    return uuid.uuid5(project_id, json.dumps(content, sort_keys=True))


def _drift(verdict: DriftVerdict) -> dict[str, float]:
    return {
        "share of drifted features": verdict.share,
        "drifted features": float(sum(c.drifted for c in verdict.columns if not c.prediction)),
        "broken columns": float(len(verdict.broken)),
        "failed data tests": float(sum(not t.passed for t in verdict.data)),
        **{kind: float(verdict.kind == kind) for kind in KINDS},
    }


def _outcome(verdict: DriftVerdict) -> dict[str, float]:
    if not (outcome := verdict.outcome):
        return {}
    found = {f"HIT@3/{action}": value for action, value in outcome.hit3.items()}
    found |= {f"HIT@3/{action} low": low for action, (low, _) in outcome.interval.items()}
    found |= {f"HIT@3/{action} high": high for action, (_, high) in outcome.interval.items()}
    found |= {f"calibration {action}": value for action, value in outcome.calibration.items()}
    found |= {"matured requests": float(outcome.requests), "immature requests": float(outcome.immature)}
    return found | ({"HIT@3 expected": outcome.expected} if outcome.expected is not None else {})


def _serving(verdict: DriftVerdict) -> dict[str, float]:
    if not (serving := verdict.serving):
        return {}
    found = {"served requests": float(serving.requests), "errors": serving.errors, "shed": serving.shed}
    found["fallbacks"] = sum(serving.fallbacks.values())
    latency = {"median latency (ms)": serving.p50_ms, "99 % latency (ms)": serving.p99_ms}
    return found | {name: value for name, value in latency.items() if value is not None}


def _vocabulary(column: ColumnDrift) -> str:
    return column.name.removeprefix("new ")


def _panels(verdicts: Sequence[DriftVerdict]) -> list["DashboardPanelPlot"]:
    from evidently.sdk.panels import bar_plot_panel, line_plot_panel, text_panel

    def lines(title: str, *names: str) -> "DashboardPanelPlot":
        return line_plot_panel(title=title, size="half", values=_means(names))

    features = [ratio_name(c) for c in _worst(verdicts) if not c.prediction][:SHOWN]
    predictions = [ratio_name(c) for c in _worst(verdicts) if c.prediction][:SHOWN]
    found = dict.fromkeys(name for v in verdicts for name in numbers(v))

    def those(start: str) -> list[str]:
        return [n for n in found if n.startswith(start) and not n.endswith((" low", " high"))][:SHOWN]

    quality = [n for n in found if n.startswith("HIT@3")] or ["HIT@3 expected"]
    text = "Each check against the window that the model was trained on. The report of a check: Reports, newest first."
    return [
        text_panel(title="Drift of the serving model", description=text),
        # Not counters: the UI shows "no value" for a zero.
        bar_plot_panel(title="Kind of drift", size="half", values=_means(KINDS), stacked=True),
        lines("Share of drifted features", "share of drifted features"),
        lines("Single features, the worst of two days (drifted at 1)", *features, THRESHOLD),
        lines("Predicted scores (drifted at 1)", *predictions, THRESHOLD),
        lines("HIT@3 on matured labels, and expected at this age", *quality),
        lines("Calibration, predicted / observed (1 is perfect)", *those("calibration"), PERFECT),
        lines("Volumes of the window", "requests", "users", "served requests"),
        lines("Latency", "median latency (ms)", "99 % latency (ms)"),
        lines("Errors, shed requests and fallbacks (shares)", "errors", "shed", "fallbacks"),
        lines("Values that serving reads otherwise; late rows (shares)", "skew", "late rows"),
        lines("Broken columns and failed data tests", "broken columns", "failed data tests"),
        lines("Rows with an unseen value (shares)", *(those("unseen ") or ["unseen item_id"])),
    ]


def _worst(verdicts: Sequence[DriftVerdict]) -> list[ColumnDrift]:
    """Every column at its worst, the one furthest above its threshold first."""
    worst: dict[str, ColumnDrift] = {}
    for column in sorted((c for v in verdicts for c in v.columns), key=lambda c: -c.ratio):
        worst.setdefault(column.name, column)
    return list(worst.values())


def _means(names: Sequence[str]) -> list["PanelMetric"]:
    from evidently.sdk.models import PanelMetric

    return [PanelMetric(metric="MeanValue", metric_labels={"column": name}, legend=name) for name in names]
