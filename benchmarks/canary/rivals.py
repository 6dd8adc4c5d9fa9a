"""Two other ways to judge a canary, as their projects document them, on the same evidence.

Each is given what it can read in its best light: what our judge calls invalid counts as an error, HIT@3 is a metric of
Kayenta's, and both may have a dark stage of mirrored requests, whose two columns they read as two arms.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.stats import norm

from benchmarks.canary.traffic import Look

Verdict = Literal["go on", "pass", "fail"]
MINUTES = 5  # points of a metric in one look, as of a time series with one point a minute


def arms(look: Look) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Errors, latencies and scores of champion and challenger: the pairs' columns while it is dark."""
    e = look.evidence
    if e.percent:
        a, b = e.champion, e.challenger
        return (
            a.failed_N | a.invalid_N,
            b.failed_N | b.invalid_N,
            a.latency_N,
            b.latency_N,
            a.score_N,
            b.score_N,
        )
    kept_P = e.pairs.failed_P2.any(1) | np.isfinite(e.pairs.latency_P2).any(1)
    bad_P2 = (e.pairs.failed_P2 | e.pairs.invalid_P2)[kept_P]
    ms_P2, score_P2 = e.pairs.latency_P2[kept_P], e.pairs.score_P2[kept_P]
    return bad_P2[:, 0], bad_P2[:, 1], ms_P2[:, 0], ms_P2[:, 1], score_P2[:, 0], score_P2[:, 1]


@dataclass
class Flagger:
    """Fixed thresholds at every check; each good check takes the next step.

    Built-in metrics: success rate >= `success`, p99 <= `p99_ms`; missing data is a failed check; the canary fails when
    `threshold` checks have failed (Flagger's scheduler: failed checks >= threshold).
    """

    success: float
    p99_ms: float
    threshold: int
    failed: int = 0
    stage: int = -1

    def look(self, look: Look) -> Verdict:
        """One check."""
        _, bad_B, _, ms_B, _, _ = arms(look)
        ms_B = ms_B[np.isfinite(ms_B)]
        good = bool(len(bad_B) and len(ms_B) and 1 - bad_B.mean() >= self.success)
        if good and np.quantile(ms_B, 0.99) <= self.p99_ms:
            return "pass"
        self.failed += 1
        return "fail" if self.failed >= self.threshold else "go on"


@dataclass
class Kayenta:
    """Netflix's judge: per metric a Mann-Whitney test of the points since the stage began, then a weighted score.

    98 % confidence, tolerance 0.25 of the Hodges-Lehmann estimate, points beyond 3 interquartile ranges dropped, NaN
    dropped; a metric without points is Nodata. Errors are critical. Groups of equal weight: errors, latency (p50, p99),
    memory, scores (mean, deviation), HIT@3. Memory needs an effect of a fifth (mean ratio), since no two versions
    have the same. Marginal 75, pass 95 of 100, ten looks a stage.

    Attributes:
        eager: Judged at every look from the second on, back below the marginal score; otherwise once, with the 50
            points a metric that its documentation asks for.
    """

    eager: bool
    stage: int = -1
    points: list[np.ndarray] = field(default_factory=list)

    def look(self, look: Look) -> Verdict:
        """Judge what came since the stage began."""
        if look.evidence.percent != self.stage:
            self.stage, self.points = look.evidence.percent, []
        if self.stage == 100 and not len(look.evidence.champion):
            return self._last(look)
        self.points.append(_points(look))
        looks = len(self.points)
        if looks < 10 and not (self.eager and looks >= 2):
            return "go on"
        score = self._score()
        if looks >= 10:
            return "pass" if score >= 95 else "fail"
        return "fail" if score < 75 else "go on"

    def _last(self, look: Look) -> Verdict:
        """At 100 % nobody is left to compare with: its points are those of the stage before, and all of it is over."""
        return "pass"

    def _score(self) -> float:
        points_KM2 = np.concatenate(self.points)
        labels = [classify(points_KM2[:, m, 1], points_KM2[:, m, 0]) for m in range(len(METRICS))]
        memory = METRICS.index("memory")
        if labels[memory] == "High" and not np.nanmean(points_KM2[:, memory, 1] / points_KM2[:, memory, 0]) > 1.2:
            labels[memory] = "Pass"
        fine = [_fine(label, metric) for label, metric in zip(labels, METRICS, strict=True)]
        if not fine[METRICS.index("errors")]:
            return 0.0
        known = [label != "Nodata" for label in labels]
        groups = [[fine[m] for m in group if known[m]] for group in _GROUPS]
        return 100 * float(np.mean([np.mean(g) for g in groups if g]))


