"""The Evidently report of one check: its statistics, its page and the snapshot that its UI shows.

Evidently takes 5 s to import, so this is done inside the functions.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from engagement.files import write_text
from evergreen.settings import TELEMETRY_OFF
from monitoring import rules
from monitoring.compare import Column
from monitoring.verdict import DriftVerdict

if TYPE_CHECKING:
    from evidently.core.serialization import SnapshotModel


def run(
    columns: list[Column], reference_rows: int, as_of: datetime, model_version: str, tags: list[str]
) -> Any:
    """Run Evidently's drift report; returns its snapshot.

    Args:
        columns: What to compare; at least one.
        reference_rows: How many of the rows belong to the reference.
        as_of: Instant of the check, aware.
        model_version: Version of the model whose reference this is.
        tags: Tags of the run.
    """
    _silence()
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift
    from evidently.metrics.column_statistics import DriftedColumnsCount

    data = pd.DataFrame({c.name: c.values for c in columns})
    names = {kind: [c.name for c in columns if c.kind == kind] for kind in rules.METHOD}
    definition = DataDefinition(numerical_columns=names["numeric"], categorical_columns=names["categorical"])
    method = {c.name: rules.METHOD[c.kind] for c in columns}
    threshold = {c.name: c.threshold for c in columns}
    features = [c.name for c in columns if not c.prediction]
    metrics: list[Any] = [ValueDrift(column=n, method=method[n], threshold=threshold[n]) for n in method]
    if features:  # the same rule a second time, as the metric that Evidently's own panels know
        count = DriftedColumnsCount(
            columns=features,
            drift_share=rules.DRIFT_SHARE,
            per_column_method={n: method[n] for n in features},
            per_column_threshold={n: threshold[n] for n in features},
        )
        metrics.insert(0, count)
    current = Dataset.from_pandas(data.iloc[reference_rows:].reset_index(drop=True), definition)
    reference = Dataset.from_pandas(data.iloc[:reference_rows].reset_index(drop=True), definition)
    return Report(metrics, include_tests=True).run(
        current,
        reference,
        timestamp=naive(as_of),
        name=f"{as_of:%Y-%m-%d %H:%M}, model {model_version}",
        tags=[f"model:{model_version}", *tags],
        metadata={"model_version": model_version, "as_of": as_of.isoformat()},
    )


def scores(snapshot: Any) -> dict[str, float]:
    """Evidently's score of each column."""
    metrics = [m for m in snapshot.dict()["metrics"] if m["config"]["type"].endswith(":ValueDrift")]
    return {m["config"]["column"]: float(m["value"]) for m in metrics}


def save(snapshot: Any, verdict: DriftVerdict, out: Path) -> None:
    """Write `drift.html` (self-contained) and `snapshot.json` (what `workspace.record` stores).

    The verdict's own numbers are added as `MeanValue` metrics, so that a panel can plot them over time.
    """
    from evidently.core.report import Snapshot

    model = snapshot.to_snapshot_model()
    numbers = _numbers(verdict, snapshot)
    model.metric_results.update(numbers.metric_results)
    model.top_level_metrics = [*model.top_level_metrics, *numbers.top_level_metrics]
    model.report.items = [*model.report.items, *numbers.report.items]
    model.widgets = [*_summary(verdict), *model.widgets]
    merged = Snapshot.load_model(model)
    write_text(out / "drift.html", merged.get_html_str(as_iframe=False))
    write_text(out / "snapshot.json", merged.dumps())


def save_empty(verdict: DriftVerdict, out: Path) -> None:
    """Write a page for a check that had nothing to compare; there is no snapshot then."""
    (out / "snapshot.json").unlink(missing_ok=True)
    text = verdict.reason.replace("&", "&amp;").replace("<", "&lt;")
    write_text(out / "drift.html", f"<!doctype html><meta charset=utf-8><title>Drift</title><p>{text}</p>\n")


def naive(instant: datetime) -> datetime:
    """UTC without a zone: one aware run among naive ones makes Evidently's series API answer 500."""
    return instant.astimezone(UTC).replace(tzinfo=None)


def _numbers(verdict: DriftVerdict, snapshot: Any) -> "SnapshotModel":
    """The verdict's numbers as a report of their own, without a reference that they would be compared with."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import MeanValue

    values = {
        "drifted": float(verdict.drifted),
        "broken features": float(len(verdict.broken)),
        "rows": float(verdict.rows[1]),
        **{f"unseen {name}": share for name, share in verdict.churn.items()},
        **{name: value for name, value in verdict.quality.items() if np.isfinite(value)},
    }
    data = Dataset.from_pandas(pd.DataFrame([values]), DataDefinition(numerical_columns=list(values)))
    report = Report([MeanValue(column=name) for name in values], include_tests=False)
    model = report.run(data, None, timestamp=snapshot._timestamp).to_snapshot_model()
    for result in model.metric_results.values():
        result.widget = []  # a histogram of one number
    return model


def _summary(verdict: DriftVerdict) -> list[Any]:
    """The verdict as the first thing on the page: the sentence, then one line a column."""
    from evidently.legacy.renderers.html_widgets import CounterData, counter, table_data

    head = "Drift" if verdict.drifted else "No drift"
    rows = [
        [
            c.name,
            "prediction" if c.prediction else c.kind,
            f"{c.score:.3f}",
            f"{c.threshold:.3f}",
            f"{c.floor:.3f}",
            f"{c.missing[0]:.0%} / {c.missing[1]:.0%}",
            "drifted" if c.drifted else "",
        ]
        for c in sorted(verdict.columns, key=lambda c: -c.score / c.threshold)
    ]
    rows += [[name, why, "", "", "", "", "broken"] for name, why in verdict.broken.items()]
    rows += [[name, why, "", "", "", "", "not compared"] for name, why in verdict.skipped.items()]
    names = ["column", "kind", "score", "threshold", "noise floor", "missing before / now", ""]
    return [
        counter(counters=[CounterData(verdict.reason, head)]),
        table_data(title="Every column", column_names=names, data=rows),
    ]


def _silence() -> None:
    import os

    os.environ.update(TELEMETRY_OFF)  # read by Evidently when it is imported
