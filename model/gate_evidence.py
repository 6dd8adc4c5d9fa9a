"""What the gate's rules read: numbers about challenger and champion on the same requests, measured here.

Gathering is kept apart from judging: `Evidence` holds numbers only, so that every rule can be tested on its boundary.

Shapes: Q comparable requests, N rows, A actions, U users, M quantities.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engagement.table import RankingTable
from model import gate_rules as rules
from model.bootstrap import Estimate, ratios, sums_by_user
from model.bundle import Bundle
from model.columns import widen_table
from model.cost import Cost, measure_cost
from model.exam import exam_of
from model.metrics import Hits, K, auc, calibration_error, chance_error, hits, random_hit3, ranking_score
from model.predict import score
from model.slices import SliceResult, Slices, compare, slices_of

_BINS = 10  # of the population stability index: deciles of the champion's scores


@dataclass(frozen=True)
class Scored:
    """One model on the evidence.

    Attributes:
        hit3: HIT@3 by action.
        auc: Of the primary action; NaN where it cannot be told.
        ece: Expected calibration error of the primary head.
    """

    hit3: dict[str, Estimate]
    auc: float
    ece: float


@dataclass(frozen=True)
class Evidence:
    """Everything that the rules read.

    Attributes:
        actions: Names, in the table's order.
        primary: The action that HIT@3 is mainly about.
        negatives: Actions that should be rare.
        rows: Candidates.
        broken_rows: Of them with a challenger's score that is not a finite number.
        constant: Whether the challenger gives all of them the same score.
        requests: Comparable requests.
        skipped: Requests left out, having three candidates or fewer.
        users: Users of the comparable requests.
        challenger: The challenger's numbers.
        champion: The champion's; None without one, and so is everything below that compares.
        random: HIT@3 of a random order, by action.
        chance_ece: Calibration error that a perfectly calibrated model would show on these rows, about.
        above_random: The challenger's HIT@3/<primary> minus a random order's.
        difference: Relative difference in HIT@3 by action.
        excess: By negative action: HIT@3 minus (1 + `NEGATIVE_MARGIN`) times the champion's.
        slices: Tested slices, the worst first.
        thin_slices: Names of slices with too little data.
        forgetting: Relative difference in HIT@3/<primary> on the exam; None without an exam.
        exam_requests: Comparable requests of the exam.
        psi: Population stability index of the primary scores.
        costs: Of challenger and champion; empty where nothing was measured.
        newer: Whether the challenger was trained to a later instant.
        seed_std: Relative deviation of HIT@3/<primary> between seeds of the challenger's recipe; None if unknown.
    """

    actions: tuple[str, ...]
    primary: str
    negatives: tuple[str, ...]
    rows: int
    broken_rows: int
    constant: bool
    requests: int
    skipped: int
    users: int
    challenger: Scored
    champion: Scored | None
    random: dict[str, float]
    chance_ece: float
    above_random: Estimate
    difference: dict[str, Estimate] | None = None
    excess: dict[str, Estimate] | None = None
    slices: tuple[SliceResult, ...] = ()
    thin_slices: tuple[str, ...] = ()
    forgetting: Estimate | None = None
    exam_requests: int = 0
    psi: float | None = None
    costs: tuple[Cost, ...] = ()
    newer: bool = False
    seed_std: float | None = None


@dataclass(frozen=True)
class Exam:
    """Held-out requests of past windows, scored by both models."""

    table: RankingTable
    challenger: np.ndarray
    champion: np.ndarray


def gather(table: RankingTable, challenger: Bundle, champion: Bundle | None, seed: int) -> Evidence:
    """Measure two models on requests later than anything that either was trained on.

    Args:
        table: Those requests.
        challenger: Calibrated on them or not (`model/calibration.py`).
        champion: None for a first model.
        seed: Of the bootstrap.
    """
    past = exam_of(champion) if champion else None
    exam = widen_table(past, challenger.spec) if past else None  # an update may have brought features
    return measure(
        table,
        score(challenger, table),
        score(champion, table) if champion else None,
        seed,
        slices=slices_of(table, champion.memory) if champion else None,
        exam=Exam(exam, score(challenger, exam), score(champion, exam)) if champion and exam else None,
        # Where the challenger was calibrated on these very rows, its honest error is the cross-fitted one.
        ece=challenger.metrics.get(f"ece_{table.spec.primary_action}_after"),
        costs=_costs(table, challenger, champion),
        newer=champion is not None and challenger.train_end > champion.train_end,
        seed_std=rules.seed_std(challenger.recipe),
    )


def measure(
    table: RankingTable,
    challenger: np.ndarray,
    champion: np.ndarray | None,
    seed: int,
    *,
    slices: Slices | None = None,
    exam: Exam | None = None,
    ece: float | None = None,
    costs: tuple[Cost, ...] = (),
    newer: bool = False,
    seed_std: float | None = None,
) -> Evidence:
    """The evidence from scores.

    Args:
        table: Requests later than anything that either model was trained on.
        challenger: (N, A) its probabilities.
        champion: (N, A) the champion's on the same rows; None if there is none.
        seed: Of the bootstrap.
        slices: Slices of the table to compare.
        exam: Requests of the past.
        ece: The challenger's calibration error, where it was measured better than on these rows.
        costs: Of challenger and champion.
        newer: Whether the challenger was trained to a later instant.
        seed_std: Known deviation between seeds.
    """
    spec, wide = table.spec, slices.widen(table) if slices else table
    by_row = ranking_score(spec, challenger)
    after = hits(wide, np.nan_to_num(by_row, nan=-1.0))
    before = None if champion is None else hits(wide, ranking_score(spec, champion))
    found = _bootstrap(after, before, spec.actions, seed)
    primary, random = spec.actions.index(spec.primary_action), random_hit3(after)
    comparison: dict = {}
    if before is not None and champion is not None:
        tested, thin = compare(slices, table, spec.primary_action, after, before) if slices else ((), ())
        forgetting, exam_requests = _forgetting(exam, seed) if exam else (None, 0)
        comparison = {
            "difference": dict(zip(spec.actions, found["difference"], strict=True)),
            "excess": {a: found["excess"][spec.actions.index(a)] for a in spec.negative_actions},
            "slices": tested,
            "thin_slices": thin,
            "forgetting": forgetting,
            "exam_requests": exam_requests,
            "psi": stability_index(ranking_score(spec, champion), by_row),
        }
    return Evidence(
        actions=spec.actions,
        primary=spec.primary_action,
        negatives=spec.negative_actions,
        rows=len(challenger),
        broken_rows=int((~np.isfinite(challenger)).any(1).sum()),
        constant=len(challenger) > 1 and bool(np.ptp(by_row) == 0),
        requests=len(after.requests),
        skipped=after.skipped,
        users=len(np.unique(after.user)),
        challenger=_scored(table, challenger, found["challenger"], ece),
        champion=None if champion is None else _scored(table, champion, found["champion"], None),
        random={a: random[a] for a in spec.actions},
        chance_ece=chance_error(table.labels[:, primary]),
        above_random=found["above random"][primary],
        costs=costs,
        newer=newer,
        seed_std=seed_std,
        **comparison,
    )


def stability_index(expected_N: np.ndarray, actual_N: np.ndarray) -> float:
    """Population stability index: sum over bins of (q - p) * log(q / p), p and q the shares of the two.

    Bins are deciles of the expected; half a row is added to each, so that an empty one is no infinity.

    Returns:
        NaN where a score is.
    """
    if not len(expected_N) or np.isnan(expected_N).any() or np.isnan(actual_N).any():
        return float("nan")
    edges = np.unique(np.quantile(expected_N, np.arange(1, _BINS) / _BINS))
    shares = []
    for scores_N in (expected_N, actual_N):
        count = np.bincount(np.searchsorted(edges, scores_N, side="right"), minlength=len(edges) + 1) + 0.5
        shares.append(count / count.sum())
    p, q = shares
    return float(((q - p) * np.log(q / p)).sum())


def _bootstrap(after: Hits, before: Hits | None, actions: tuple[str, ...], seed: int) -> dict[str, list[Estimate]]:
    """Every ratio of sums that the rules need, by action, all from the same resamples of users."""
    width, one = len(actions), np.ones((len(after.requests), len(actions)))
    a_QA = after.hits_QA[:, :width].astype(np.float64)
    pairs = {"challenger": (a_QA, one), "above random": (a_QA - after.expected_QA[:, :width], one)}
    if before is not None:
        b_QA = before.hits_QA[:, :width].astype(np.float64)
        pairs |= {
            "champion": (b_QA, one),
            "difference": (a_QA - b_QA, b_QA),
            "excess": (a_QA - (1 + rules.NEGATIVE_MARGIN) * b_QA, one),
        }
    if not len(after.requests):
        return dict.fromkeys(pairs, [Estimate(np.nan, -np.inf, np.inf, np.inf)] * width)
    x_UM, y_UM = (sums_by_user(np.hstack([p[k] for p in pairs.values()]), after.user) for k in (0, 1))
    found = ratios(x_UM, y_UM, np.bincount(after.user), rules.RESAMPLES, seed).estimates(rules.CONFIDENCE)
    by_name = {name: found[i * width : (i + 1) * width] for i, name in enumerate(pairs)}
    # What no model can reach is no part of an interval: the hits of three places, a loss of more than everything.
    limits = {"challenger": (0.0, float(K)), "champion": (0.0, float(K)), "difference": (-1.0, np.inf)}
    return {name: [_within(e, *limits.get(name, (-np.inf, np.inf))) for e in es] for name, es in by_name.items()}


def _within(e: Estimate, least: float, most: float) -> Estimate:
    return Estimate(e.value, max(e.low, least), min(e.high, most), e.error)


def _forgetting(exam: Exam, seed: int) -> tuple[Estimate | None, int]:
    spec = exam.table.spec
    after, before = (hits(exam.table, ranking_score(spec, s)) for s in (exam.challenger, exam.champion))
    if not len(after.requests):
        return None, 0
    primary = spec.actions.index(spec.primary_action)
    return _bootstrap(after, before, spec.actions, seed)["difference"][primary], len(after.requests)


def _scored(table: RankingTable, scores: np.ndarray, found: list[Estimate], ece: float | None) -> Scored:
    labels_N = table.labels[:, table.spec.actions.index(table.spec.primary_action)]
    by_row = ranking_score(table.spec, scores)
    return Scored(
        hit3=dict(zip(table.spec.actions, found, strict=True)),
        auc=auc(labels_N, by_row),
        ece=calibration_error(labels_N, by_row) if ece is None else ece,
    )


def _costs(table: RankingTable, challenger: Bundle, champion: Bundle | None) -> tuple[Cost, ...]:
    """Both models exported and measured as they will be served."""
    with tempfile.TemporaryDirectory() as room:
        directories = []
        for name, bundle in (("challenger", challenger), ("champion", champion)):
            if bundle:
                bundle.save(Path(room) / name)
                directories.append(Path(room) / name)
        return tuple(measure_cost(directories, table))
