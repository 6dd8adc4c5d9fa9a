"""Content vectors of items and users, learned causally from what users did with which items.

Data without item embeddings gets them here. Each row of the ranking table is one observation, user u did something of
value r with item i at the time of its request, explained as

    r_ui = mean + bias_i + level_u + user_u . item_i + noise

by alternating ridge regressions (Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems",
IEEE Computer 2009; the solver is that of Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback
Datasets", ICDM 2008). An item's vector says which other items its friends engage with, and the sign of r is kept: an
item that was hidden pushes away. `fold_in` is the same regression for one request, from its history alone: the
realtime counterpart of the batch user vector, in the same coordinates and for users never seen before.

No row sees its own future. The window is cut into blocks; version v of all vectors is learned from the requests before
block v and serves the requests of that block. A row counts from its request on, as if its label were known at once.
Successive versions are rotated onto each other (orthogonal Procrustes, Schönemann, Psychometrika 1966), so that a
network can read single coordinates; dot products do not need it.

Shapes: B requests, L actions, A action types, N rows, P pairs, V versions, I items, U users, K items or users,
C vector width, E width of the data's own embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from engagement.errors import EvergreenError
from engagement.table import MISSING, Level, RankingTable, TableSpec
from model.columns import place_of

RIDGE = 4.0  # lambda of every regression; chosen on windows before the test windows, as all numbers here
BIAS_PRIOR = 10.0  # rows at the mean value that an item starts with
LEVEL_PRIOR = 5.0  # and a user
SWEEPS = 3  # alternations for a version; it starts from the version before
OTHER_VALUE = 0.4  # of a positive action that is not the primary one, which has 1
NEGATIVE_VALUE = -0.5
PAIRS = 4_000_000  # newest rows that are learned from and carried to the next update (12 bytes each)
START = 0.1  # standard deviation of an item vector before it was ever solved for
_CHUNK = 1 << 15  # regressions solved at a time
CONTENT = "content."  # prefix of the state in a bundle's memory
ALWAYS = np.iinfo(np.int64).min  # the first version holds from ever
VERSIONED = ("item_VIC", "bias_VI", "user_VUC", "mean_V")  # fields of `Content` with a version first


@dataclass(frozen=True)
class Content:
    """Versions of all vectors; what is unknown at a version is zero there.

    The last version was learned from the whole window and is the one to evaluate and to serve.

    Attributes:
        since: (V,) int64, microseconds, ascending: version v holds for requests with `since[v] <= time`.
        item_keys: (I,) int64, ascending: hashes as in `history_item` and the `item_id` column.
        item_VIC: float32.
        bias_VI: float32, by how much the item's rows are worth more than the mean, shrunk.
        user_keys: (U,) int64, ascending: hashes as in the `user_id` column.
        user_VUC: float32, the long-term interest.
        mean_V: float32, mean value of a row.
        values_A: float32, what each action is worth.
    """

    since: np.ndarray
    item_keys: np.ndarray
    item_VIC: np.ndarray
    bias_VI: np.ndarray
    user_keys: np.ndarray
    user_VUC: np.ndarray
    mean_V: np.ndarray
    values_A: np.ndarray

    def final(self) -> "Content":
        """The last version alone."""
        last = {n: getattr(self, n)[-1:] for n in VERSIONED}
        return replace(self, since=np.array([ALWAYS]), **last)


@dataclass(frozen=True)
class _Pairs:
    """Observations in time order: which user (index), which item (index), of what value."""

    user_P: np.ndarray
    item_P: np.ndarray
    value_P: np.ndarray

    def newest(self, end: int) -> "_Pairs":
        """Up to `PAIRS` observations before position `end`."""
        part = slice(max(0, end - PAIRS), end)
        return _Pairs(self.user_P[part], self.item_P[part], self.value_P[part])


@dataclass(frozen=True)
class _Vectors:
    """One version."""

    item_IC: np.ndarray
    bias_I: np.ndarray
    user_UC: np.ndarray
    mean: np.float32


def learn(
    table: RankingTable, dim: int, versions: int, seed: int, state: dict[str, Tensor] | None = None
) -> tuple[Content, dict[str, Tensor]]:
    """Learn the vectors of a training window.

    Args:
        table: The training window; for an update, only what is new in it.
        dim: C. Where the data has item embeddings of its own, these are used, projected to C by their principal axes.
        versions: Blocks into which the window is cut, by equal numbers of requests. The result has one version more:
            the final one.
        seed: Of the start vectors of new items. Equal inputs give equal bits.
        state: What the champion's `learn` returned; its vectors are then version 0, else version 0 is zero.

    Returns:
        The versions, and the state that travels with the model: vectors, keys and the newest `PAIRS` observations.

    Raises:
        EvergreenError: A feature that is needed is missing, or the state is of another width.
    """
    if state is not None and state["item"].shape[1] != dim:
        raise EvergreenError(
            f"the champion's content vectors have width {state['item'].shape[1]}, not {dim}", "Train from scratch"
        )
    old = {name: tensor.cpu().numpy() for name, tensor in (state or _empty(dim)).items()}
    users, items = _column(table, "request", "user_id")[table.request_of_row], _column(table, "candidate", "item_id")
    named = np.flatnonzero((users != MISSING) & (items != MISSING))
    users, items, time_P = users[named], items[named], np.asarray(table.time)[table.request_of_row[named]]
    user_keys, item_keys = np.union1d(old["user_keys"], users), np.union1d(old["item_keys"], items)
    values_A = action_values(table.spec)
    pairs = _Pairs(
        np.concatenate([_remap(old["user_keys"], user_keys)[old["pair_user"]], np.searchsorted(user_keys, users)]),
        np.concatenate([_remap(old["item_keys"], item_keys)[old["pair_item"]], np.searchsorted(item_keys, items)]),
        np.concatenate([old["pair_value"], np.clip(table.labels[named] @ values_A, -1, 1)]).astype(np.float32),
    )
    current = _carry(old, item_keys, user_keys, dim)
    fixed_IC, axes_EC = _own_embeddings(table, named, items, item_keys, current.item_IC, old["axes"])
    if fixed_IC is not None:
        current = replace(current, item_IC=fixed_IC)
    start_IC = np.random.default_rng(seed).normal(0, START, (len(item_keys), dim)).astype(np.float32)

    # The first block is served by what was known before the window, and so on; the end of the window comes last.
    since = np.asarray(table.time)[np.arange(1, versions) * table.requests // versions]
    since = np.concatenate([since, table.time[-1:] + 1])
    known = [current]
    for instant in since:
        end = len(old["pair_value"]) + int(np.searchsorted(time_P, instant))
        current = _solve(pairs.newest(end), current, start_IC, fixed_IC is not None)
        known.append(current)
    content = Content(
        since=np.concatenate([[ALWAYS], since]),
        item_keys=item_keys,
        item_VIC=np.stack([k.item_IC for k in known]),
        bias_VI=np.stack([k.bias_I for k in known]),
        user_keys=user_keys,
        user_VUC=np.stack([k.user_UC for k in known]),
        mean_V=np.array([k.mean for k in known], np.float32),
        values_A=values_A,
    )
    return content, _state(current, pairs.newest(len(pairs.value_P)), item_keys, user_keys, axes_EC)


def content_of(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state among the tensors of a bundle's memory."""
    return {n.removeprefix(CONTENT): t for n, t in memory.items() if n.startswith(CONTENT)}