METRICS = ("errors", "p50", "p99", "memory", "score", "score deviation", "hits")
_GROUPS = ((0,), (1, 2), (3,), (4, 5), (6,))
_HARM = {"errors": ("High",), "p50": ("High",), "p99": ("High",), "memory": ("High",), "hits": ("Low",)}


def _fine(label: str, metric: str) -> bool:
    return label not in _HARM.get(metric, ("High", "Low"))


def _points(look: Look) -> np.ndarray:
    """(minutes, metrics, 2): champion and challenger."""
    bad_A, bad_B, ms_A, ms_B, score_A, score_B = arms(look)
    e = look.evidence
    if len(bad_B):  # a baseline of the canary's own size, as the documentation asks for
        every = max(1, len(bad_A) // len(bad_B))
        bad_A, ms_A, score_A = bad_A[::every], ms_A[::every], score_A[::every]
    hits = look.hits() if e.percent else (np.empty(0), np.empty(0))
    if not e.percent:
        hits_P2 = e.pairs.hits_P2[np.isfinite(e.pairs.hits_P2).all(1)]
        hits = (hits_P2[:, 0], hits_P2[:, 1])
    out = np.full((MINUTES, len(METRICS), 2), np.nan)
    for version, (bad, ms, score) in enumerate(((bad_A, ms_A, score_A), (bad_B, ms_B, score_B))):
        for k in range(MINUTES):
            some = slice(k * len(bad) // MINUTES, (k + 1) * len(bad) // MINUTES)
            hit = hits[version][k * len(hits[version]) // MINUTES : (k + 1) * len(hits[version]) // MINUTES]
            fast, values = ms[some][np.isfinite(ms[some])], score[some][np.isfinite(score[some])]
            if len(bad[some]):
                out[k, 0, version] = bad[some].mean()
            if len(fast):
                out[k, 1:3, version] = np.quantile(fast, [0.5, 0.99])
            if len(values):
                out[k, 4:6, version] = values.mean(), values.std()
            if len(hit):
                out[k, 6, version] = hit.mean()
        out[:, 3, version] = e.memory_mb[version]
    return out


def classify(experiment: np.ndarray, control: np.ndarray) -> str:
    """Kayenta's Mann-Whitney classifier: High, Low, Pass or Nodata."""
    experiment, control = _clean(experiment), _clean(control)
    if not len(experiment) or not len(control):
        return "Nodata"
    if len(experiment) == len(control) and (np.sort(experiment) == np.sort(control)).all():
        return "Pass"
    m, n = len(experiment), len(control)
    shift = np.sort(np.subtract.outer(experiment, control).ravel())
    k = int(np.floor(m * n / 2 - norm.ppf(0.99) * np.sqrt(m * n * (m + n + 1) / 12)))
    if k < 1:
        return "Pass"
    tolerance = 0.25 * abs(float(np.median(shift)))
    return "High" if shift[k - 1] > tolerance else "Low" if shift[-k] < -tolerance else "Pass"


def _clean(values: np.ndarray) -> np.ndarray:
    values = values[np.isfinite(values)]
    if not len(values):
        return values
    low, high = np.quantile(values, [0.25, 0.75])
    return values[(values >= low - 3 * (high - low)) & (values <= high + 3 * (high - low))]
