"""What a check has to tell a person: named alerts, with the features, the slices, the likely kind and its evidence.

The names are those of the Prometheus rules; each has a runbook page of its name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from monitoring.history import stamp
from monitoring.trigger import HELD, Decision, Situation, broken_data, persistent, quality_persists
from monitoring.verdict import ColumnDrift, DriftVerdict, ServingHealth

Severity = Literal["page", "ticket"]

SEVERITY: dict[str, Severity] = {
    "EvergreenBrokenData": "page",
    "EvergreenDrift": "ticket",
    "EvergreenQualityLost": "page",
    "EvergreenHeldTwice": "page",
    "EvergreenTrainServeSkew": "ticket",
    "EvergreenLateData": "ticket",
    "EvergreenServingErrors": "page",
    "EvergreenServingSlow": "page",
    "EvergreenServingFallbacks": "ticket",
    "EvergreenServingShed": "ticket",
    "EvergreenCheckStale": "page",
    "EvergreenSlotMissed": "page",
}
"""Every alert: `page` wakes somebody, `ticket` waits for the morning."""

RUNBOOKS = "docs/runbooks"

LATE = 0.2
"""Data is late if **≥** this share of a window's rows became known more than an hour after they happened."""
ERRORS = 0.01
"""Serving fails if **≥** this share of the requests does."""
SHED = 0.05
"""Serving sheds if **≥** this share of the requests is turned away (429) or too late (504)."""
FALLBACKS = 0.05
"""Serving falls back if **≥** this share of the answers has no fresh features, all kinds together."""
P99_MS = 500.0
"""Serving is slow if the 99th percentile of the latency of its answers is **≥** so many milliseconds."""
SERVED = 100
"""Errors, shed requests, fallbacks and latency are told of if **≥** so many requests came."""
STALE = timedelta(hours=3)
"""Checks are stale if the newest is **>** this old: three hourly ones are missing."""

_TOP_COLUMNS, _TOP_SLICES = 5, 3  # told of in an alert; the report of the check has all


@dataclass(frozen=True)
class Alert:
    """Something that a person should know.

    Attributes:
        name: One of `SEVERITY`.
        severity: `page` or `ticket`.
        labels: What it is the same alert by, `alertname`, `severity` and `model`.
        summary: One sentence.
        description: The evidence, a line each.
        runbook: Path of its page in the repository.
        starts_at: ISO instant since when it is so.
    """

    name: str
    severity: Severity
    labels: dict[str, str]
    summary: str
    description: str
    runbook: str
    starts_at: str


def alerts_of(
    verdict: DriftVerdict, recent: Sequence[DriftVerdict], decision: Decision, situation: Situation, model: str
) -> list[Alert]:
    """What a check has to tell.

    Args:
        verdict: The check.
        recent: The checks before it, as `trigger.decide` got them.
        decision: What was decided on it.
        situation: What else is so.
        model: Name of the model, a label.
    """
    told = [
        *_of_data(verdict),
        *_of_model(verdict, recent, decision, situation),
        *(_of_serving(verdict.serving) if verdict.serving and verdict.serving.requests >= SERVED else ()),
    ]
    where = f"Report: checks/{stamp(datetime.fromisoformat(verdict.as_of))}/drift.html"
    end = [f"Decision: {decision.reason}", where]
    return [_alert(name, model, summary, [*lines, *end], verdict.as_of) for name, summary, *lines in told]


def stale(newest: datetime | None, since: datetime, now: datetime, model: str, why: str) -> list[Alert]:
    """The alert that checks are missing, where they are; for whoever starts checks, as no check can tell of it.

    Args:
        newest: Instant of the newest check; None without one.
        since: Since when checks are started: what was missed before, while the machine was off, is no fault.
        now: The clock.
        model: Name of the model, a label.
        why: What keeps them from being done; empty if nobody knows.
    """
    if now - max(newest or since, since) <= STALE:
        return []
    age = f"is {(now - newest).total_seconds() / 3600:.1f} h old" if newest else "is still to come"
    lines = [*([f"The last try: {why}"] if why else ()), "Drift and faults are not seen meanwhile."]
    return [_alert("EvergreenCheckStale", model, f"The newest check of {model} {age}", lines, now.isoformat())]


