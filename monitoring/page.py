"""The Evidently report of one check: its statistics, its page and the snapshot that its UI shows.

Evidently takes 5 s to import and pandas one, so this is done inside the functions.
"""

import html
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engagement.files import write_text
from evergreen.settings import TELEMETRY_OFF
from monitoring import rules
from monitoring.compare import Column
from monitoring.verdict import ColumnDrift, DriftVerdict

if TYPE_CHECKING:
    from evidently.core.serialization import SnapshotModel

SKEW = "train/serve skew"  # share of feature values that serving reads otherwise than training
_ROLE = {True: "prediction", False: "feature"}


def run(columns: list[Column], reference_rows: int, as_of: datetime, model_version: str, tags: list[str]) -> Any:
    """Run Evidently's drift metrics; returns its snapshot.

    Args:
        columns: What to compare; at least one.
        reference_rows: How many of the rows belong to the reference.
        as_of: Instant of the check, aware.
        model_version: Version of the model whose reference this is.
        tags: More tags of the run.
    """
    os.environ.update(TELEMETRY_OFF)  # read by Evidently when it is imported
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    data = pd.DataFrame({c.name: c.values for c in columns})
    names = {kind: [c.name for c in columns if c.kind == kind] for kind in rules.METHOD}
    definition = DataDefinition(numerical_columns=names["numeric"], categorical_columns=names["categorical"])
    current = Dataset.from_pandas(data.iloc[reference_rows:].reset_index(drop=True), definition)
    reference = Dataset.from_pandas(data.iloc[:reference_rows].reset_index(drop=True), definition)
    metrics = [ValueDrift(column=c.name, method=rules.METHOD[c.kind], threshold=c.threshold) for c in columns]
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
    return {m["config"]["column"]: float(m["value"]) for m in snapshot.dict()["metrics"]}


def save(snapshot: Any, verdict: DriftVerdict, out: Path) -> None:
    """Write `drift.html` (self-contained) and `snapshot.json` (what `workspace.record` stores)."""
    from evidently.core.report import Snapshot

    model, numbers = snapshot.to_snapshot_model(), _numbers(verdict, snapshot)
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
    head = "<!doctype html><meta charset=utf-8><title>Drift</title>"
    write_text(out / "drift.html", f"{head}<p>{html.escape(verdict.reason)}</p>\n")


def naive(instant: datetime) -> datetime:
    """UTC without a zone: one aware run among naive ones makes Evidently's series API answer 500."""
    return instant.astimezone(UTC).replace(tzinfo=None)


def number_names(verdict: DriftVerdict) -> dict[str, float]:
    """The verdict's own numbers, by the name under which panels plot them.

    A `ValueDrift` series cannot be plotted over time: its threshold is part of its name, and the noise floor
    makes each check's threshold its own. A ratio of score and threshold can, and it compares columns.
    """
    features = [c for c in verdict.columns if not c.prediction]
    return {
        "share of drifted features": verdict.share,
        "drifted features": float(sum(c.drifted for c in features)),
        "broken features": float(len(verdict.broken)),
        "drift verdict": float(verdict.drifted),
        "rows": float(verdict.rows[1]),
        **{ratio_name(c): c.ratio for c in verdict.columns},
        **{f"unseen {name}": share for name, share in verdict.churn.items()},
        **{name: value for name, value in verdict.quality.items() if np.isfinite(value)},
        **({SKEW: verdict.skew_share} if verdict.skew_share is not None else {}),
    }


def ratio_name(column: ColumnDrift) -> str:
    """Name of the series that tells how near a column is to its threshold."""
    return f"{column.name} (drift / threshold)"


def _numbers(verdict: DriftVerdict, snapshot: Any) -> "SnapshotModel":
    """The verdict's numbers as `MeanValue` metrics of a report without a reference."""
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import MeanValue

    values = number_names(verdict)
    data = Dataset.from_pandas(pd.DataFrame([values]), DataDefinition(numerical_columns=list(values)))
    report = Report([MeanValue(column=name) for name in values], include_tests=False)
    model = report.run(data, None, timestamp=snapshot._timestamp).to_snapshot_model()
    for result in model.metric_results.values():
        result.widget = []  # a histogram of one number
    return model


def _summary(verdict: DriftVerdict) -> list[Any]:
    """The verdict as the first thing on the page: the sentence, then one line a column."""
    from evidently.legacy.renderers.html_widgets import CounterData, counter, table_data

    def line(c: ColumnDrift) -> list[str]:
        numbers = [f"{c.score:.3f}", f"{c.threshold:.3f}", f"{c.floor:.3f}"]
        missing = f"{c.missing[0]:.0%} / {c.missing[1]:.0%}"
        return [c.name, f"{c.kind} {_ROLE[c.prediction]}", *numbers, missing, "drifted" if c.drifted else ""]

    rows = [[name, why, "", "", "", "", "broken"] for name, why in verdict.broken.items()]
    rows += [[name, why, "", "", "", "", "skewed"] for name, why in verdict.skew.items()]
    rows += [line(c) for c in verdict.worst]
    rows += [[name, why, "", "", "", "", "not compared"] for name, why in verdict.skipped.items()]
    names = ["column", "kind", "score", "threshold", "noise floor", "missing before / now", ""]
    return [
        counter(counters=[CounterData(verdict.reason, "Drift" if verdict.drifted else "No drift")]),
        table_data(title="Every column", column_names=names, data=rows),
    ]
