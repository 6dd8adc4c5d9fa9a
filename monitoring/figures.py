"""Every figure that a home tells Prometheus: its name, its labels, what it means, and where it is read from.

Names follow Prometheus' conventions: base units, `_ratio` for shares (0 to 1, though a calibration may pass 1),
`_seconds`, `_total` for what only grows. Every one carries the label `model`. A figure that is not known is absent,
not 0.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from monitoring.alerts import SEVERITY
from monitoring.state import SOURCES, State, instant
from monitoring.trigger import broken_data, persistent, quality_persists
from monitoring.verdict import Kind, Outcome, ServingHealth

MOST_SERIES = 200
"""A metric has at most so many series; what is more is left out and told as a problem."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "check_timestamp_seconds": ("Instant up to which the newest check looked", ()),
    "drift_score": ("Distance of a column from its like in the reference", ("column", "kind", "group")),
    "drift_threshold": ("Score from which on the column counts as drifted", ("column",)),
    "drift_usual": ("Median score of the column over ordinary past windows", ("column",)),
    "drifted": ("1 if the column drifted in the newest check", ("column",)),
    "drift_lasting": ("1 if the column drifted in this check and in another of the model's last 3", ("column",)),
    "slice_drift_score": ("Distance of the column that moved most in a part of the window", ("slice", "column")),
    "drifted_features_ratio": ("Share of the compared features that drifted", ()),
    "drift_kind": ("1 for what most likely moved", ("kind",)),
    "broken_data": ("1 if the window must not be trained on: broken columns, or a test of the data failed", ()),
    "broken_columns": ("Columns whose feed looks broken", ()),
    "broken": ("1 for a column whose feed looks broken", ("column",)),
    "missing_ratio": ("Share of the column's values that are missing", ("column",)),
    "unseen_ratio": ("Share of rows with a value that the reference did not have", ("column",)),
    "window_requests": ("Requests in the window of the newest check", ()),
    "window_rows": ("Rows in the window of the newest check", ()),
    "window_users": ("Users in the window of the newest check", ()),
    "late_rows_ratio": ("Share of rows that became known more than an hour after they happened", ()),
    "hit3": ("HIT@3 on matured labels", ("action",)),
    "hit3_low": ("Lower end of the 95 % interval of HIT@3", ("action",)),
    "hit3_high": ("Upper end of the 95 % interval of HIT@3", ("action",)),
    "hit3_random": ("HIT@3 of a random order on the same requests", ("action",)),
    "hit3_expected": ("HIT@3 of the primary action that a model of this age has", ()),
    "quality_lost": ("1 if HIT@3 is below what is expected by more than chance", ()),
    "quality_lost_lasting": ("1 if the quality was lost in this check and in another of the model's last 3", ()),
    "calibration_ratio": ("Mean predicted chance by observed rate; 1 is perfect", ("action",)),
    "action_rate": ("Observed actions a shown item", ("action",)),
    "outcome_age_seconds": ("From the end of the training window to the middle of the matured requests", ()),
    "matured_requests": ("Requests whose labels have matured", ()),
    "immature_requests": ("Requests left out because their labels have not matured", ()),
    "served_requests": ("Requests in the serving log of the window", ()),
    "served_errors_ratio": ("Share of requests that failed", ()),
    "served_shed_ratio": ("Share of requests turned away by overload, or too late", ()),
    "served_fallbacks_ratio": ("Share of answers that were degraded", ("kind",)),
    "served_latency_seconds": ("Latency in the serving log of the window", ("quantile",)),
    "skew_ratio": ("Share of feature values that serving reads otherwise than training", ()),
    "data_test_passed": ("1 if the window's data passed the test", ("test",)),
    "model_info": ("1; the model that the newest check looked at", ("version", "slot")),
    "model_age_seconds": ("Time since the slot of the model that the newest check looked at", ()),
    "alert_firing": ("1 while the monitor fires the alert", ("alert", "severity")),
    "retrain_timestamp_seconds": ("When the newest retrain with this outcome ended", ("outcome",)),
    "slots_missed": ("Regular slots that went by without a retrain", ()),
    "exporter_problems": ("What the exporter could not read; /healthz says what", ("source",)),
}
"""Help and labels by name, without the prefix `evergreen_` and the label `model`."""

DECISIONS = ("evergreen_decisions", "Decisions of the retrain trigger", ("action", "cause"))
UNSEEN = "new "  # before the name of a vocabulary's column