def _alert(name: str, model: str, summary: str, lines: Sequence[str], at: str) -> Alert:
    severity = SEVERITY[name]
    labels = {"alertname": name, "severity": severity, "model": model}
    return Alert(name, severity, labels, summary, "\n".join(lines), f"{RUNBOOKS}/{name}.md", at)


def _of_data(verdict: DriftVerdict) -> Iterator[tuple[str, ...]]:
    """Name, summary and evidence of what is wrong with the data."""
    broken = broken_data(verdict)
    if broken:
        columns = [f"Broken: {name} {why}" for name, why in verdict.broken.items()]
        tests = [f"Failed test: {test.text}" for test in verdict.data if not test.passed]
        yield "EvergreenBrokenData", f"The data is broken: {broken}", *columns[:_TOP_COLUMNS], *tests, *_kind(verdict)
    if verdict.skew:
        share = "" if verdict.skew_share is None else f" in {verdict.skew_share:.2%} of the values"
        features = [f"{name}: {why}" for name, why in verdict.skew.items()]
        yield (
            "EvergreenTrainServeSkew",
            f"Serving reads {len(features)} features otherwise than training{share}",
            *features[:_TOP_COLUMNS],
        )
    if verdict.late >= LATE:
        yield "EvergreenLateData", f"{verdict.late:.0%} of the rows became known more than an hour after they happened"


def _of_model(
    verdict: DriftVerdict, recent: Sequence[DriftVerdict], decision: Decision, situation: Situation
) -> Iterator[tuple[str, ...]]:
    """Likewise of the model and its retrains."""
    version, columns = verdict.model_version, persistent(verdict, recent)
    if columns:
        named = {c.name: c for c in verdict.columns}
        summary = f"{len(columns)} columns keep drifting from what version {version} learned, most {columns[0]}"
        moved = [_column(named[name]) for name in columns[:_TOP_COLUMNS]]
        yield "EvergreenDrift", summary, *moved, *_kind(verdict)
    if verdict.outcome and quality_persists(verdict, recent):
        hits = [f"HIT@3/{action}: {value:.4f}" for action, value in verdict.outcome.hit3.items()]
        yield "EvergreenQualityLost", f"Version {version} has lost quality: {verdict.outcome.reason}", *hits
    if situation.held >= HELD or decision.action == "escalate":
        yield "EvergreenHeldTwice", f"The gate held the last {situation.held} retrains; version {version} serves on"
    if situation.missed_slot and decision.action != "retrain" and not situation.running:
        yield "EvergreenSlotMissed", f"The slot of {situation.missed_slot:%Y-%m-%d %H:%M} UTC has had no retrain"


def _of_serving(serving: ServingHealth) -> Iterator[tuple[str, ...]]:
    """Likewise of serving; its own sentences are the evidence."""
    of = f"of {serving.requests:,} requests"
    fallbacks = sum(serving.fallbacks.values())
    if serving.errors >= ERRORS:
        yield "EvergreenServingErrors", f"{serving.errors:.1%} {of} failed", *serving.problems
    if serving.p99_ms is not None and serving.p99_ms >= P99_MS:
        yield "EvergreenServingSlow", f"1 % {of} took {serving.p99_ms:.0f} ms or longer", *serving.problems
    if fallbacks >= FALLBACKS:
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in serving.fallbacks.items())
        yield "EvergreenServingFallbacks", f"{fallbacks:.1%} {of} got a fallback ({kinds})", *serving.problems
    if serving.shed >= SHED:
        yield "EvergreenServingShed", f"{serving.shed:.1%} {of} were turned away", *serving.problems


def _column(column: ColumnDrift) -> str:
    note = f": {column.note}" if column.note else ""
    return f"{column.name} ({column.group}) scores {column.score:.3g}, from {column.threshold:.3g} it drifted{note}"


def _kind(verdict: DriftVerdict) -> list[str]:
    """The likely kind with its evidence, and where it moved."""
    kind = [f"Likely kind: {verdict.kind}", *(f"Evidence: {sentence}" for sentence in verdict.evidence)]
    where = [f"Slice: {s.slice} ({s.column} {s.score:.3g}, {s.share:.0%} of it)" for s in verdict.slices[:_TOP_SLICES]]
    return kind + where
