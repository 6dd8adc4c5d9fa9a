"""Content vectors: what they learn, that they learn it from the past alone, and how updates go on from a champion."""

import dataclasses
from pathlib import Path

import model_synth as synth
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from engagement.errors import EvergreenError
from engagement.table import MISSING, RankingTable
from model import content

SPEC = dataclasses.replace(synth.SPEC, features=tuple(f for f in synth.SPEC.features if f.kind != "embedding"))
DIM, VERSIONS, SEED = 6, 5, 3


def world(**sizes) -> RankingTable:
    """The synthetic world without item embeddings of its own."""
    table = synth.make(**{"requests": 2000, "users": 100, "items": 60} | sizes)
    return dataclasses.replace(table, spec=SPEC, item_num=table.item_num[:, :1])


@pytest.fixture(scope="module")
def learned() -> content.Content:
    return content.learn(world(), DIM, VERSIONS, SEED)[0]


def categories(c: content.Content) -> np.ndarray:
    """The hidden category of each item of a learned world."""
    category = np.random.default_rng(99).integers(0, synth.CATEGORIES, 60)
    keys = synth.hashed("item_id", np.arange(60))
    return category[np.argsort(keys)][np.searchsorted(np.sort(keys), c.item_keys)]


def folded(c: content.Content, items: np.ndarray, action: int, mask: np.ndarray | None = None) -> np.ndarray:
    """(I,): what a user who did one action on some items (indices) would think of every item, by the final version."""
    final, types = c.final(), torch.zeros(1, len(items), 3)
    types[..., action] = 1
    user, _ = content.fold_in(
        torch.from_numpy(final.item_VIC[:, items]),
        torch.from_numpy(final.bias_VI[:, items]),
        types,
        torch.ones(1, len(items), dtype=torch.bool) if mask is None else torch.from_numpy(mask[None]),
        torch.from_numpy(final.mean_V),
        torch.from_numpy(final.values_A),
    )
    return final.item_VIC[0] @ user[0].numpy()


def same(a: content.Content, b: content.Content) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_a_user_never_seen_is_placed_by_mixed_actions_on_few_items(learned: content.Content) -> None:
    category = categories(learned)
    for wanted in range(synth.CATEGORIES):
        liked, other = np.flatnonzero(category == wanted)[:3], np.flatnonzero(category != wanted)[:3]
        opinion = folded(learned, liked, 0) + folded(learned, other, 2)
        rest = np.setdiff1d(np.arange(len(category)), [*liked, *other])
        mine = category[rest] == wanted
        assert opinion[rest][mine].mean() > opinion[rest][~mine].mean() + 0.05


def test_a_hidden_item_pushes_its_like_away(learned: content.Content) -> None:
    category = categories(learned)
    for wanted in range(synth.CATEGORIES):
        mine = category == wanted
        opinion = folded(learned, np.flatnonzero(mine)[:4], 2)
        assert opinion[mine].mean() < opinion[~mine].mean()


def test_the_batch_user_vector_knows_the_users_category(learned: content.Content) -> None:
    likes_by_user = np.random.default_rng(99)
    likes_by_user.integers(0, synth.CATEGORIES, 60), likes_by_user.normal(size=60)
    likes = likes_by_user.integers(0, synth.CATEGORIES, 100)
    place = np.searchsorted(learned.user_keys, synth.hashed("user_id", np.arange(100)))
    opinion = learned.user_VUC[-1][place] @ learned.item_VIC[-1].T
    by_category = np.stack([opinion[:, categories(learned) == k].mean(1) for k in range(synth.CATEGORIES)], 1)
    assert (by_category.argmax(1) == likes).mean() > 0.8


@pytest.mark.parametrize("block", [1, 3])
def test_no_version_sees_the_requests_that_it_serves_or_later_ones(learned: content.Content, block: int) -> None:
    table = world()
    later = table.time[table.request_of_row] >= learned.since[block]
    turned = dataclasses.replace(table, labels=np.where(later[:, None], 1 - table.labels, table.labels))
    other = content.learn(turned, DIM, VERSIONS, SEED)[0]
    for name in ("item_VIC", "bias_VI", "user_VUC", "mean_V"):
        mine, theirs = getattr(learned, name), getattr(other, name)
        assert np.array_equal(mine[: block + 1], theirs[: block + 1])
        assert not np.array_equal(mine[block + 1], theirs[block + 1])


