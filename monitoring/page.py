"""The page of one check and its snapshot for the Evidently workspace.

The verdict comes first, in our words and our scores, which are those of all rows; then Evidently's plots of values that
were drawn evenly from the same sketches. `drift.html` can be read without a script; its plots need one, that it holds.

Evidently takes 5 s to import and pandas one, so this is done inside the functions.
"""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engagement.files import write_text
from engagement.table import MISSING
from evergreen.settings import TELEMETRY_OFF
from monitoring import panels, summary
from monitoring.compare import Pair
from monitoring.counts import NO_NUMBER, OTHER, Counts, added, drawn, drawn_categories, kept, most_frequent
from monitoring.verdict import DriftVerdict

if TYPE_CHECKING:
    from evidently.core.serialization import SnapshotModel

DRAWN = 10_000  # values of each side that Evidently gets: it needs 0.1 s a column for them
PLOTS = 12  # columns that are drawn beside the predictions, the worst: each takes 0.1 s here and 75 kB there
BARS = 50  # categories that are drawn one by one, the most frequent of both sides; the others are one
METHOD = {"numeric": "wasserstein", "categorical": "jensenshannon"}  # fixed: Evidently's choice flips with the rows
SUMMARY = "summary-"  # begins the id of each widget that stays when plots are thinned
_PLAIN = str.maketrans({"<": "‹", ">": "›"})


def save(verdict: DriftVerdict, pairs: Sequence[Pair], out: Path, tags: Sequence[str] = ()) -> None:
    """Write `drift.html` (self-contained) and `snapshot.json` (what `workspace.record` stores).

    Args:
        verdict: What the check found; the page tells it first.
        pairs: Both sides of the columns that Evidently shall draw; may be none. A side that is empty is not drawn.
        out: Directory of the check.
        tags: Of the run, beside model, slot and kind.
    """
    os.environ.update(TELEMETRY_OFF)  # read by Evidently when it is imported
    from evidently.core.report import Snapshot

    shown = _shown(verdict, pairs)
    plots = _plots(verdict, shown) if shown else None
    model = _snapshot(verdict, plots, out, tags)
    write_text(out / "drift.html", _html(verdict, plots, shown))
    write_text(out / "snapshot.json", Snapshot.load_model(model).dumps())


def save_empty(verdict: DriftVerdict, out: Path) -> None:
    """Write page and snapshot of a check that had nothing to compare: what else is known, and no plots."""
    save(verdict, (), out)


def without_plots(verdict: DriftVerdict, note: str = "") -> str:
    """The page of a check without Evidently's part; `note` is one more line at its end."""
    head = "<!doctype html><html lang=en><head><meta charset=utf-8><title>Drift</title></head>"
    return f"{head}<body>{summary.as_html(verdict, note)}</body></html>\n"


def naive(instant: datetime) -> datetime:
    """UTC without a zone: one aware run among naive ones makes Evidently's series API answer 500."""
    return instant.astimezone(UTC).replace(tzinfo=None)


def plain(text: str) -> str:
    """Text that cannot become markup: Evidently writes its data into a script, and Plotly reads tags."""
    return text.translate(_PLAIN)


def _sides(pair: Pair) -> list[Counts]:
    """What is known of both sides; of categories those that are frequent on both together, and the rest as one."""
    gone = NO_NUMBER if pair.kind == "numeric" else MISSING
    sides = [side.without(gone) for side in (pair.reference, pair.current)]
    if pair.kind == "numeric" or not all(side.total for side in sides):
        return sides
    # A category that one side has only in its rest is not known on the other either.
    common = [side.keys for side in sides if side.at(OTHER)]
    shares = added([side.scaled(1 / side.total) for side in sides])
    frequent = most_frequent(shares, BARS)
    for keys in common:
        frequent = np.intersect1d(frequent, keys)
    return [kept(side, frequent) for side in sides]


