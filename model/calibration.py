"""Calibration after training: Platt scaling of every head, on later engagement than the head was trained on.

probability = sigmoid(scale * logit + shift), scale > 0 (Platt 1999, "Probabilistic outputs for support vector
machines"). A strictly increasing function cannot change an order, and so neither HIT@3 nor AUC; isotonic regression
could, because it makes ties. Training has reasons to be off: row and head weights, hidden ids, and time that passed.

Fitted is the minimum over (scale, level) of a convex function, the cross-entropy against Platt's smoothed targets plus
two priors around identity:

    sum_n CE(t_n, sigmoid(z_n + level + (scale - 1) * (z_n - pivot)))
        + LEVEL_PRIOR * level^2 / 2 + SCALE_PRIOR * (scale - 1 - log(scale))

`-log(scale)` keeps the scale positive whatever the labels. The pivot is the mean logit weighted by p * (1 - p), where
the two parameters are independent to second order: a level that a few labels do support is not taken back by the
prior of the scale. Without any label both stay at identity.

Shapes: N rows, A actions.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash

from engagement.errors import EvergreenError
from engagement.table import RankingTable, micros
from model.bundle import Bundle
from model.metrics import calibration_error
from model.predict import logits

LEVEL_PRIOR = 1.0  # worth one positive: a rate is often off by a factor of e, one standard deviation
SCALE_PRIOR = 4.0  # a scale is seldom off by more than e^0.5; drawn worlds with 3 to 300 positives agree
SCALE, SHIFT = "calibration.scale", "calibration.shift"  # names in `Bundle.weights`; buffers of the ranker
_NEWTON_STEPS = 100  # a handful suffices unless logits are absurd


@dataclass(frozen=True)
class Calibration:
    """Two numbers a head.

    Attributes:
        scale_A: Above 0.
        shift_A: Added to the scaled logit.
    """

    scale_A: np.ndarray
    shift_A: np.ndarray

    def apply(self, logits_NA: np.ndarray) -> np.ndarray:
        """(N, A) float32 probabilities; what `model.predict.score` gives for these logits.

        Raises:
            EvergreenError: The logits are of another number of heads.
        """
        if logits_NA.ndim != 2 or logits_NA.shape[1] != len(self.scale_A):
            raise EvergreenError(
                f"a calibration of {len(self.scale_A)} heads cannot be applied to logits of shape {logits_NA.shape}",
                "Give it (rows, heads) of the model that it was fitted to",
            )
        # In float64, as in `layers.Calibrated`: rounding to float32 once, at the end, never turns an order round.
        return _sigmoid(logits_NA.astype(np.float64) * self.scale_A + self.shift_A).astype(np.float32)


def fit(labels_NA: np.ndarray, logits_NA: np.ndarray) -> Calibration:
    """Platt scaling of every head. Rows whose logit is not finite are left out: they stay so, for the gate to see.

    Args:
        labels_NA: 0 or 1.
        logits_NA: What the heads gave for the same rows, not calibrated.

    Raises:
        EvergreenError: The two have different shapes.
    """
    if labels_NA.ndim != 2 or labels_NA.shape != logits_NA.shape:
        raise EvergreenError(
            f"labels of shape {labels_NA.shape} do not belong to logits of shape {logits_NA.shape}",
            "Give both as (rows, heads) of the same rows",
        )
    heads = zip(labels_NA.T, logits_NA.astype(np.float64).T, strict=True)
    fitted = [_fit_head(y[np.isfinite(z)] != 0, z[np.isfinite(z)]) for y, z in heads]
    scale_A, shift_A = np.array(fitted, np.float64).reshape(-1, 2).T
    return Calibration(scale_A, shift_A)


def report(
    actions: tuple[str, ...], labels_NA: np.ndarray, logits_NA: np.ndarray, users_N: np.ndarray
) -> dict[str, dict[str, float]]:
    """Expected calibration error of every action before and after, honest although fit and report share their rows.

    "After" is cross-fitted: users are halved by a hash, each half is calibrated by what the other one fits.

    Returns:
        By action: `before`, `after`, and `positives`, the number of labels that it rests on.
    """
    half_N = _halves(users_N)
    after_NA = np.empty(logits_NA.shape, np.float32)
    for half in (False, True):
        other = fit(labels_NA[half_N != half], logits_NA[half_N != half])
        after_NA[half_N == half] = other.apply(logits_NA[half_N == half])
    before_NA = _sigmoid(logits_NA.astype(np.float64))
    return {
        action: {
            "before": calibration_error(labels_NA[:, a], before_NA[:, a]),
            "after": calibration_error(labels_NA[:, a], after_NA[:, a]),
            "positives": float(np.count_nonzero(labels_NA[:, a])),
        }
        for a, action in enumerate(actions)
    }


def calibrated(bundle: Bundle, later: RankingTable) -> Bundle:
    """The bundle with its heads calibrated on later requests; a calibration that it had is replaced.

    Rows count alike, sampled candidates too: a probability is that of the action among candidates as the table has
    them.

    Args:
        bundle: The model.
        later: Requests after its training window.

    Returns:
        The bundle, with the metrics `ece_<action>_before` and `ece_<action>_after` (see `report`).

    Raises:
        EvergreenError: The table is empty, not later than the training window, or of other features or actions.
    """
    if not later.rows:
        raise EvergreenError("there is no later engagement to calibrate on", "Choose a longer evidence window")
    if later.time.min() <= micros(bundle.train_end):
        raise EvergreenError(
            f"calibration needs requests after the training window, which ends at {bundle.train_end}",
            "Cut the table there: on its own training rows a model looks surer than it is",
        )
    logits_NA = logits(bundle, later)
    found = fit(later.labels, logits_NA)
    tensors = {SCALE: torch.from_numpy(found.scale_A), SHIFT: torch.from_numpy(found.shift_A)}
    told = report(bundle.spec.actions, later.labels, logits_NA, later.user_id[later.request_of_row])
    metrics = {f"ece_{a}_{when}": values[when] for a, values in told.items() for when in ("before", "after")}
    return replace(bundle, weights={**bundle.weights, **tensors}).with_metrics(**metrics)


def _fit_head(positive_N: np.ndarray, logit_N: np.ndarray) -> tuple[float, float]:
    """Scale and shift by Newton's method with step halving (as Lin, Lin and Weng 2007 do for Platt's problem)."""
    if not len(logit_N):
        return 1.0, 0.0
    target_N = _targets(positive_N)
    p_N = _sigmoid(logit_N)
    weight_N = p_N * (1 - p_N)
    pivot = float(np.average(logit_N, weights=weight_N if weight_N.sum() > 0 else None))
    around_N = logit_N - pivot
    at = np.array([1.0, 0.0])  # scale, level
    value = _objective(at, around_N, pivot, target_N)
    for _ in range(_NEWTON_STEPS):
        step = _newton_step(at, around_N, pivot, target_N)
        moved, size = at, 1.0
        while size > 1e-12:
            moved = at + size * step
            lower = _objective(moved, around_N, pivot, target_N)
            if lower < value:
                break
            size /= 2
        else:
            break
        done = value - lower < 1e-12 * (1 + abs(value))
        at, value = moved, lower
        if done:
            break
    scale, level = at
    return float(scale), float(pivot + level - scale * pivot)


def _targets(positive_N: np.ndarray) -> np.ndarray:
    """Platt's smoothed targets, so that labels which a threshold separates do not ask for an infinite scale.

    The rarer label gets his: (n + 1) / (n + 2) instead of 1, for n rows with it. His target for the commoner label
    would add up to one positive of its own, which alone doubles the rate of an action that was seen once; here it
    gives back exactly what the rarer one lost, and the mean target stays the observed rate.
    """
    n = len(positive_N)
    positives = int(positive_N.sum())
    rarer = min(positives, n - positives)
    if not rarer:
        return positive_N.astype(np.float64)
    moved = rarer / (rarer + 2)
    return np.where(positive_N, 1 - moved / positives, moved / (n - positives))


def _objective(at: np.ndarray, around_N: np.ndarray, pivot: float, target_N: np.ndarray) -> float:
    scale, level = at
    if scale <= 0:
        return np.inf
    x_N = scale * around_N + pivot + level
    prior = LEVEL_PRIOR * level**2 / 2 + SCALE_PRIOR * (scale - np.log(scale))
    return float((np.logaddexp(0, x_N) - target_N * x_N).sum() + prior)


def _newton_step(at: np.ndarray, around_N: np.ndarray, pivot: float, target_N: np.ndarray) -> np.ndarray:
    scale, level = at
    p_N = _sigmoid(scale * around_N + pivot + level)
    error_N, curve_N = p_N - target_N, p_N * (1 - p_N)
    gradient = np.array([error_N @ around_N + SCALE_PRIOR * (1 - 1 / scale), error_N.sum() + LEVEL_PRIOR * level])
    mixed = curve_N @ around_N
    hessian = np.array(
        [
            [curve_N @ around_N**2 + SCALE_PRIOR / scale**2, mixed],
            [mixed, curve_N.sum() + LEVEL_PRIOR],
        ]
    )
    return -np.linalg.solve(hessian, gradient)


def _halves(users_N: np.ndarray) -> np.ndarray:
    """(N,) bool, equal for the rows of one user, the same in every process."""
    users, row = np.unique(users_N, return_inverse=True)
    half = [xxhash.xxh3_64_intdigest(user) % 2 == 1 for user in users.tolist()]
    return np.array(half, bool)[row]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return np.asarray(np.exp(-np.logaddexp(0, -x)))
