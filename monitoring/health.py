"""How serving does, from its log: errors, shed requests, answers without fresh features, latency."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

from engagement import served
from monitoring.alerts import ERRORS, FALLBACKS, P99_MS, SHED
from monitoring.verdict import ServingHealth

LEAST = 5
"""Fewer requests than that are chance, whatever their share; the 99th percentile needs 100 times as many answers."""

OVERLOAD, TOO_LATE = 429, 504


def answers(directory: Path, start: datetime, end: datetime) -> pl.DataFrame:
    """One row for each live request that was ranked as of an instant in [start, end), failed ones too.

    The log is read file by file, so memory grows with the requests, not with their candidates. Empty where nothing was
    logged.
    """
    wanted = pl.col("event_timestamp").is_between(start, end, closed="left")
    # As `served.read`: nothing is answered before it is ranked, but for clocks that differ.
    since = (start - timedelta(days=1)).date()
    parts = [_heads(served.rows_of([file])).filter(wanted) for file in served.files(directory, since)]
    return pl.concat(parts) if parts else _heads(served.rows_of([]))


def health(rows: pl.DataFrame) -> ServingHealth | None:
    """Judge what was served to live users.

    Args:
        rows: Rows of the serving log, one a candidate or one a request.

    Returns:
        None where no live user asked for anything.
    """
    asked = _heads(rows)
    if not asked.height:
        return None
    status, degraded = asked["status"], asked["degraded"].fill_null("")
    shed = status.is_in([OVERLOAD, TOO_LATE])
    failed, answered = (status >= 500) & ~shed, status == 200
    latencies = asked["latency_ms"].filter(answered & asked["latency_ms"].is_finite().fill_null(value=False))
    kinds = degraded.filter(answered & (degraded != "")).value_counts(sort=True)
    ok = int(answered.sum())
    found = ServingHealth(
        requests=asked.height,
        errors=int(failed.sum()) / asked.height,
        shed=int(shed.sum()) / asked.height,
        fallbacks={kind: n / ok for kind, n in kinds.iter_rows()},
        p50_ms=_percentile(latencies, 0.5),
        p99_ms=_percentile(latencies, 0.99),
    )
    return replace(found, problems=tuple(_problems(found, ok)))


def _heads(rows: pl.DataFrame) -> pl.DataFrame:
    """The first row of each live answer: the candidate that was ranked first, or the one row of a failure."""
    first = (pl.col("position").is_null() | (pl.col("position") == 0)) & (pl.col("purpose") == served.LIVE)
    return rows.select(served.COMMON.names).filter(first)


def _percentile(values: pl.Series, share: float) -> float | None:
    found = values.quantile(share, "nearest")
    return None if found is None else float(found)


def _problems(found: ServingHealth, answered: int) -> Iterator[str]:
    """One sentence for each limit that is passed."""
    fallbacks = sum(found.fallbacks.values())
    for share, of, limit, what in (
        (found.errors, found.requests, ERRORS, "requests failed"),
        (found.shed, found.requests, SHED, "requests were turned away or too late"),
        (fallbacks, answered, FALLBACKS, f"answers had no fresh features ({', '.join(found.fallbacks)})"),
    ):
        if share >= limit and round(share * of) >= LEAST:
            yield f"{share:.1%} of {of:,} {what}; the limit is {limit:.0%}"
    if found.p99_ms is not None and found.p99_ms >= P99_MS and answered >= 100 * LEAST:
        yield f"the slowest 1% of {answered:,} answers took {found.p99_ms:.0f} ms or more; the limit is {P99_MS:.0f} ms"