def action_values(spec: TableSpec) -> np.ndarray:
    """(A,) float32: what each action is worth; the value of several at once is their sum, cut to [-1, 1]."""
    value = dict.fromkeys(spec.actions, OTHER_VALUE) | dict.fromkeys(spec.negative_actions, NEGATIVE_VALUE)
    value[spec.primary_action] = 1.0
    return np.array([value[name] for name in spec.actions], np.float32)


def fold_in(
    item_BLC: Tensor, bias_BL: Tensor, types_BLA: Tensor, mask_BL: Tensor, mean_B: Tensor, values_A: Tensor
) -> tuple[Tensor, Tensor]:
    """A user's interest at this moment, by ridge regression of what the history's actions were worth on their items.

    user = (H'H + lambda I)^-1 H' r: the user half of the factorisation, for one history in place of the window. An
    empty history gives zeros. It runs in float32 whatever autocast says: a solver needs the digits.

    Args:
        item_BLC: Vectors of the history's items, zero where unknown.
        bias_BL: Their biases.
        types_BLA: 1 where the action is of that type.
        mask_BL: Which places hold an action.
        mean_B: `Content.mean_V` at each request's version.
        values_A: `Content.values_A`.

    Returns:
        The user's vector (B, C), to be multiplied with a candidate's, and the user's level (B,): how much more than
        expected of these items the actions were worth.
    """
    kind = item_BLC.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        mask = mask_BL.float()
        value_BL = (types_BLA.float() * values_A).sum(-1).clamp(-1, 1)
        rest_BL = (value_BL - mean_B[:, None] - bias_BL.float()) * mask
        level_B = rest_BL.sum(1) / (mask.sum(1) + LEVEL_PRIOR)
        rest_BL = (rest_BL - level_B[:, None]) * mask
        seen_BLC = item_BLC.float() * mask[..., None]
        gram_BCC = seen_BLC.mT @ seen_BLC + RIDGE * torch.eye(seen_BLC.shape[-1], device=seen_BLC.device)
        user_BC1 = torch.linalg.solve(gram_BCC, seen_BLC.mT @ rest_BL[..., None])
        return user_BC1[..., 0], level_B


