"""Scores do not depend on anything but the request: not on its company, its order, nor on ids never seen."""

import dataclasses

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.table import Feature, TableSpec
from model.hashing import rows_of
from model.predict import score
from model.train import train
from tests.unit.model_synth import SPEC, hashed, make, recipe


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return train(make(200), recipe(), "scratch", None, 0, tmp_path_factory.mktemp("c"))


def test_scores_are_probabilities_of_every_action(bundle):
    table = make(50, seed=5)
    scores = score(bundle, table)
    assert scores.shape == (table.rows, 3) and scores.dtype == np.float32
    assert (scores > 0).all() and (scores < 1).all() and scores[:, 0].std() > 0.01


@pytest.mark.parametrize("batch_rows", [1, 7, 10_000])
def test_company_in_a_batch_changes_no_score(bundle, batch_rows):
    table = make(60, seed=5)
    np.testing.assert_allclose(score(bundle, table, batch_rows), score(bundle, table), atol=1e-6)


def test_a_request_scores_the_same_alone_and_among_others(bundle):
    table = make(60, seed=5)
    together = score(bundle, table)
    for r in (0, 13, 59):
        alone = score(bundle, table.select(np.array([r])))
        np.testing.assert_allclose(alone, together[table.offsets[r] : table.offsets[r + 1]], atol=1e-6)


def test_order_of_candidates_only_permutes_the_scores(bundle):
    table = make(1, size=8, seed=8)
    turned = np.arange(table.rows)[::-1]
    columns = {n: getattr(table, n)[turned] for n in ("item_id", "item_cat", "item_num", "labels", "sampled")}
    np.testing.assert_allclose(
        score(bundle, dataclasses.replace(table, **columns)), score(bundle, table)[turned], atol=1e-6
    )


def test_scoring_twice_gives_the_same_bits(bundle):
    table = make(60, seed=5)
    assert (score(bundle, table) == score(bundle, table)).all()


def test_labels_cannot_leak_into_scores(bundle):
    table = make(60, seed=5)
    assert (score(bundle, dataclasses.replace(table, labels=1 - table.labels)) == score(bundle, table)).all()


def test_ids_never_seen_score_as_their_fallback_whatever_they_are(bundle):
    table, scores, new = make(40, seed=5), [], []
    known = torch.zeros(bundle.recipe.ranker.buckets, dtype=torch.bool)
    known[bundle.weights["table.rows"]] = True
    for name in ("new", "newer"):
        cat = table.item_cat.copy()
        cat[:, 0] = hashed("item_id", [f"{name}{i}" for i in range(table.rows)])
        new.append(~known[rows_of(torch.from_numpy(cat[:, 0]), len(known))].all(-1).numpy())
        scores.append(score(bundle, dataclasses.replace(table, item_cat=cat)))
    both = new[0] & new[1]
    assert both.mean() > 0.9
    np.testing.assert_allclose(scores[0][both], scores[1][both], atol=1e-6)
    missing = table.item_cat.copy()
    missing[:, 0] = 0
    assert np.abs(score(bundle, dataclasses.replace(table, item_cat=missing)) - scores[0]).max() > 1e-4


def test_broken_numbers_are_survived(bundle):
    table = make(40, seed=5)
    for value in (np.nan, np.inf, -np.inf):
        broken = dataclasses.replace(table, item_num=np.full_like(table.item_num, value))
        assert np.isfinite(score(bundle, broken)).all()


def test_users_without_history_and_requests_without_candidates_are_scored(bundle):
    table = make(20, seed=5)
    fresh = dataclasses.replace(table, history_end=table.history_start)
    assert np.isfinite(score(bundle, fresh)).all()
    assert score(bundle, table.select(np.array([], np.int64))).shape == (0, 3)


def test_other_features_are_refused_with_a_clear_line(bundle):
    other = TableSpec(tuple(f for f in SPEC.features if f.name != "topics"), SPEC.actions, "save", ("hide",))
    with pytest.raises(EvergreenError, match="other features.*'topics' vanished"):
        score(bundle, dataclasses.replace(make(5), spec=other))


def test_features_without_the_item_id_are_refused(tmp_path):
    spec = dataclasses.replace(SPEC, features=tuple(f for f in SPEC.features if f.name != "item_id"))
    table = make(20)
    table = dataclasses.replace(table, spec=spec, item_cat=table.item_cat[:, 1:])
    with pytest.raises(EvergreenError, match="item_id"):
        train(table, recipe(), "scratch", None, 0, tmp_path)


def test_ids_of_user_and_item_alone_are_enough(tmp_path):
    ids = (Feature("user_id", "request", "categorical"), Feature("item_id", "candidate", "categorical"))
    spec = TableSpec(ids, ("save", "click", "hide"), "save", ("hide",))
    table = make(60)
    blocks = {"request_num": (60, 0), "item_num": (table.rows, 0)}
    empty = {n: np.zeros(s, getattr(table, n).dtype) for n, s in blocks.items()}
    bare = dataclasses.replace(table, spec=spec, item_cat=table.item_cat[:, :1], **empty)
    assert np.isfinite(score(train(bare, recipe(), "scratch", None, 0, tmp_path), bare)).all()
