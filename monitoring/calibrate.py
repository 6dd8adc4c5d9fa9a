"""What ordinary windows score against the weeks before them, and the thresholds that follow.

When a model is trained, windows of the length of a check are taken out of the past and each is compared with what was
known before it, just as a check will compare: with the nearest of its likes, and with a reference as old as a check
finds it. The scores are the column's usual movement: noise of a small window, the turn of the week, news.

A threshold is the predictive quantile of the next such score (Student's t from a normal-inverse-gamma posterior with a
flat mean; Gelman et al., "Bayesian Data Analysis", 3rd edition, section 3.3, and a prior on the variance alone), on
the scale of the root of a score. There, what ordinary windows score lies evenly around its middle; on the scale of the
logarithm still days widen the tail that decides, and a threshold is several times the worst that was ever seen. Its
level is shared between all columns (Bonferroni) and all episodes of a month.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy.special import stdtrit

from engagement.table import MISSING, micros
from monitoring import rules
from monitoring.columns import Column, columns_of, predictions_of, vocabularies_of
from monitoring.like import BLOCK_HOURS, begins, composition, ends
from monitoring.sketch import Sketch, Vocabulary, feature_blocks, sketch
from monitoring.stack import Stack
from monitoring.vector_drift import apart

if TYPE_CHECKING:
    from monitoring.compare import Window
    from monitoring.reference import Reference

_DAY = 86_400_000_000


@dataclass(frozen=True)
class Past:
    """A window of the past that stands for a check.

    Attributes:
        start: Of the window.
        end: Of the window.
        known: Up to when its reference reaches: a few days earlier, as with a check.
        thin: Factor to what a window of the usual size would score.
    """

    start: datetime
    end: datetime
    known: datetime
    thin: float


def calibrate(reference: "Reference", window: "Window", parent: "Reference | None") -> "Reference":
    """The reference with what past windows scored; its parent's scores are inherited.

    Args:
        reference: Of the model that was trained on `window`, its cells complete.
        window: What it was trained on.
        parent: Of the champion that was updated.
    """
    past = pasts(reference, window)
    found = {
        **_columns(reference, window, past),
        **_predictions(reference, window, past),
        **_unseen(window, past, parent.vocabularies if parent else {}, reference.vocabularies),
    }
    inherited = parent.usual if parent else {}
    shorter = np.sqrt(parent.hours / reference.hours) if parent else 1.0  # chance alone grows so in shorter windows
    usual = {
        name: (*(float(s * shorter) for s in inherited.get(name, ())), *found.get(name, ()))[-rules.PAST_WINDOWS :]
        for name in {**inherited, **found}
    }
    return replace(reference, usual={name: scores for name, scores in sorted(usual.items()) if scores})


def pasts(reference: "Reference", window: "Window") -> list[Past]:
    """At most `rules.PAST_WINDOWS` windows of the reference's length, evenly over what was learned, oldest first.

    Only such as hold enough rows, and lie late enough for a reference before them.
    """
    length = timedelta(hours=reference.hours)
    step, least = min(length, timedelta(days=1)), max(timedelta(days=rules.PAST_DAYS), length)
    first = min((begins(c) for c in reference.cells), default=window.end)
    span = min(window.end - window.start, timedelta(days=rules.PAST_MOST))
    turns = np.arange(max(0, int((span - length) / step) + 1))
    some = turns if len(turns) <= rules.PAST_WINDOWS else np.linspace(0, turns[-1], rules.PAST_WINDOWS).astype(int)
    table = window.table
    found: list[Past] = []
    for turn in some[::-1].tolist():
        # Checks come every hour: their windows begin anywhere within the blocks of the like.
        end = window.end - turn * step - timedelta(hours=turn % BLOCK_HOURS)
        start = end - length
        ages = [timedelta(days=a) for a in rules.AGES if start - timedelta(days=a) - first >= least]
        if not ages:
            continue
        age = ages[len(found) % len(ages)]
        a, b = np.searchsorted(table.time, [micros(start), micros(end)])
        users = len(np.unique(table.user_id[a:b]))
        rows = int(table.offsets[b] - table.offsets[a])
        if not rules.too_small(rows, users):
            found.append(Past(start, end, start - age, reference.thin(users, rows)))
    return found


def _likes(stack: Stack, past: list[Past], wanted: list[np.ndarray]) -> np.ndarray:
    """(W, 2, C) both likes of each past window in what was known before it."""
    begin, end = (np.array([f(c).timestamp() for c in stack.cells]) for f in (begins, ends))
    known = [p.known.timestamp() for p in past]
    kept = rules.KEEP_DAYS * 86_400
    return np.array([stack.likes((end <= k) & (begin >= k - kept), n) for k, n in zip(known, wanted, strict=True)])


def _columns(reference: "Reference", window: "Window", past: list[Past]) -> dict[str, list[float]]:
    parts = [window.table.between(micros(p.start), micros(p.end)) for p in past]
    seen = [sketch(part, reference.centres) for part in parts]
    if not seen:
        return {}
    likes = _likes(reference.stack, past, [composition(part, reference.holidays) for part in parts])
    columns = columns_of(reference.spec, reference.centres)
    found = _scores(reference.stack, likes, columns, seen, past)
    for feature in (f for f in reference.spec.features if f.kind == "embedding"):
        held = [s.vectors.get(feature.name) for s in reference.cells.values()]
        nearest = [apart(held, two, s.vectors[feature.name]) for two, s in zip(likes, seen, strict=True)]
        found[feature.name] = [n[0] for n in nearest if n is not None]
    return found


def _predictions(reference: "Reference", window: "Window", past: list[Past]) -> dict[str, list[float]]:
    stack, whole, seen, kept, parts = reference.predicted, window.part, [], [], []
    for p in past if stack.cells else ():
        a, b = np.searchsorted(whole.time, [micros(p.start), micros(p.end)])
        part = whole.between(micros(p.start), micros(p.end))
        if part.requests:
            seen.append(sketch(part, {}, window.scores[int(whole.offsets[a]) : int(whole.offsets[b])]))
            kept.append(p)
            parts.append(composition(part, reference.holidays))
    if not seen:
        return {}
    return _scores(stack, _likes(stack, kept, parts), predictions_of(reference.spec), seen, kept)


def _scores(
    stack: Stack, likes: np.ndarray, columns: tuple[Column, ...], seen: list[Sketch], past: list[Past]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    windows, many, cells = likes.shape
    for column in columns:
        if column.name not in stack.columns:
            continue
        mixes = stack.mixes(column.name, likes.reshape(windows * many, cells))
        scores, rises = found.setdefault(column.name, []), [0.0]
        for turn, (one, p) in enumerate(zip(seen, past, strict=True)):
            old, new = mixes[turn * many : (turn + 1) * many], one.columns[column.name]
            before = column.missing(old[0], stack.size(likes[turn][0]))
            rises.append(column.missing(new, (one.requests, one.rows)) - before)
            filled = [side for side in old if column.known(side).total]
            if column.known(old[0]).total and column.known(new).total:
                scores.append(column.nearest(filled, new)[0] * p.thin)
        found[rules.MISSING_RISE + column.name] = [float(max(rises))]
    return found


def _unseen(
    window: "Window", past: list[Past], parent: Mapping[str, Vocabulary], known: Mapping[str, Vocabulary]
) -> dict[str, list[float]]:
    """Share of values in each past window that had not been there before its reference ended."""
    table, names, found = window.table, vocabularies_of(known), {}
    for feature, block in feature_blocks(table):
        if feature.name not in names:
            continue
        level = table.time if feature.level == "request" else table.time[table.request_of_row]
        values, time = block.ravel(), np.repeat(level, block.shape[1])
        # Of ten million rows a sort takes half a minute; what is in the past windows is looked up.
        first = pl.DataFrame({"value": values, "time": time}).group_by("value").agg(pl.col("time").min()).sort("value")
        distinct, born = first["value"].to_numpy(), first["time"].to_numpy()
        bound = np.iinfo(np.int64).max
        if feature.name in parent:
            born = np.where(np.isin(distinct, parent[feature.name].hashes), np.iinfo(np.int64).min, born)
            bound = parent[feature.name].bound
        scores = []
        for p in past:
            a, b = np.searchsorted(time, [micros(p.start), micros(p.end)])
            here = values[a:b][(values[a:b] != MISSING) & (values[a:b] < bound)]
            if len(here):
                scores.append(float((born[np.searchsorted(distinct, here)] >= micros(p.known)).mean()))
        found[rules.NEW + feature.name] = scores
    return found


def threshold(kind: str, usual: tuple[float, ...], columns: int, hours: int, thin: float = 1.0) -> float:
    """What the score of a column is compared with.

    Args:
        kind: Of the column.
        usual: What past windows scored.
        columns: How many columns are compared.
        hours: Length of the window.
        thin: `rules.thin` of the window: the fewer users it holds, the further chance alone takes a score.
    """
    least, past = rules.LEAST[kind], np.asarray(usual)
    if not len(past):
        return rules.PRIOR[kind] / thin
    start = rules.START[kind]
    z = np.sqrt(np.maximum(past - start, 0))
    middle = np.median(z)
    wide = 3 * max(1.4826 * float(np.median(np.abs(z - middle))), rules.PRIOR_SPREAD)
    z = np.clip(z, middle - wide, middle + wide)  # one bad day in the past must not excuse the next
    n = max(1.0, len(z) * min(1.0, 24 / hours))  # longer windows overlap
    spread = np.sqrt((rules.PRIOR_WEIGHT * rules.PRIOR_SPREAD**2 + n * z.var()) / (rules.PRIOR_WEIGHT + n - 1))
    df = min(rules.PRIOR_WEIGHT + n - 1, rules.MOST_DF)
    quantile = -float(stdtrit(df, rules.level(columns)))
    limit = start + float(z.mean() + quantile * spread * np.sqrt(1 + 1 / n)) ** 2
    return min(max(limit, least) / thin, rules.MOST[kind])
