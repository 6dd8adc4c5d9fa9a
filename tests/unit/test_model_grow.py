"""New feature columns: a grown champion scores as before, learns what is new, and nothing else may change."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.table import Feature, TableSpec
from model.columns import changes, narrowed, widen_table
from model.fisher import Importance
from model.grow import grown
from model.interactions import sizes
from model.metrics import hit3, hits
from model.predict import logits, score
from model.train import train
from tests.unit.model_synth import SPEC, hashed, make, recipe

NEW = (
    Feature("country", "request", "categorical"),
    Feature("user_age", "request", "numeric"),
    Feature("style", "candidate", "categories", width=2),
    Feature("length", "candidate", "numeric"),
    Feature("hint", "candidate", "numeric"),
    Feature("picture", "candidate", "embedding", width=5),
)
SIZES = {
    "parallel_masknet_dcn": sizes.ParallelMaskNetDCN(blocks=2, ratio=0.5, width=32, crosses=2),
    "stacked_dcn": sizes.StackedDCN(crosses=2, concat=True),
    "parallel_dcn": sizes.ParallelDCN(stacks=2, crosses=2),
    "lowrank_dcn": sizes.LowRankDCN(crosses=2, rank=8),
    "transformer": sizes.Transformer(tokens=2, width=16, multiplier=2, layers=1, heads=2),
    "final_mlp": sizes.FinalMLP(hidden=(16, 16), gate=8, heads=2, outputs=8),
    "gdcn": sizes.GDCN(crosses=2),
    "sdcn_v3": sizes.SDCNv3(shallow=2, deep=2),
    "deeplight": sizes.DeepLight(width=8, maps=3, hidden=(16,)),
    "dhen": sizes.DHEN(layers=2, blocks=2, ratio=0.5, width=16),
}


def spec_with(*added: Feature, without: tuple[str, ...] = ()) -> TableSpec:
    """SPEC with features put among those of their level, as a declaration does it: not at the end of the table."""
    features = [f for f in SPEC.features if f.name not in without]
    for feature in added:
        features.insert(1 if feature.level == "request" else len(features) - 1, feature)
    return dataclasses.replace(SPEC, features=tuple(features))


def filled(table, spec, seed=0):
    """The table with the new columns of `spec`: noise, but `hint` tells which candidates were saved."""
    rng, wide = np.random.default_rng(seed), widen_table(table, spec)
    saved = table.labels[:, 0].astype(np.float32)
    blocks = {n: getattr(wide, n) for n in ("request_cat", "request_num", "item_cat", "item_num")}
    for feature in set(spec.features) - set(table.spec.features):
        side = "request" if feature.level == "request" else "item"
        block = blocks[f"{side}_cat" if feature.hashed else f"{side}_num"]
        at = 0
        for other in spec.of(feature.level, feature.hashed):
            if other.name == feature.name:
                break
            at += other.width
        values = rng.normal(size=(len(block), feature.width)) * 3 + 7
        if feature.hashed:
            values = hashed(feature.name, rng.integers(0, 5, block.shape[0] * feature.width)).reshape(-1, feature.width)
        elif feature.name == "hint":
            values = (saved + 0.3 * rng.normal(size=len(saved)))[:, None]
        block[:, at : at + feature.width] = values
    return wide


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    return train(make(150, seed=1), recipe(), "scratch", None, 0, tmp_path_factory.mktemp("champion"))


@pytest.fixture(scope="module")
def window():
    return filled(make(120, seed=2, start_hour=400), spec_with(*NEW))


def test_added_features_are_named_in_the_order_of_the_new_table():
    assert [f.name for f in changes(SPEC, spec_with(*NEW[:3]))] == ["user_age", "country", "style"]
    assert changes(SPEC, SPEC) == ()


@pytest.mark.parametrize(
    ("spec", "told", "untold"),
    [
        (spec_with(without=("topics", "content")), "'topics', 'content' vanished$", "item_rate"),
        (spec_with(NEW[3], without=("item_rate",)), "'item_rate' vanished while 'length' came", "topics"),
        (
            dataclasses.replace(
                SPEC,
                features=tuple(dataclasses.replace(f, width=4 if f.width == 3 else f.width) for f in SPEC.features),
            ),
            "the width of 'topics' was 3 and is 4$",
            "content",
        ),
        (
            spec_with(Feature("item_rate", "candidate", "numeric", transform="log1p"), without=("item_rate",)),
            "the transform of 'item_rate' was none and is log1p$",
            "topics",
        ),
        (
            spec_with(Feature("user_saves", "candidate", "numeric"), without=("user_saves",)),
            "the level of 'user_saves' was request and is candidate$",
            "topics",
        ),
        (
            spec_with(Feature("topics", "candidate", "categorical"), without=("topics",)),
            "the kind of 'topics' was categories and is categorical",
            "content",
        ),
        (
            dataclasses.replace(SPEC, actions=("save", "hide")),
            "actions was save, click, hide and is save, hide$",
            "topics",
        ),
        (dataclasses.replace(SPEC, negative_actions=()), "negative_actions was hide and is none$", "topics"),
        (dataclasses.replace(SPEC, features=SPEC.features[::-1]), "another order$", "topics"),
    ],
)
def test_any_other_change_is_refused_by_name_in_one_line(spec, told, untold):
    with pytest.raises(EvergreenError) as error:
        changes(SPEC, spec)
    assert re.search(told, error.value.problem)
    assert untold not in error.value.problem and "\n" not in str(error.value)
    assert "--strategy scratch" in error.value.remedy


def test_old_table_widens_to_nothing_in_the_new_columns_and_narrows_back_to_itself():
    old, spec = make(20), spec_with(*NEW)
    wide = widen_table(old, spec)
    assert wide.item_cat.shape == (old.rows, 6) and wide.item_num.shape == (old.rows, 1 + 2 + 5 + 12)
    assert np.isnan(wide.request_num[:, :1]).all() and (wide.request_cat[:, 1] == 0).all()
    again = narrowed(filled(old, spec), SPEC)
    for field in dataclasses.fields(old):
        one, two = getattr(old, field.name), getattr(again, field.name)
        assert np.array_equal(one, two, equal_nan=field.name.endswith("num")) if field.name != "spec" else one == two
    assert widen_table(old, SPEC) is old and narrowed(old, SPEC) is old


def test_older_model_scores_a_table_with_more_columns_as_if_it_had_only_its_own(champion, window):
    assert np.array_equal(score(champion, window), score(champion, narrowed(window, SPEC)))


def test_newer_model_refuses_a_table_without_its_columns(champion, window):
    with pytest.raises(EvergreenError, match="'hint', 'picture' vanished"):
        score(grown(champion, window), narrowed(window, SPEC))


@pytest.mark.parametrize("name", [n for n in SIZES if n != "sdcn_v3"])
def test_grown_model_scores_as_the_champion_did_with_any_values_in_the_new_columns(tmp_path, name, window):
    first = train(make(60, seed=1), recipe(interaction=SIZES[name], epochs=1), "scratch", None, 0, tmp_path)
    model = grown(first, window)
    assert np.abs(logits(model, window) - logits(first, window)).max() < 1e-5
    model = grown(first, filled(make(60, seed=3), spec_with(NEW[2])))  # no numbers, an odd number of fields
    assert np.abs(logits(model, narrowed(window, model.spec)) - logits(first, window)).max() < 1e-5


def test_sdcn_v3_cannot_keep_its_scores_but_grows_to_a_finite_model_that_trains(tmp_path, window):
    few = recipe(interaction=SIZES["sdcn_v3"], epochs=1)
    first = train(make(60, seed=1), few, "scratch", None, 0, tmp_path)
    assert np.isfinite(logits(grown(first, window), window)).all()
    assert np.isfinite(score(train(window, few, "finetune", first, 0, tmp_path), window)).all()


def test_model_grows_again_and_again_and_survives_being_saved(champion, window, tmp_path):
    once = grown(champion, narrowed(window, spec_with(NEW[1], NEW[3])))
    twice = grown(once, window)
    twice.save(tmp_path)
    again = type(twice).load(tmp_path)
    assert again.digest == twice.digest
    assert np.abs(logits(again, window) - logits(champion, window)).max() < 1e-5
    norm = again.weights["interaction.masks.norm.founding"]
    assert int((~norm).sum()) == 3 + 6  # value, place and gap of one number of the request and of two candidates'


def test_growing_is_the_same_each_time_leaves_the_champion_alone_and_does_nothing_without_new_columns(champion, window):
    before = champion.digest
    assert grown(champion, window).digest == grown(champion, window).digest != before
    assert dataclasses.replace(champion).digest == before
    assert grown(champion, narrowed(window, SPEC)) is champion


def test_what_an_update_needs_of_the_champion_carries_over(champion, window):
    model, old = grown(champion, window), Importance.from_tensors(champion.memory)
    new = Importance.from_tensors(model.memory)
    assert new.dense.keys() == dict(model.ranker().named_parameters()).keys() - {"table.weight"}
    for name, values in new.dense.items():
        assert values.shape == model.weights[name].shape
    for part in ("project", "fallback", "masks", "heads", "sequence"):  # every number of it, and zeros
        one, two = (sum(float(v.sum()) for k, v in i.dense.items() if part in k) for i in (old, new))
        assert one == pytest.approx(two, rel=1e-4) and one > 0
    assert int((new.dense["hashed.request.fallback"] > 0).any(1).sum()) == 1
    for name in ("table.rows", "table.sums", "fisher.rows", "fisher.table", "content.item"):
        assert torch.equal(model.memory[name], champion.memory[name])
    axes = model.memory["content.axes"]
    assert axes.shape == (17, 4) and not axes[:5].any() and torch.equal(axes[5:], champion.memory["content.axes"])


def test_statistics_of_new_numbers_are_those_of_the_window_and_old_ones_stay(champion, window):
    weights = grown(champion, window).weights
    mean, knots = weights["numeric.candidate.norm.mean"], weights["numeric.candidate.norm.knots"]
    assert torch.equal(mean[0], champion.weights["numeric.candidate.norm.mean"][0])
    assert mean[1].item() == pytest.approx(window.item_num[:, 1].mean(), rel=1e-4)
    assert torch.equal(knots[0], champion.weights["numeric.candidate.norm.knots"][0]) and knots[1:].any(1).all()


def test_number_without_a_value_so_far_is_fitted_on_the_first_window_that_has_one(champion, window):
    wide = spec_with(NEW[4])
    silent = grown(champion, widen_table(make(30, seed=2), wide))
    assert grown(silent, widen_table(make(30, seed=3), wide)) is silent
    speaking = filled(make(30, seed=3), wide)
    model = grown(silent, speaking)
    assert model.weights["numeric.candidate.norm.std"][1].item() == pytest.approx(
        speaking.item_num[:, 1].std(), rel=1e-3
    )
    assert model.weights["numeric.candidate.norm.sometimes_missing"][1] == 1
    assert np.abs(logits(model, speaking) - logits(champion, speaking)).max() < 1e-5


@pytest.mark.parametrize("strategy", ["finetune", "ewc+distill"])
def test_update_uses_what_the_new_column_tells(champion, tmp_path, strategy):
    spec = spec_with(NEW[4], NEW[0])
    table = filled(make(300, seed=2, start_hour=400), spec)
    later = filled(make(150, seed=3, start_hour=1000), spec, seed=1)
    updated = train(table, recipe(), strategy, champion, 0, tmp_path)
    before, after = (hit3(hits(later, score(model, later)))["save"] for model in (champion, updated))
    assert after > before + 0.1
    assert updated.parent == champion.digest and updated.spec == spec
    assert "fisher.dense.heads.weight" in updated.memory


def test_update_leaves_old_rows_of_the_table_alone_that_it_did_not_look_up(champion, tmp_path):
    table = filled(make(20, seed=2, start_hour=400), spec_with(NEW[0]))
    updated = train(table, recipe(), "finetune", champion, 0, tmp_path)
    old = dict(zip(champion.weights["table.rows"].tolist(), champion.weights["table.values"], strict=True))
    new = dict(zip(updated.weights["table.rows"].tolist(), updated.weights["table.values"], strict=True))
    same = [torch.equal(value, new[row]) for row, value in old.items()]
    assert 0.2 < np.mean(same) < 1


def test_first_embedding_of_the_items_leaves_the_learned_content_vectors_in_their_space(tmp_path):
    without = spec_with(without=("content",))
    narrow = dataclasses.replace(make(200, seed=1), spec=without)
    narrow = dataclasses.replace(narrow, item_num=narrow.item_num[:, :1])
    first = train(narrow, recipe(epochs=1), "scratch", None, 0, tmp_path)
    updated = train(make(40, seed=2, start_hour=400), recipe(), "finetune", first, 0, tmp_path)
    before, after = (torch.nn.functional.normalize(m.memory["content.item"], dim=1) for m in (first, updated))
    assert (before * after).sum(1).median() > 0.9


def test_update_with_a_vanished_column_is_refused_and_scratch_is_not(champion, tmp_path):
    fewer = spec_with(without=("item_rate",))
    table = dataclasses.replace(make(30), spec=fewer, item_num=make(30).item_num[:, 1:])
    with pytest.raises(EvergreenError, match="'item_rate' vanished"):
        train(table, recipe(), "finetune", champion, 0, tmp_path)
    assert train(table, recipe(epochs=1), "scratch", champion, 0, tmp_path).spec == fewer
