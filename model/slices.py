"""Slices: parts of the evidence in which a challenger must not be worse, however good it is on the whole.

Who is new, light, fresh or tail is told by what the champion remembers of the rows that it was trained on
(`model/content.py`): new users and fresh items are those it never saw; light users are the least active known ones who
together make up `RARE` of its rows, tail items likewise. Every value of a categorical request feature other than the
user's id is a slice too, if it has enough data.

A request slice compares HIT@3 on its requests. An item slice counts the hits on its items only, on requests that show
at least one of them. Many slices are tested, so their p-values are corrected (Holm 1979).

Shapes: R requests, Q comparable requests, N rows, U users, A actions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from engagement.table import MISSING, RankingTable, hash_id
from model.bootstrap import one_sided
from model.columns import place_of
from model.content import content_of
from model.gate_rules import MIN_SLICE_REQUESTS, MIN_SLICE_USERS, SLICE_MARGIN
from model.metrics import Hits

RARE = 0.2  # share of the remembered rows that light users make up, and tail items


@dataclass(frozen=True)
class SliceResult:
    """One slice, tested.

    Attributes:
        name: `new users`, `hour_of_day=20`; a value that is no small number is named by the start of its hash.
        requests: Comparable requests in it.
        users: By so many users.
        champion: The champion's HIT@3 in it.
        difference: Relative difference of the challenger.
        p: Of "its loss is no greater than the margin", one-sided.
        adjusted: p after Holm's correction over all slices.
    """

    name: str
    requests: int
    users: int
    champion: float
    difference: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Slices:
    """Slices of one table.

    Attributes:
        requests: (R,) bool by name.
        items: (N,) bool by name.
    """

    requests: dict[str, np.ndarray]
    items: dict[str, np.ndarray]

    def widen(self, table: RankingTable) -> RankingTable:
        """The table with an action more for every item slice: the primary action, on the slice's items only."""
        spec = table.spec
        primary_N = table.labels[:, spec.actions.index(spec.primary_action)]
        more = [np.where(of, primary_N, 0) for of in self.items.values()]
        spec = replace(spec, actions=(*spec.actions, *self.items))
        return replace(table, spec=spec, labels=np.column_stack([table.labels, *more]).astype(table.labels.dtype))


def slices_of(table: RankingTable, memory: Mapping[str, Tensor]) -> Slices:
    """The slices of some evidence.

    Args:
        table: The evidence.
        memory: The champion's `Bundle.memory`.
    """
    known = {n: t.cpu().numpy() for n, t in content_of(memory).items()}
    user_R = np.asarray(table.request_cat[:, place_of(table.spec, "request", "user_id")[1]])
    item_N = np.asarray(table.item_cat[:, place_of(table.spec, "candidate", "item_id")[1]])
    new, light = _unknown_and_rare(user_R, known["user_keys"], known["pair_user"])
    fresh, tail = _unknown_and_rare(item_N, known["item_keys"], known["pair_item"])
    requests = {"new users": new, "light users": light} | _contexts(table)
    return Slices(requests, {"fresh items": fresh, "tail items": tail})


def compare(
    slices: Slices, table: RankingTable, primary: str, after: Hits, before: Hits
) -> tuple[tuple[SliceResult, ...], tuple[str, ...]]:
    """Test every slice.

    Args:
        slices: From `slices_of(table, ...)`.
        table: The evidence.
        primary: The primary action.
        after: The challenger's hits on `slices.widen(table)`.
        before: The champion's.

    Returns:
        The slices that were tested, the worst first, and the names of those with too little data.
    """
    shown = {n: np.bincount(table.request_of_row, of, table.requests) > 0 for n, of in slices.items.items()}
    found = [(n, of, primary) for n, of in slices.requests.items()] + [(n, of, n) for n, of in shown.items()]
    tested, thin = [], []
    for name, of_R, action in found:
        mask = of_R[after.requests]
        user, a, b = after.user[mask], after.column(action)[mask], before.column(action)[mask]
        users, code = np.unique(user, return_inverse=True)
        if len(user) < MIN_SLICE_REQUESTS or len(users) < MIN_SLICE_USERS or not b.any():
            thin.append(name)
            continue
        # The mean of "gained + margin * champion's" is below zero exactly where the loss exceeds the margin.
        p = one_sided(np.bincount(code, a - (1 - SLICE_MARGIN) * b))
        change = float(a.sum() / b.sum()) - 1
        tested.append(SliceResult(name, len(user), len(users), float(b.mean()), change, p, p))
    adjusted = holm(np.array([s.p for s in tested]))
    results = [replace(s, adjusted=float(p)) for s, p in zip(tested, adjusted, strict=True)]
    return tuple(sorted(results, key=lambda s: (s.p, s.name))), tuple(thin)


def holm(p_K: np.ndarray) -> np.ndarray:
    """(K,) adjusted p-values (Holm 1979): at most alpha of all families have a false one below alpha."""
    order = np.argsort(p_K, kind="stable")
    stepped = np.maximum.accumulate(p_K[order] * np.arange(len(p_K), 0, -1))
    adjusted = np.empty_like(p_K)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _unknown_and_rare(keys: np.ndarray, known: np.ndarray, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each key whether the champion never saw it, and whether it is a rare known one; neither if missing."""
    count = np.bincount(pair, minlength=len(known))
    by_count = np.bincount(count, count)  # rows of all that have been seen so many times
    rare = int(np.searchsorted(np.cumsum(by_count), RARE * len(pair)))
    place = np.minimum(np.searchsorted(known, keys), max(0, len(known) - 1))
    seen = known[place] == keys if len(known) else np.zeros(len(keys), bool)
    return ~seen & (keys != MISSING), seen & (count[place] <= rare) if len(known) else seen


def _contexts(table: RankingTable) -> dict[str, np.ndarray]:
    """A slice for every common value of every categorical request feature but the user's id."""
    found, column = {}, 0
    for feature in table.spec.of("request", hashed=True):
        if feature.kind == "categorical" and feature.name != "user_id":
            values, code, count = np.unique(table.request_cat[:, column], return_inverse=True, return_counts=True)
            name = _names(feature.name)
            for i in np.flatnonzero(count >= MIN_SLICE_REQUESTS):
                found[name(int(values[i]))] = code == i
        column += feature.width
    return found


def _names(feature: str) -> Callable[[int], str]:
    """Names of hashed values: small numbers (hours, days, codes) are found by hashing them again."""
    numbers = {hash_id(feature, str(i)): str(i) for i in range(100)} | {MISSING: "(none)"}
    return lambda value: f"{feature}={numbers.get(value, f'{value:016x}'[:8])}"