def _solve(pairs: _Pairs, before: _Vectors, start_IC: np.ndarray, fixed: bool) -> _Vectors:
    """The next version, from the version before; items and users without an observation keep what they had."""
    items, users = len(before.item_IC), len(before.user_UC)
    if not len(pairs.value_P):
        return before
    item_n, user_n = np.bincount(pairs.item_P, minlength=items), np.bincount(pairs.user_P, minlength=users)
    mean = np.float32(pairs.value_P.mean())
    rest_P = pairs.value_P - mean
    bias_I = np.bincount(pairs.item_P, rest_P, items) / (item_n + BIAS_PRIOR)
    rest_P = rest_P - bias_I[pairs.item_P]
    level_U = np.bincount(pairs.user_P, rest_P, users) / (user_n + LEVEL_PRIOR)
    rest_P = (rest_P - level_U[pairs.user_P]).astype(np.float32)
    bias_I = np.where(item_n > 0, bias_I, before.bias_I).astype(np.float32)

    # Rows of both matrices are users; the entries of pairs that occur twice are summed.
    where = (pairs.user_P, pairs.item_P)
    count_UI = sp.csr_matrix((np.ones_like(rest_P), where), (users, items))
    rest_UI = sp.csr_matrix((rest_P, where), (users, items))
    if fixed:
        user_UC = _regress(count_UI, rest_UI, before.item_IC, before.user_UC)
        return _Vectors(before.item_IC, bias_I, user_UC, mean)
    count_IU, rest_IU = count_UI.T.tocsr(), rest_UI.T.tocsr()
    item_IC = np.where(before.item_IC.any(1, keepdims=True), before.item_IC, start_IC)
    for _ in range(SWEEPS):
        user_UC = _regress(count_UI, rest_UI, item_IC, before.user_UC)
        item_IC = _regress(count_IU, rest_IU, user_UC, before.item_IC)
    turn_CC = _rotation(item_IC, before.item_IC)
    item_IC = np.where(item_n[:, None] > 0, item_IC @ turn_CC, before.item_IC)
    return _Vectors(item_IC, bias_I, _regress(count_UI, rest_UI, item_IC, before.user_UC), mean)


