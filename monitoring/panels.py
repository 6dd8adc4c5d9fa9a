"""The dashboard of a model in the Evidently UI: what moves over time, one panel a question.

Written once a project. A person may rearrange it in the UI; later checks leave it alone.
"""

import json
import uuid

from monitoring import page, rules
from monitoring.verdict import DriftVerdict

SHOWN_FEATURES = 6  # lines in the panel of single features; more cannot be told apart


def dashboard(project_id: uuid.UUID, verdict: DriftVerdict) -> str:
    """The dashboard as JSON text; single features are those nearest to their threshold in the first check."""
    from evidently.legacy.utils import NumpyEncoder
    from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric
    from evidently.sdk.panels import line_plot_panel, text_panel

    def means(*columns: str) -> list[PanelMetric]:
        return [PanelMetric(metric="MeanValue", metric_labels={"column": c}, legend=c) for c in columns]

    features = [page.ratio_name(c) for c in verdict.worst if not c.prediction][:SHOWN_FEATURES]
    predictions = [page.ratio_name(c) for c in verdict.columns if c.prediction]
    unseen = [f"unseen {name}" for name in ("user_id", "item_id")]
    quality = sorted(verdict.quality) or ["HIT@3/save"]
    share = f"Share of drifted features (a retrain is asked for at {rules.DRIFT_SHARE:.0%})"
    panels = [
        text_panel(title="Drift against the window that the serving model was trained on"),
        # Not counters: the UI shows "no value" for a zero.
        line_plot_panel(title="Features", size="half", values=means("drifted features", "broken features")),
        line_plot_panel(title=share, size="half", values=means("share of drifted features")),
        line_plot_panel(title="Predicted scores (drifted at 1)", size="half", values=means(*predictions)),
        line_plot_panel(title="Single features (drifted at 1)", size="half", values=means(*features)),
        line_plot_panel(title="Rows with an unseen user or item", size="half", values=means(*unseen)),
        line_plot_panel(title="Quality on the window", size="half", values=means(*quality)),
        line_plot_panel(title="Feature values that serving reads otherwise", size="half", values=means(page.SKEW)),
    ]
    for panel in panels:  # the same ids each time, so that a dashboard written twice is one dashboard
        panel.id = uuid.uuid5(project_id, panel.title)
    tab = DashboardTabModel(id=uuid.uuid5(project_id, "tab"), title="Drift", panels=[p.id for p in panels])
    return json.dumps(DashboardModel(tabs=[tab], panels=panels).dict(), cls=NumpyEncoder)
