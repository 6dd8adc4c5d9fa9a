"""One drift check: a window against its like in the model's reference.

Writes into its output directory `drift.html` (the page), `snapshot.json` (for the workspace) and, last, `drift.json`
(the verdict): a directory without `drift.json` is the mark of a check that did not finish.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from engagement.files import write_text
from monitoring import page
from monitoring.compare import EVERYTHING, Comparison, Window, compare
from monitoring.diagnose import diagnose
from monitoring.reference import Reference
from monitoring.slices import slices
from monitoring.verdict import DataTest, DriftVerdict, Outcome, ServingHealth

VERDICT = "drift.json"
TOLD = 3  # columns named in the one sentence


@dataclass(frozen=True)
class Skew:
    """Features that serving reads otherwise than training: `features` says of each how many values and why.

    Attributes:
        share: Share of all compared values that differ.
        features: By feature, in words.
        unexplained: Whether some differ for another cause than the age of the last materialisation.
    """

    share: float
    features: Mapping[str, str]
    unexplained: bool


@dataclass(frozen=True)
class Beside:
    """What a check knows beside the features and predictions of its window; the fields are those of `DriftVerdict`."""

    outcome: Outcome | None = None
    serving: ServingHealth | None = None
    data: Sequence[DataTest] = ()
    late: float = 0.0
    skew: Skew | None = None
    tags: Sequence[str] = field(default=())


def check(
    reference: Reference,
    window: Window,
    as_of: datetime,
    model: tuple[str, str],
    out: Path,
    beside: Beside | None = None,
    code: str = "",
) -> DriftVerdict:
    """Compare a window with a model's reference, by the rules of `rules.py`.

    Args:
        reference: The model's.
        window: What is looked at; may be empty.
        as_of: Instant of the check, aware.
        model: The model's version and the ISO instant of the retrain that made it.
        out: Directory for page, snapshot and verdict.
        beside: What else is known.
        code: Version of the code.
    """
    known = beside or Beside()
    verdict, found = judge(reference, window, as_of, model, known, code)
    out.mkdir(parents=True, exist_ok=True)
    _remove_other(out / VERDICT, verdict.to_json())
    if found.columns:
        page.save(verdict, found.pairs, out, known.tags)
    else:
        page.save_empty(verdict, out)
    write_text(out / VERDICT, verdict.to_json())
    return verdict


def judge(
    reference: Reference, window: Window, as_of: datetime, model: tuple[str, str], known: Beside, code: str = ""
) -> tuple[DriftVerdict, Comparison]:
    """What `check` finds, without a page; the comparison holds both sides of each column."""
    found = compare(reference, window)
    where = slices(reference, window, found) if found.columns else ()
    kind, evidence = diagnose(found.columns, found.broken, known.outcome, where, found.pairs)
    requests, rows, users = reference.totals
    skew = known.skew or Skew(float("nan"), {}, unexplained=False)
    verdict = DriftVerdict(
        as_of=as_of.isoformat(),
        model_version=model[0],
        slot=model[1],
        window=(window.start.isoformat(), window.end.isoformat()),
        drifted=any(c.drifted for c in found.columns),
        kind=kind,
        evidence=evidence,
        reason="",
        columns=found.columns,
        slices=where,
        broken=found.broken,
        skipped=found.skipped,
        requests=(requests, window.table.requests),
        rows=(rows, window.table.rows),
        users=(users, len(np.unique(window.table.user_id))),
        late=known.late,
        data=tuple(known.data),
        outcome=known.outcome,
        serving=known.serving,
        skew=dict(skew.features),
        skew_share=None if known.skew is None else skew.share,
        reference=reference.digest,
        code=code,
    )
    return replace(verdict, reason=reason(verdict, found, known)), found


def _remove_other(path: Path, text: str) -> None:
    """Remove an earlier verdict; not one that says the same: another monitor, at the same check, may be reading it."""
    try:
        same = path.read_text() == text
    except (FileNotFoundError, UnicodeDecodeError):
        same = False
    if not same:
        path.unlink(missing_ok=True)


def reason(verdict: DriftVerdict, found: Comparison, beside: Beside) -> str:
    """One sentence for the whole check."""
    parts = [found.skipped[EVERYTHING]] if EVERYTHING in found.skipped else []
    if found.columns:
        drifted = {c.name: f"{c.name} {c.score:.2f} ≥ {c.threshold:.2f}" for c in verdict.worst if c.drifted}
        features = [c for c in found.columns if not c.prediction]
        moved = sum(c.drifted for c in features)
        more = ", ..." if len(drifted) > TOLD else ""
        named = f" ({', '.join(list(drifted.values())[:TOLD])}{more})" if drifted else ""
        scores = sum(c.drifted for c in found.columns) - moved
        also = f" and {scores} of {len(found.columns) - len(features)} predictions" if scores else ""
        parts.append(f"{moved} of {len(features)} features{also} drifted{named}")
    if verdict.broken:
        parts.append("looks broken: " + ", ".join(f"{n} {why}" for n, why in list(verdict.broken.items())[:TOLD]))
    if verdict.kind != "none":
        parts.append(f"likely {verdict.kind}")
    if beside.outcome is not None and beside.outcome.lost:
        parts.append(beside.outcome.reason)
    if beside.skew is not None and beside.skew.unexplained:
        parts.append(_skewed(beside.skew))
    return "; ".join(parts)


def _skewed(skew: Skew) -> str:
    named = ", ".join(f"{name}: {why}" for name, why in list(skew.features.items())[:TOLD])
    more = f" and {len(skew.features) - TOLD} more features" if len(skew.features) > TOLD else ""
    return f"train/serve skew in {skew.share:.0%} of the values ({named}{more})"
