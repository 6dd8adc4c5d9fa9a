"""The study's bookkeeping: what is measured again, what is counted, and one real training."""

import json
import time
from dataclasses import replace

import pytest

import model.ranker
from benchmarks.ranker.study import STUDIES, Job, hyper_parameters, results_of, table_of, train_and_score
from benchmarks.ranker.variants import FULL, PATCHES
from model.config import debug
from tests.unit.model_synth import make

RECIPE = debug()


def job(name="a", seed=0, recipe=RECIPE):
    return Job("movielens", "tuning", name, seed, recipe)


def good(hit3, **changes):
    found = {"diverged": False, "skipped_steps": 0, "hit3": hit3, "auc": 0.7, "ms_per_1k": 50.0}
    return {**found, "train_rows_per_s": 9000.0, "parameters": 1234, "peak_mb": 500.0, **changes}


def counting():
    ran = []

    def run(job):
        ran.append((job.name, job.seed))
        return good(1.0 + job.seed)

    return ran, run


def test_a_study_that_was_killed_in_the_middle_of_a_line_runs_only_what_is_missing(tmp_path):
    cache, jobs = tmp_path / "c.jsonl", [job(seed=n) for n in range(3)]
    results_of(jobs, cache, "code", 2, counting()[1])
    lines = cache.read_text().splitlines(keepends=True)
    lost = json.loads(lines[2])["key"][3]
    cache.write_text("".join(lines[:2]) + lines[2][:25])
    ran, run = counting()
    results = results_of(jobs, cache, "code", 2, run)
    assert ran == [("a", lost)]
    assert [r["hit3"] for r in results["a"]] == [1.0, 2.0, 3.0]
    ran, run = counting()
    results_of(jobs, cache, "code", 2, run)
    assert ran == []


def test_other_code_and_another_recipe_under_the_same_name_are_measured_again(tmp_path):
    cache = tmp_path / "c.jsonl"
    results_of([job()], cache, "code", 1, counting()[1])
    for code, recipe in (("newer", RECIPE), ("code", replace(RECIPE, train=replace(RECIPE.train, lr=0.1)))):
        ran, run = counting()
        results_of([job(recipe=recipe)], cache, code, 1, run)
        assert ran == [("a", 0)]


def test_a_failed_training_stops_the_study_and_keeps_what_was_done(tmp_path):
    ran, cache = [], tmp_path / "c.jsonl"

    def run(job):
        ran.append(job.seed)
        if job.seed == 1:
            raise RuntimeError("no memory")
        time.sleep(0.05 * (job.seed > 1))  # as a training would take its time while the failure is noticed
        return good(1.0)

    with pytest.raises(RuntimeError, match="no memory"):
        results_of([job(seed=n) for n in range(30)], cache, "code", 1, run)
    assert len(ran) < 30
    assert len(cache.read_text().splitlines()) >= 1


def test_diverged_runs_are_counted_and_have_no_part_in_the_means():
    recipes = {"base": RECIPE, "wild": RECIPE, "dead": RECIPE}
    lines = table_of(
        recipes,
        {
            "base": [good(1.0), good(1.2)],
            "wild": [good(1.21, skipped_steps=2), {"diverged": True}],
            "dead": [{"diverged": True}],
        },
    )
    base, wild, dead = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert base[1:3] == ["1.1000 ± 0.1414", "+0.00 %"]
    assert wild[1:3] == ["1.2100", "+10.00 %"] and wild[-1] == "1 of 2 (2)"
    assert dead[1] == "–" and dead[-1] == "1 of 1 (0)"
    assert len(base) == len(wild) == len(dead) == lines[0].count("|") - 1


def test_a_hyper_parameter_more_is_counted():
    longer = replace(RECIPE, ranker=replace(RECIPE.ranker, hidden=(32, 16)))
    assert hyper_parameters(longer) == hyper_parameters(RECIPE) + 1


@pytest.mark.parametrize("study", STUDIES)
def test_the_variants_have_names_and_differ(study):
    recipes = STUDIES[study]()
    assert len({(r.digest(), name if name in PATCHES else "") for name, r in recipes.items()}) == len(recipes) >= 10


@pytest.mark.parametrize("patch", [name for name in PATCHES if name != FULL])
def test_each_ablation_trains_and_changes_the_scores(patch, monkeypatch):
    for name in ("TransAct", "ContentVectors"):
        monkeypatch.setattr(model.ranker, name, getattr(model.ranker, name))  # put back afterwards
    table = make(requests=160)
    before, after = table.between(0, int(table.time[120])), table.between(int(table.time[120]), 2**62)
    whole = train_and_score(before, after, FULL, 0, RECIPE.to_json())
    without = train_and_score(before, after, patch, 0, RECIPE.to_json())
    assert not without["diverged"] and without["auc"] != whole["auc"]


def test_one_training_gives_every_column_of_the_table():
    table = make(requests=240)
    cut = int(table.time[170])
    result = train_and_score(table.between(0, cut), table.between(cut, 2**62), FULL, 0, RECIPE.to_json())
    assert not result["diverged"] and 0.0 < result["auc"] < 1.0
    assert set(good(1.0)) - {"peak_mb"} == set(result)