def _shown(verdict: DriftVerdict, pairs: Sequence[Pair]) -> list[Pair]:
    """What is drawn: the worst columns that can be, and every prediction; the worst first."""
    drawable = {p.name: p for p in pairs if _drawable(p)}
    there = [c for c in verdict.worst if c.name in drawable]
    features = [c for c in there if not c.prediction][:PLOTS]
    return [drawable[c.name] for c in there if c.prediction or c in features]


def _drawable(pair: Pair) -> bool:
    return all(side.total > 0 for side in _sides(pair))


def _values(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """(DRAWN,) values of each side in an order that means nothing: Evidently plots them by their place, too."""
    order = np.random.default_rng(0).permutation(DRAWN)
    names = {key: plain(name) for key, name in pair.names.items()}
    reference, current = (
        (drawn(side, pair.centre, DRAWN) if pair.kind == "numeric" else drawn_categories(side, names, DRAWN))[order]
        for side in _sides(pair)
    )
    return reference, current


def _plots(verdict: DriftVerdict, pairs: Sequence[Pair]) -> "SnapshotModel":
    """Evidently's own drift metrics of values drawn from the pairs."""
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    names = {kind: [plain(p.name) for p in pairs if p.kind == kind] for kind in METHOD}
    definition = DataDefinition(numerical_columns=names["numeric"], categorical_columns=names["categorical"])
    values = {plain(p.name): _values(p) for p in pairs}
    reference, current = (pd.DataFrame({name: both[i] for name, both in values.items()}) for i in (0, 1))
    limits = {c.name: c.threshold for c in verdict.columns}
    metrics = [ValueDrift(column=plain(p.name), method=METHOD[p.kind], threshold=limits[p.name]) for p in pairs]
    sides = [Dataset.from_pandas(frame, definition) for frame in (current, reference)]
    found = Report(metrics, include_tests=False).run(*sides, timestamp=_instant(verdict))
    return found.to_snapshot_model()


def _snapshot(verdict: DriftVerdict, plots: "SnapshotModel | None", out: Path, tags: Sequence[str]) -> "SnapshotModel":
    """What the UI holds: the verdict's numbers as `MeanValue` metrics, the verdict as tables, the plots."""
    from evidently.core.serialization import ReportModel, SnapshotModel
    from evidently.metrics import MeanValue

    results = dict(plots.metric_results) if plots else {}
    for name, value in panels.numbers(verdict).items():
        metric = MeanValue(column=plain(name)).to_calculation()
        results[metric.id] = metric.result(value)
    about = {"as_of": verdict.as_of, "model_version": verdict.model_version, "slot": verdict.slot}
    drift = "drifted" if verdict.drifted else "not drifted"
    return SnapshotModel(
        report=ReportModel(items=[]),
        name=f"{_instant(verdict):%Y-%m-%d %H:%M}, model {verdict.model_version}: {verdict.kind}",
        timestamp=_instant(verdict),
        metadata={**about, "kind": verdict.kind, "drift": drift},
        tags=[f"kind:{verdict.kind}", f"model:{verdict.model_version}", f"slot:{verdict.slot}", *tags],
        metric_results=results,
        top_level_metrics=list(results),
        widgets=[*_summary(verdict, out), *(plots.widgets if plots else ())],
        tests_widgets=_tests(verdict),
    )


def _summary(verdict: DriftVerdict, out: Path) -> list[Any]:
    """The verdict as the first thing of the report in the UI."""
    from evidently.legacy.renderers.html_widgets import CounterData, counter, table_data

    tiles = [CounterData(("✗ " if m.wrong else "✓ ") + plain(m.name), plain(m.text)) for m in summary.marks(verdict)]
    page = "/".join((*out.absolute().parts[-3:], "drift.html"))
    widgets = [counter(counters=[CounterData(plain(verdict.reason), _headline(verdict))])]
    widgets += [counter(counters=tiles[i : i + 3]) for i in range(0, len(tiles), 3)]
    sentences = [[plain(s)] for s in (*summary.wrong(verdict), *verdict.evidence)]
    widgets += [table_data(title="What is wrong, with the evidence", column_names=[""], data=sentences)] * bool(
        sentences
    )
    for table in summary.tables(verdict):
        rows = [[plain(cell) for cell in row] for row in table.rows]
        widgets.append(table_data(title=plain(table.title), column_names=list(table.head), data=rows))
    widgets.append(table_data(title="The page of this check", column_names=["file"], data=[[plain(page)]]))
    for i, widget in enumerate(widgets):
        widget.id = f"{SUMMARY}{i}"
    return widgets


def _headline(verdict: DriftVerdict) -> str:
    wrong = [m.name for m in summary.marks(verdict) if m.wrong]
    return f"Look at: {', '.join(wrong)}" if wrong else "Nothing to do"


def _tests(verdict: DriftVerdict) -> list[Any]:
    """Our tests, not Evidently's: those would judge the drawn values."""
    from evidently.legacy.model.widget import BaseWidgetInfo
    from evidently.legacy.renderers.html_widgets import CounterData, counter

    tests = [(f"{m.name}", m.text, not m.wrong) for m in summary.marks(verdict)]
    tests += [
        (f"Drift of {c.name}", f"score {c.score:.3f}, threshold {c.threshold:.3f}. {c.note}", not c.drifted)
        for c in verdict.worst
    ]
    tests += [(f"Data: {t.name}", t.text, t.passed) for t in verdict.data]
    shown: list[dict[str, Any]] = [
        {"title": plain(name), "description": plain(text), "state": "success" if fine else "fail", "groups": []}
        for name, text, fine in tests
    ]
    passed = sum(fine for *_, fine in tests)
    counts = counter(counters=[CounterData("Success", str(passed)), CounterData("Fail", str(len(tests) - passed))])
    counts.params["v2_test"] = True
    suite = BaseWidgetInfo(title="", size=2, type="test_suite", params={"v2_test": True, "tests": shown})
    return [counts, suite]


def _html(verdict: DriftVerdict, plots: "SnapshotModel | None", pairs: Sequence[Pair]) -> str:
    if plots is None:
        return without_plots(verdict)
    from evidently.core.metric_types import render_widgets
    from evidently.legacy.renderers.html_widgets import group_widget

    rows = max((max(p.reference.total, p.current.total) for p in pairs), default=0)
    features = sum(not c.prediction for c in verdict.columns)
    left_out = f" of the {PLOTS} worst of {features} features and of the predictions" if features > PLOTS else ""
    note = (
        f"Below are Evidently's plots{left_out}, of {DRAWN:,} values a side that were drawn evenly from up to "
        f"{rows:,.0f} rows. Its own scores there can differ from ours by a little, and by more where one has over "
        f"{BARS} categories: the rarer ones are one bar there. Ours, in the table, are of all rows and are those "
        "that count."
    )
    page = render_widgets([group_widget(title="", widgets=list(plots.widgets))])
    head, body, rest = page.partition("<body>")
    return f"{head}{body}{summary.as_html(verdict, note)}{rest}"


def _instant(verdict: DriftVerdict) -> datetime:
    return naive(datetime.fromisoformat(verdict.as_of))


def has_plots(text: str) -> bool:
    """Whether a snapshot still has what `trimmed` takes away."""
    return ":ValueDrift" in text


def trimmed(text: str) -> str:
    """A snapshot without its plots: the summary, the tests and the numbers of the panels stay."""
    data = json.loads(text)
    data["widgets"] = [w for w in data["widgets"] if str(w["id"]).startswith(SUMMARY)]
    kept = {k: r for k, r in data["metric_results"].items() if not _is_plot(r)}
    return json.dumps({**data, "metric_results": kept, "top_level_metrics": list(kept)}, separators=(",", ":"))


def _is_plot(result: dict[str, Any]) -> bool:
    return str(result["metric_value_location"]["metric"]["params"]["type"]).endswith(":ValueDrift")