def _regress(count: sp.csr_matrix, rest: sp.csr_matrix, fixed_KC: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Ridge regression of each row's residuals on the vectors of its columns; rows without any keep `before`.

    All Gram matrices come from one sparse product with the outer products of the vectors (upper triangles), so that
    the work is in compiled loops and the memory is bounded by the chunk.
    """
    width = fixed_KC.shape[1]
    upper, lower = np.triu_indices(width)
    outer_KT = fixed_KC[:, upper] * fixed_KC[:, lower]
    solved = before.copy()
    rows = np.flatnonzero(np.diff(count.indptr))
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        gram = np.empty((len(part), width, width), np.float32)
        gram[:, upper, lower] = gram[:, lower, upper] = count[part] @ outer_KT
        gram[:, np.arange(width), np.arange(width)] += RIDGE
        solved[part] = np.linalg.solve(gram, (rest[part] @ fixed_KC)[..., None])[..., 0]
    return solved


def _rotation(new_KC: np.ndarray, old_KC: np.ndarray) -> np.ndarray:
    """(C, C), orthogonal: turns new vectors onto old ones, where there are any (orthogonal Procrustes)."""
    left, _, right = np.linalg.svd(new_KC.T.astype(np.float64) @ old_KC)
    return (left @ right).astype(np.float32) if old_KC.any() else np.eye(new_KC.shape[1], dtype=np.float32)


def _own_embeddings(
    table: RankingTable,
    rows: np.ndarray,
    items: np.ndarray,
    item_keys: np.ndarray,
    known_IC: np.ndarray,
    axes_EC: np.ndarray,
) -> tuple[np.ndarray | None, np.ndarray]:
    """The data's own item embeddings, normalised and projected to C; None where the data has none.

    The principal axes are those of the first window, carried in the state: an update keeps the coordinates. A column
    whose axes are all zero is younger than they are (`model/grow.py`) and left out; where all are, vectors are learned.
    """
    columns, column = [], 0
    for feature in table.spec.of("candidate", hashed=False):
        columns += list(range(column, column + feature.width)) if feature.kind == "embedding" else []
        column += feature.width
    if not columns or (len(axes_EC) == len(columns) and not axes_EC.any()):
        return None, axes_EC
    present, first = np.unique(items, return_index=True)
    own_KE = np.nan_to_num(np.asarray(table.item_num[rows[first]][:, columns], np.float64), posinf=0.0, neginf=0.0)
    if axes_EC.shape == (len(columns), known_IC.shape[1]):
        own_KE[:, ~axes_EC.any(1)] = 0
    own_KE /= np.maximum(np.linalg.norm(own_KE, axis=1, keepdims=True), 1e-12)
    dim = known_IC.shape[1]
    if axes_EC.shape != (len(columns), dim):
        _, vectors = np.linalg.eigh(own_KE.T @ own_KE)
        axes_EC = np.zeros((len(columns), dim), np.float32)
        axes_EC[:, : min(dim, len(columns))] = vectors[:, ::-1][:, :dim]
    fixed_IC = known_IC.copy()
    fixed_IC[np.searchsorted(item_keys, present)] = own_KE @ axes_EC
    return fixed_IC, axes_EC


def _carry(old: dict[str, np.ndarray], item_keys: np.ndarray, user_keys: np.ndarray, dim: int) -> _Vectors:
    """The champion's vectors in the order of the new keys, zero for the new."""
    item_IC, user_UC = (np.zeros((len(k), dim), np.float32) for k in (item_keys, user_keys))
    bias_I = np.zeros(len(item_keys), np.float32)
    place = _remap(old["item_keys"], item_keys)
    item_IC[place], bias_I[place] = old["item"], old["bias"]
    user_UC[_remap(old["user_keys"], user_keys)] = old["user"]
    return _Vectors(item_IC, bias_I, user_UC, np.float32(old["mean"][0]))


def _state(
    last: _Vectors, pairs: _Pairs, item_keys: np.ndarray, user_keys: np.ndarray, axes_EC: np.ndarray
) -> dict[str, Tensor]:
    """What travels: an item or user is forgotten with its last carried observation, so the state has a bound."""
    item_kept, item_P = np.unique(pairs.item_P, return_inverse=True)
    user_kept, user_P = np.unique(pairs.user_P, return_inverse=True)
    arrays = {
        "item_keys": item_keys[item_kept],
        "item": last.item_IC[item_kept],
        "bias": last.bias_I[item_kept],
        "user_keys": user_keys[user_kept],
        "user": last.user_UC[user_kept],
        "mean": np.array([last.mean], np.float32),
        "axes": axes_EC.astype(np.float32),
        "pair_user": user_P.astype(np.int32),
        "pair_item": item_P.astype(np.int32),
        "pair_value": pairs.value_P,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _empty(dim: int) -> dict[str, Tensor]:
    none, numbers, vectors = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, dim), np.float32)
    nothing = _Vectors(vectors, numbers, vectors, np.float32(0))
    return _state(nothing, _Pairs(none, none, numbers), none, none, vectors)


def _remap(some_keys: np.ndarray, all_keys: np.ndarray) -> np.ndarray:
    return np.searchsorted(all_keys, some_keys)


def _column(table: RankingTable, level: Level, name: str) -> np.ndarray:
    """The hashed column of a categorical feature."""
    block = table.request_cat if level == "request" else table.item_cat
    return np.asarray(block[:, place_of(table.spec, level, name)[1]])
