"""One drift check: the reference of a model against the window since.

Writes into its output directory `drift.html` (the page), `snapshot.json` (for the workspace) and, last,
`drift.json` (the verdict): a directory without `drift.json` is the mark of a check that did not finish.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.table import TableSpec
from monitoring import frame as frames
from monitoring import page, rules
from monitoring.compare import Comparison, prepare
from monitoring.verdict import ColumnDrift, DriftVerdict


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


def check(
    reference: pa.Table,
    current: pa.Table,
    spec: TableSpec,
    as_of: datetime,
    model_version: str,
    out: Path,
    quality: Mapping[str, float] | None = None,
    tags: Sequence[str] = (),
    skew: Skew | None = None,
) -> DriftVerdict:
    """Compare a window with a model's reference, by the rules of `rules.py`.

    Args:
        reference: The model's reference, from `frame.sample_frame`.
        current: The window since, in the same form; may be empty.
        spec: The declared features and actions; columns outside it are not looked at.
        as_of: Instant of the check, aware.
        model_version: Version of the model whose reference this is.
        out: Directory for the page, the snapshot and the verdict.
        quality: Numbers to record with the check, such as `{"HIT@3/save": 0.31}`; NaN is not plotted.
        tags: More tags of the run in the workspace.
        skew: What the parity of serving and training features is; None where it was not looked at.

    Raises:
        EvergreenError: The reference is empty or holds none of the declared features.
    """
    if not reference.num_rows or not {f.name for f in spec.features} & set(reference.column_names):
        raise EvergreenError(
            "the drift reference is empty or holds none of the declared features",
            "Retrain, so that the model gets a reference",
        )
    given = (reference.num_rows, current.num_rows)
    ref, cur = (frames.take_requests(side, rules.MAX_ROWS) for side in (reference, current))
    users = (len(np.unique(frames.users_of(ref))), len(np.unique(frames.users_of(cur))))
    rows = (ref.num_rows, cur.num_rows)
    found = prepare(ref, cur, spec) if cur.num_rows else Comparison()
    snapshot = page.run(found.columns, rows[0], as_of, model_version, list(tags)) if found.columns else None
    columns = _columns(found, page.scores(snapshot)) if snapshot else ()
    features = [c for c in columns if not c.prediction]
    share = rules.drift_share({c.name: c.drifted for c in features})
    primary = next((c for c in columns if c.name == frames.SCORE + spec.primary_action), None)
    small = rules.too_small(rows[0], users[0]) or rules.too_small(rows[1], users[1])
    moved = bool(primary and primary.drifted)
    verdict = DriftVerdict(
        drifted=not small and rules.window_drifted(share, moved),
        reason=_reason(found, features, share, primary, rows, users) + _skewed(skew),
        as_of=as_of.astimezone(UTC).isoformat(),
        model_version=model_version,
        share=share,
        columns=columns,
        broken={} if small else found.broken,
        skipped=found.skipped,
        churn=found.churn,
        rows=rows,
        users=users,
        window_rows=given,
        quality={name: float(value) for name, value in (quality or {}).items()},
        skew=dict(skew.features) if skew else {},
        skew_share=skew.share if skew else None,
    )
    if snapshot:
        page.save(snapshot, verdict, out)
    else:
        page.save_empty(verdict, out)
    write_text(out / "drift.json", verdict.to_json())
    return verdict


def _columns(found: Comparison, scores: dict[str, float]) -> tuple[ColumnDrift, ...]:
    return tuple(
        ColumnDrift(
            name=c.name,
            kind=c.kind,
            prediction=c.prediction,
            score=scores[c.name],
            floor=c.floor,
            threshold=c.threshold,
            drifted=rules.column_drifted(scores[c.name], c.threshold),
            missing=c.missing,
        )
        for c in found.columns
    )


def _skewed(skew: Skew | None) -> str:
    # Old values are what a late materialisation looks like; anything else is a fault in one of the two paths.
    if skew is None or not skew.unexplained:
        return ""
    name, why = next(iter(skew.features.items()))
    return f"; train/serve skew: {name}: {why}"


def _reason(
    found: Comparison,
    features: list[ColumnDrift],
    share: float,
    primary: ColumnDrift | None,
    rows: tuple[int, int],
    users: tuple[int, int],
) -> str:
    """The verdict in one sentence, for the page, the decision log and `evergreen status`."""
    if not rows[1]:
        return "No rows in the current window, nothing to compare"
    for side, name in ((0, "reference"), (1, "current window")):
        if rules.too_small(rows[side], users[side]):
            return (
                f"Too small to tell: {rows[side]:,} rows by {users[side]:,} users in the {name} "
                f"(needs {rules.MIN_ROWS:,} rows and {rules.MIN_USERS} users)"
            )
    worst = sorted((c for c in features if c.drifted), key=lambda c: -c.score / c.threshold)
    parts = [
        f"{len(worst)} of {len(features)} features drifted, weighing {share:.0%} (threshold {rules.DRIFT_SHARE:.0%})"
    ]
    if worst:
        parts[0] += ": " + ", ".join(f"{c.name} {c.score:.2f} ≥ {c.threshold:.2f}" for c in worst[:3])
    if primary:
        sign = "≥" if primary.drifted else "<"
        parts.append(f"predicted {primary.name} {primary.score:.2f} {sign} {primary.threshold:.2f}")
    if found.broken:
        name, why = next(iter(found.broken.items()))
        more = f" and {len(found.broken) - 1} more" if len(found.broken) > 1 else ""
        parts.insert(0, f"broken data: {name} {why}{more}")
    return "; ".join(parts)