class Figures:
    """The metrics of one scrape.

    Args:
        model: Name of the model.

    Attributes:
        problems: Figures that were left out, one sentence each.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in GAUGES}
        self.problems: list[str] = []

    def add(self, name: str, value: Any, *labels: str) -> None:
        """Tell one figure, with the values of its labels; None is not known, what is no finite number is left out."""
        if value is None:
            return
        held, where = self._values[name], " ".join((f"evergreen_{name}", *labels))
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.problems.append(f"{where} is {value!r}, no finite number: left out")
        elif len(held) >= MOST_SERIES:
            self.problems.append(f"{where} is one of more than {MOST_SERIES}: left out")
        else:
            held[tuple(map(str, labels))] = number

    def gauges(self) -> Iterator[Metric]:
        """Every gauge that has a value."""
        for name, (text, labels) in GAUGES.items():
            family = GaugeMetricFamily(f"evergreen_{name}", text, labels=("model", *labels))
            for values, number in self._values[name].items():
                family.add_metric((self._model, *values), number)
            if family.samples:
                yield family


def metrics(state: State, model: str) -> tuple[list[Metric], dict[str, tuple[str, ...]]]:
    """A home's state as metrics.

    Args:
        state: The state.
        model: Name of the model.

    Returns:
        The metrics, and every problem by source, those of the figures among them.
    """
    figures = Figures(model)
    sections: list[Callable[[Figures, State], None]] = [_home]
    sections += [_check, _columns, _outcome, _serving] if state.verdicts else []
    for section in sections:
        try:
            section(figures, state)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            figures.problems.append(f"the newest check is not as expected ({error})")
    problems = {**state.problems, "figures": tuple(figures.problems)}
    for source in SOURCES:
        figures.add("exporter_problems", len(problems.get(source, ())), source)
    name, text, labels = DECISIONS
    decisions = CounterMetricFamily(name, text, labels=("model", *labels))
    for values, count in sorted(state.decisions.items())[:MOST_SERIES]:
        decisions.add_metric((model, *values), count)
    return [*figures.gauges(), decisions], problems


def _home(figures: Figures, state: State) -> None:
    for alert, severity in SEVERITY.items():
        figures.add("alert_firing", alert in state.alerts, alert, severity)
    for outcome, ended in state.ended.items():
        figures.add("retrain_timestamp_seconds", ended.timestamp(), outcome)
    figures.add("slots_missed", state.missed)


def _check(figures: Figures, state: State) -> None:
    verdict = state.verdicts[0]
    figures.add("check_timestamp_seconds", instant(verdict.as_of).timestamp())
    figures.add("model_info", 1, verdict.model_version, verdict.slot)
    figures.add("model_age_seconds", (state.at - instant(verdict.slot)).total_seconds())
    figures.add("drifted_features_ratio", verdict.share)
    for kind in get_args(Kind):
        figures.add("drift_kind", verdict.kind == kind, kind)
    figures.add("broken_data", bool(broken_data(verdict)))
    figures.add("broken_columns", len(verdict.broken))
    for column in verdict.broken:
        figures.add("broken", 1, column)
    for name, pair in (("requests", verdict.requests), ("rows", verdict.rows), ("users", verdict.users)):
        figures.add(f"window_{name}", pair[1])
    figures.add("late_rows_ratio", verdict.late)
    figures.add("skew_ratio", verdict.skew_share)
    for test in verdict.data:
        figures.add("data_test_passed", test.passed, test.name)


def _columns(figures: Figures, state: State) -> None:
    """The columns of the newest check; where there are too many, those that drifted stay."""
    lasting = persistent(state.verdicts[0], state.verdicts[1:])
    for c in sorted(state.verdicts[0].columns, key=lambda c: (not c.drifted, c.name)):
        figures.add("drift_score", c.score, c.name, c.kind, c.group)
        figures.add("drift_threshold", c.threshold, c.name)
        figures.add("drift_usual", c.usual, c.name)
        figures.add("drifted", c.drifted, c.name)
        figures.add("drift_lasting", c.name in lasting, c.name)
        figures.add("missing_ratio", c.missing[1], c.name)
        if c.kind == "vocabulary":
            figures.add("unseen_ratio", c.score, c.name.removeprefix(UNSEEN))
    for s in state.verdicts[0].slices:
        figures.add("slice_drift_score", s.score, s.slice, s.column)


def _outcome(figures: Figures, state: State) -> None:
    outcome: Outcome | None = state.verdicts[0].outcome
    if outcome is None:
        return
    for action, value in outcome.hit3.items():
        figures.add("hit3", value, action)
    for action, (low, high) in outcome.interval.items():
        figures.add("hit3_low", low, action)
        figures.add("hit3_high", high, action)
    for action, value in outcome.random.items():
        figures.add("hit3_random", value, action)
    for action, value in outcome.calibration.items():
        figures.add("calibration_ratio", value, action)
    for action, value in outcome.observed.items():
        figures.add("action_rate", value, action)
    figures.add("hit3_expected", outcome.expected)
    figures.add("quality_lost", outcome.lost)
    figures.add("quality_lost_lasting", quality_persists(state.verdicts[0], state.verdicts[1:]))
    figures.add("outcome_age_seconds", outcome.age_hours * 3600)
    figures.add("matured_requests", outcome.requests)
    figures.add("immature_requests", outcome.immature)


def _serving(figures: Figures, state: State) -> None:
    served: ServingHealth | None = state.verdicts[0].serving
    if served is None:
        return
    figures.add("served_requests", served.requests)
    figures.add("served_errors_ratio", served.errors)
    figures.add("served_shed_ratio", served.shed)
    for kind, share in served.fallbacks.items():
        figures.add("served_fallbacks_ratio", share, kind)
    for quantile, milliseconds in (("0.5", served.p50_ms), ("0.99", served.p99_ms)):
        figures.add("served_latency_seconds", None if milliseconds is None else milliseconds / 1000, quantile)
