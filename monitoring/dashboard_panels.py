"""What the Grafana dashboard shows: its panels, a query or two each. `dashboard.py` makes the JSON."""

from dataclasses import dataclass
from typing import Literal

MODEL = 'model="$model"'
"""Every figure of the home is asked for by its model; `ranker_*` counters carry the version alone."""

FIRING = 'sum by (alertname) (ALERTS{alertname=~"Evergreen.*", alertstate="firing"}) or vector(0)'

Look = Literal["timeseries", "stat", "table", "state-timeline"]


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: What it shows.
        queries: PromQL by legend.
        says: One sentence for whoever sees it for the first time.
        unit: Grafana's name of the unit.
        look: Grafana's kind of panel.
        width: In 24ths of the page.
        limit: Value from which on it is bad, drawn as a line.
    """

    title: str
    queries: dict[str, str]
    says: str
    unit: str = "short"
    look: Look = "timeseries"
    width: int = 8
    limit: float | None = None


ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        Panel(
            "Model",
            {"v{{version}} of {{slot}}": f"evergreen_model_info{{{MODEL}}}"},
            "The version that the newest check looked at.",
            look="stat",
            width=5,
        ),
        Panel(
            "Model age",
            {"age": f"evergreen_model_age_seconds{{{MODEL}}}"},
            "Since the slot that made it; slots are Monday and Thursday.",
            "s",
            "stat",
            4,
            limit=7 * 86_400,
        ),
        Panel(
            "Newest check",
            {"age": f"model:evergreen_check_age_seconds:max{{{MODEL}}}"},
            "How long ago; a check comes every hour.",
            "s",
            "stat",
            4,
            limit=3 * 3600,
        ),
        Panel(
            "What moved",
            {"{{kind}}": f"evergreen_drift_kind{{{MODEL}}} == 1"},
            "The most likely kind of change.",
            look="stat",
            width=4,
        ),
        Panel(
            "Alerts",
            {"{{alert}}": f"sum by (alert) (evergreen_alert_firing{{{MODEL}}})", "{{alertname}}": FIRING},
            "What fires, by the monitor and by Prometheus; each has a page in docs/runbooks.",
            look="stat",
            width=7,
            limit=1,
        ),
    ),
    "Drift": (
        Panel(
            "Drifted features",
            {"share": f"evergreen_drifted_features_ratio{{{MODEL}}}"},
            "Share of the compared features that are above their own threshold.",
            "percentunit",
        ),
        Panel(
            "Score by threshold",
            {"{{column}}": f"column:evergreen_drift:ratio{{{MODEL}}}"},
            "Each column against its own threshold: drifted from 1 on.",
            limit=1,
            width=16,
        ),
        Panel(
            "Kind",
            {"{{kind}}": f"evergreen_drift_kind{{{MODEL}}}"},
            "Broken pipeline, population or behaviour.",
            look="state-timeline",
        ),
        Panel(
            "Drift that lasts",
            {"{{column}}": f"evergreen_drift_lasting{{{MODEL}}}"},
            "1 for a column that drifted in the newest check and in another of the last 3.",
            look="table",
        ),
        Panel(
            "Scores, thresholds, and what is usual",
            {
                "score of {{column}}": f'evergreen_drift_score{{{MODEL}, column=~"$column"}}',
                "threshold of {{column}}": f'evergreen_drift_threshold{{{MODEL}, column=~"$column"}}',
                "usual for {{column}}": f'evergreen_drift_usual{{{MODEL}, column=~"$column"}}',
            },
            "For the columns chosen above.",
        ),
    ),
    "Data": (
        Panel(
            "Broken columns",
            {"columns": f"evergreen_broken_columns{{{MODEL}}}", "{{column}}": f"evergreen_broken{{{MODEL}}}"},
            "Columns whose feed looks broken; such a window is not trained on.",
            limit=1,
        ),
        Panel(
            "Unseen",
            {"{{column}}": f"evergreen_unseen_ratio{{{MODEL}}}"},
            "Share of rows with a user, item or category that the reference did not have.",
            "percentunit",
        ),
        Panel(
            "Missing", {"{{column}}": f"evergreen_missing_ratio{{{MODEL}}}"}, "Share of missing values.", "percentunit"
        ),
        Panel(
            "Slices",
            {"{{slice}}: {{column}}": f"evergreen_slice_drift_score{{{MODEL}}}"},
            "Where it moved: the parts of the window with the column that moved most in each.",
        ),
        Panel(
            "Volumes",
            {n: f"evergreen_window_{n}{{{MODEL}}}" for n in ("requests", "rows", "users")},
            "What the window of the check holds.",
        ),
        Panel(
            "Late rows",
            {"share": f"evergreen_late_rows_ratio{{{MODEL}}}"},
            "Rows that became known more than an hour after they happened.",
            "percentunit",
            limit=0.2,
        ),
        Panel(
            "Tests of the data",
            {"{{test}}": f"evergreen_data_test_passed{{{MODEL}}}"},
            "1 passed, 0 failed. A retrain holds while one fails.",
            look="table",
        ),
    ),
    "Quality": (
        Panel(
            "HIT@3",
            {
                "{{action}}": f"evergreen_hit3{{{MODEL}}}",
                "{{action}}, low": f"evergreen_hit3_low{{{MODEL}}}",
                "{{action}}, high": f"evergreen_hit3_high{{{MODEL}}}",
                "expected": f"evergreen_hit3_expected{{{MODEL}}}",
                "{{action}}, at random": f"evergreen_hit3_random{{{MODEL}}}",
            },
            "On matured labels, with its 95 % interval; what a model of this age has, and a random order.",
        ),
        Panel(
            "Age of the model in what matured",
            {"age": f"evergreen_outcome_age_seconds{{{MODEL}}}"},
            "From the end of its training window to the middle of the matured requests: what is expected follows it.",
            "s",
        ),
        Panel(
            "Calibration",
            {"{{action}}": f"evergreen_calibration_ratio{{{MODEL}}}"},
            "Predicted chance by observed rate; 1 is perfect.",
        ),
        Panel(
            "Action rates",
            {"{{action}}": f"evergreen_action_rate{{{MODEL}}}"},
            "Observed actions a shown item.",
            "percentunit",
        ),
        Panel(
            "Requests with matured labels",
            {"matured": f"evergreen_matured_requests{{{MODEL}}}", "not yet": f"evergreen_immature_requests{{{MODEL}}}"},
            "What has not matured is left out, not counted as negative.",
            width=12,
        ),
        Panel(
            "Quality lost",
            {"lost": f"evergreen_quality_lost{{{MODEL}}}", "lasting": f"evergreen_quality_lost_lasting{{{MODEL}}}"},
            "1 while HIT@3 is below what is expected, by more than chance.",
            width=12,
        ),
    ),
    "Serving, by the predictors' counters": (
        Panel(
            "Latency",
            {f"v{{{{version}}}} {p}": f"version:ranker_request_seconds:{p}_rate5m" for p in ("p50", "p99")},
            "From body read to answer ready.",
            "s",
            width=6,
            limit=0.5,
        ),
        Panel("Requests", {"v{{version}}": "version:ranker_requests:rate5m"}, "Answers a second.", "reqps", width=6),
        Panel(
            "Errors",
            {"v{{version}}": "version:ranker_errors:ratio_rate5m"},
            "5xx but for 504.",
            "percentunit",
            width=4,
            limit=0.01,
        ),
        Panel(
            "Fallbacks",
            {"v{{version}}": "version:ranker_fallbacks:ratio_rate5m"},
            "Answers without fresh features.",
            "percentunit",
            width=4,
            limit=0.05,
        ),
        Panel(
            "Shed",
            {
                "v{{version}}": "version:ranker_shed:ratio_rate5m",
                "v{{version}} {{priority}}, a second": "sum by (version, priority) (rate(ranker_shed_total[5m]))",
            },
            "429 and 504, and the 429 by priority.",
            "percentunit",
            width=4,
            limit=0.05,
        ),
        Panel(
            "Time by stage, p99",
            {"{{stage}}": "histogram_quantile(0.99, sum by (stage, le) (rate(ranker_stage_seconds_bucket[5m])))"},
            "Features, queue, model.",
            "s",
            width=12,
        ),
        Panel(
            "Requests a run",
            {
                "v{{version}}": "sum by (version) (rate(ranker_batch_requests_sum[5m]))"
                " / sum by (version) (rate(ranker_batch_requests_count[5m]))"
            },
            "How many requests are merged into one run of the model.",
            width=12,
        ),
    ),
    "Serving, by its log": (
        Panel(
            "Latency",
            {"p{{quantile}}": f"evergreen_served_latency_seconds{{{MODEL}}}"},
            "Over the window of the check.",
            "s",
            width=6,
        ),
        Panel("Requests", {"logged": f"evergreen_served_requests{{{MODEL}}}"}, "In the window of the check.", width=6),
        Panel(
            "Errors, shed, fallbacks",
            {
                "errors": f"evergreen_served_errors_ratio{{{MODEL}}}",
                "shed": f"evergreen_served_shed_ratio{{{MODEL}}}",
                "{{kind}}": f"evergreen_served_fallbacks_ratio{{{MODEL}}}",
            },
            "Shares of the window's requests.",
            "percentunit",
            width=6,
        ),
        Panel(
            "Train/serve skew",
            {"share": f"evergreen_skew_ratio{{{MODEL}}}"},
            "Feature values that serving reads otherwise than training.",
            "percentunit",
            width=6,
            limit=0.0000001,
        ),
    ),
    "What it started": (
        Panel(
            "Decisions a day",
            {"{{action}} {{cause}}": f"increase(evergreen_decisions_total{{{MODEL}}}[1d])"},
            "Of the retrain trigger, also each 'no'.",
        ),
        Panel(
            "Newest retrain by outcome",
            {"{{outcome}}": f"time() - evergreen_retrain_timestamp_seconds{{{MODEL}}}"},
            "How long ago it ended.",
            "s",
            "stat",
        ),
        Panel(
            "Missed slots, and what could not be read",
            {
                "missed slots": f"evergreen_slots_missed{{{MODEL}}}",
                "problems: {{source}}": f"evergreen_exporter_problems{{{MODEL}}}",
            },
            "Both should be 0.",
            limit=1,
        ),
    ),
}
