"""The gate on trained models: gathered from bundles, as the pipeline's step does it."""

from dataclasses import replace

import pytest

from components.judge import judge_bundles
from engagement.table import Feature
from model.calibration import calibrated
from model.columns import widen_table
from model.cost import measure_cost
from model.grow import grown
from model.train import train
from tests.unit.model_synth import make, recipe

SEED = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    room = tmp_path_factory.mktemp("models")
    small = recipe(epochs=1, layers=1, rows_per_batch=300, fisher_rows=16)
    champion = train(make(200, seed=1), small, "scratch", None, 0, room / "a")
    challenger = train(make(80, seed=2, start_hour=400), small, "finetune", champion, 0, room / "b")
    later = make(160, seed=3, start_hour=700)
    return later, calibrated(challenger, later), champion


def test_gathered_evidence_has_numbers_for_every_rule(models):
    later, challenger, champion = models
    verdict = judge_bundles(later, challenger, champion, SEED)
    assert [r.rule for r in verdict.rules] == [
        "finite", "evidence", "floor", "not worse", "worth it", "slices", "hide not worse", "forgetting",
        "calibration", "scores", "latency", "memory",
    ]  # fmt: skip
    numbers = {r.rule: r.numbers for r in verdict.rules}
    assert numbers["worth it"]["newer"] == 1 and numbers["forgetting"]["requests"] > 0
    assert numbers["calibration"]["ece"] == challenger.metrics["ece_save_after"]
    assert numbers["slices"]["tested"] > 0 and numbers["latency"]["ratio"] > 0


def test_a_model_against_itself_grown_by_a_column_differs_in_nothing_and_is_not_worth_it(models):
    later, champion, _ = models
    more = replace(later.spec, features=(*later.spec.features, Feature("weather", "request", "numeric")))
    wide = widen_table(later, more)
    verdict = judge_bundles(wide, grown(champion, wide), champion, SEED)
    assert verdict.difference["save"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert verdict.verdict == "hold" and verdict.reason.startswith("neither better nor cheaper nor fresher")


def test_first_model_needs_no_champion(models):
    later, _, champion = models
    verdict = judge_bundles(later, calibrated(champion, later), None, SEED)
    assert verdict.verdict == "promote" and verdict.metrics["champion"] is None


def test_cost_is_measured_on_what_was_saved(models, tmp_path):
    later, challenger, champion = models
    for name, bundle in (("a", challenger), ("b", champion)):
        bundle.save(tmp_path / name)
    costs = measure_cost([tmp_path / "a", tmp_path / "b"], later)
    assert [c.weights for c in costs] == [(tmp_path / n / "model.safetensors").stat().st_size for n in "ab"]
    assert all(c.milliseconds > 0 and c.peak >= 0 for c in costs)