def test_versions_hold_for_equal_numbers_of_requests_and_the_last_for_what_follows(learned: content.Content) -> None:
    time = world().time
    version = np.searchsorted(learned.since, time, side="right") - 1
    assert np.bincount(version).tolist() == [len(time) // VERSIONS] * VERSIONS
    assert learned.since[-1] == time[-1] + 1
    assert not learned.item_VIC[0].any() and not learned.user_VUC[0].any() and not learned.bias_VI[0].any()
    final = learned.final()
    assert np.array_equal(final.item_VIC[0], learned.item_VIC[-1])
    assert np.searchsorted(final.since, 0, side="right") == 1


def test_equal_inputs_give_equal_bits_and_another_seed_other_vectors(learned: content.Content) -> None:
    assert same(learned, content.learn(world(), DIM, VERSIONS, SEED)[0])
    assert not same(learned, content.learn(world(), DIM, VERSIONS, SEED + 1)[0])


def test_a_memory_mapped_table_gives_the_same_vectors(learned: content.Content, tmp_path: Path) -> None:
    world().save(tmp_path)
    assert same(learned, content.learn(RankingTable.load(tmp_path), DIM, VERSIONS, SEED)[0])


def test_successive_versions_keep_their_coordinates(learned: content.Content) -> None:
    for before, after in zip(learned.item_VIC[2:-1], learned.item_VIC[3:], strict=True):
        lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        assert np.average((before * after).sum(1) / lengths, weights=lengths) > 0.8


def test_a_turned_copy_is_turned_back() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(size=(40, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    np.testing.assert_allclose(old @ turn @ content._rotation(old @ turn, old), old, atol=1e-5)


def test_chunked_regressions_equal_one_ridge_regression_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_CHUNK", 4)
    rng = np.random.default_rng(1)
    rows, columns = rng.integers(0, 9, 60), rng.integers(0, 12, 60)  # row 9 has none; some pairs occur twice
    value, vectors = rng.normal(size=60).astype(np.float32), rng.normal(size=(12, 3)).astype(np.float32)
    before = np.full((10, 3), 7, np.float32)
    count, rest = (sp.csr_matrix((x, (rows, columns)), (10, 12)) for x in (np.ones(60, np.float32), value))
    solved = content._regress(count, rest, vectors, before)
    for row in range(9):
        x, y = vectors[columns[rows == row]], value[rows == row]
        naive = np.linalg.inv(x.T @ x + content.RIDGE * np.eye(3)) @ x.T @ y
        np.testing.assert_allclose(solved[row], naive, atol=1e-5)
    assert (solved[9] == 7).all()


def test_fold_in_equals_a_loop_and_ignores_what_padding_holds() -> None:
    g = torch.Generator().manual_seed(0)
    item, bias, mean = torch.randn(4, 7, 3, generator=g), torch.randn(4, 7, generator=g), torch.randn(4, generator=g)
    types, values = (torch.rand(4, 7, 2, generator=g) > 0.4).float(), torch.tensor([1.0, -0.5])
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None]
    user, level = content.fold_in(item, bias, types, mask, mean, values)
    for b in range(4):
        n = int(mask[b].sum())
        rest = (types[b, :n] @ values).clamp(-1, 1) - mean[b] - bias[b, :n]
        lifted = rest.sum() / (n + content.LEVEL_PRIOR)
        h = item[b, :n]
        naive = torch.linalg.inv(h.T @ h + content.RIDGE * torch.eye(3)) @ h.T @ (rest - lifted)
        torch.testing.assert_close(user[b], naive)
        torch.testing.assert_close(level[b], lifted)
    assert not user[3].any() and level[3] == 0
    item[~mask], bias[~mask], types[~mask] = 1e6, -1e6, 1.0
    again = content.fold_in(item, bias, types, mask, mean, values)
    assert torch.equal(again[0], user) and torch.equal(again[1], level)


def test_fold_in_keeps_its_digits_under_autocast_and_works_per_sample_and_exported() -> None:
    g = torch.Generator().manual_seed(0)
    item, bias, types = torch.randn(4, 7, 3, generator=g), torch.randn(4, 7, generator=g), torch.ones(4, 7, 2)
    arguments = (item, bias, types, torch.ones(4, 7, dtype=torch.bool), torch.zeros(4), torch.tensor([0.3, 0.2]))
    user, level = content.fold_in(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(content.fold_in(*arguments)[0], user)

    class Exported(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return content.fold_in(*inputs)

    torch.testing.assert_close(torch.export.export(Exported(), arguments).module()(*arguments), (user, level))

    def score(weight: torch.Tensor, *one: torch.Tensor) -> torch.Tensor:
        found, _ = content.fold_in(weight * one[0][None], *(x[None] for x in one[1:]), arguments[-1])
        return found.square().sum()

    per_sample = torch.vmap(torch.func.grad(score), (None, 0, 0, 0, 0, 0))(torch.tensor(1.0), *arguments[:-1])
    for b in range(4):
        one = torch.func.grad(score)(torch.tensor(1.0), *(x[b] for x in arguments[:-1]))
        torch.testing.assert_close(per_sample[b], one)


def test_an_update_starts_from_the_champion_and_learns_as_if_it_had_seen_all(learned: content.Content) -> None:
    table = world()
    half = table.requests // 2
    first, state = content.learn(table.select(np.arange(half)), DIM, VERSIONS, SEED)
    update, _ = content.learn(table.select(np.arange(half, table.requests)), DIM, VERSIONS, SEED, state)
    place = np.searchsorted(update.item_keys, first.item_keys)
    assert np.array_equal(update.item_VIC[0][place], first.item_VIC[-1])
    assert np.array_equal(update.user_VUC[0][np.searchsorted(update.user_keys, first.user_keys)], first.user_VUC[-1])
    assert np.array_equal(update.bias_VI[0][place], first.bias_VI[-1])
    assert np.array_equal(update.item_keys, learned.item_keys)
    assert np.array_equal(update.user_keys, learned.user_keys)
    mine, whole = (c.user_VUC[-1] @ c.item_VIC[-1].T for c in (update, learned))
    assert np.corrcoef(mine.ravel(), whole.ravel())[0, 1] > 0.8
    np.testing.assert_allclose(update.bias_VI[-1], learned.bias_VI[-1], atol=1e-6)


def test_the_carried_state_has_a_bound_and_forgets_who_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "PAIRS", 50)
    table = world(requests=300)
    _, state = content.learn(table, DIM, VERSIONS, SEED)
    assert len(state["pair_value"]) == len(state["pair_user"]) == len(state["pair_item"]) == 50
    users, items = table.request_cat[table.request_of_row[-50:], 0], table.item_cat[-50:, 0]
    assert np.array_equal(state["user_keys"].numpy()[state["pair_user"].numpy()], users)
    assert np.array_equal(state["item_keys"].numpy()[state["pair_item"].numpy()], items)
    assert set(state["user_keys"].tolist()) == set(users.tolist())
    assert state["item"].shape == (len(set(items.tolist())), DIM)


def test_a_missing_user_or_item_is_nobody() -> None:
    table = world(requests=200)
    users, items = table.request_cat.copy(), table.item_cat.copy()
    users[::3], items[::4, 0] = MISSING, MISSING
    c, state = content.learn(dataclasses.replace(table, request_cat=users, item_cat=items), DIM, VERSIONS, SEED)
    assert MISSING not in c.user_keys and MISSING not in c.item_keys
    assert len(state["pair_value"]) == ((users[table.request_of_row, 0] != 0) & (items[:, 0] != 0)).sum()


def test_a_window_smaller_than_the_versions_still_learns() -> None:
    table = world(requests=3)
    c, _ = content.learn(table, DIM, 8, SEED)
    assert len(c.since) == 9 and (c.since[1:] >= c.since[:-1]).all()
    assert c.item_VIC[-1].any() and np.isfinite(c.item_VIC).all()


def test_a_champion_of_another_width_is_refused() -> None:
    _, state = content.learn(world(requests=50), DIM, VERSIONS, SEED)
    with pytest.raises(EvergreenError, match="width 6, not 7"):
        content.learn(world(requests=50), DIM + 1, VERSIONS, SEED, state)


def test_the_datas_own_embeddings_are_used_and_an_update_projects_them_alike() -> None:
    table = synth.make(requests=400)
    c, state = content.learn(table, 12, VERSIONS, SEED)
    _, first = np.unique(table.item_cat[:, 0], return_index=True)
    own = table.item_num[first, 1:]
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    for version in c.item_VIC:  # twelve axes of twelve numbers lose nothing
        np.testing.assert_allclose(version @ version.T, own @ own.T, atol=1e-4)
    assert not c.user_VUC[0].any() and c.user_VUC[-1].any()
    narrow, state = content.learn(table, 3, VERSIONS, SEED)
    update, _ = content.learn(table, 3, VERSIONS, SEED, state)
    np.testing.assert_allclose(update.item_VIC[-1], narrow.item_VIC[-1], atol=1e-6)


def test_values_of_actions_come_from_what_the_spec_calls_them() -> None:
    assert content.action_values(SPEC).tolist() == pytest.approx([1.0, content.OTHER_VALUE, content.NEGATIVE_VALUE])
