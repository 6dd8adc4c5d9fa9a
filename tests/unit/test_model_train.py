"""Training: it learns, it is a function of its inputs, it survives kills, broken numbers and bad calls."""

import dataclasses
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from model.hashing import rows_of
from model.metrics import hit3, hits, random_hit3
from model.predict import score
from model.ranker import Ranker
from model.tensors import pack
from model.train import train
from tests.unit.model_synth import SPEC, make, recipe


def equal(one, two):
    return pack(one) == pack(two)  # bit for bit: a missing number, NaN, is as good as another


def test_training_beats_a_random_order_and_the_popularity_of_items_by_far(tmp_path):
    bundle = train(make(1500, seed=1), recipe(epochs=3), "scratch", None, 0, tmp_path)
    table = make(400, seed=2, start_hour=3000)
    measured = hits(table, score(bundle, table))
    popular = hit3(hits(table, np.nan_to_num(table.item_num[:, 0])))["save"]
    assert hit3(measured)["save"] > 1.3 * random_hit3(measured)["save"]
    assert hit3(measured)["save"] > 1.1 * popular
    assert hit3(measured)["hide"] < random_hit3(measured)["hide"]


def test_equal_inputs_give_equal_bits_and_another_seed_other_ones(tmp_path):
    one, two, other = (train(make(80), recipe(), "scratch", None, seed, tmp_path) for seed in (0, 0, 1))
    assert one.digest == two.digest and equal(one.weights, two.weights) and equal(one.memory, two.memory)
    assert not torch.equal(one.weights["heads.weight"], other.weights["heads.weight"])


def test_training_leaves_the_random_state_and_threads_of_the_process_alone(tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(make(30), recipe(threads=threads + 1), "scratch", None, 0, tmp_path)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


KILLED = """
import os, pathlib, signal, sys
from model.tensors import pack
from model.hashing import rows_of
from model.train import train
from tests.unit.model_synth import make, recipe
def progress(step, steps, loss):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
train(make(168), recipe(), "scratch", None, 0, pathlib.Path(sys.argv[1]), progress)
"""


def test_run_killed_by_kill_9_again_and_again_ends_in_the_bits_of_an_unbroken_run(tmp_path):
    kept = tmp_path / "killed"
    # 20 steps in two epochs, a checkpoint every 5: killed before the first, in the first epoch, in the second
    # (whose embeddings were drawn anew), and right at its start.
    for step in (3, 8, 11, 17):
        run = subprocess.run([sys.executable, "-c", KILLED, str(kept), str(step)], capture_output=True)
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert [p.name for p in kept.iterdir()] == ["step-000000015"]
    steps = []
    resumed = train(make(168), recipe(), "scratch", None, 0, kept, lambda step, total, loss: steps.append(step))
    unbroken = train(make(168), recipe(), "scratch", None, 0, tmp_path / "unbroken")
    assert steps == [16, 17, 18, 19, 20]
    assert resumed.digest == unbroken.digest and equal(resumed.weights, unbroken.weights)
    assert resumed.metrics["loss"] == unbroken.metrics["loss"] and not list(kept.iterdir())


def test_update_resumes_to_the_same_bits(tmp_path):
    champion = train(make(80), recipe(), "scratch", None, 0, tmp_path / "a")

    class Stop(Exception):
        pass

    def stop(step, steps, loss):
        if step == 7:
            raise Stop

    window = make(160, seed=4, start_hour=500)
    arguments = (window, recipe(), "ewc+distill+replay", champion, 0)
    with pytest.raises(Stop):
        train(*arguments, tmp_path / "b", stop)
    assert len(list((tmp_path / "b").iterdir())) == 1
    assert train(*arguments, tmp_path / "b").digest == train(*arguments, tmp_path / "c").digest


def test_checkpoints_of_another_run_are_not_taken_up(tmp_path):
    def stop(step, steps, loss):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(168), recipe(), "scratch", None, 1, tmp_path / "a", stop)
    here, fresh = (train(make(168), recipe(), "scratch", None, 0, tmp_path / d) for d in "ab")
    assert here.digest == fresh.digest


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_to_about_the_same_loss(tmp_path, precision):
    full, half = (train(make(200), recipe(precision=p), "scratch", None, 0, tmp_path) for p in ("auto", precision))
    assert half.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.02)
    assert not torch.equal(full.weights["heads.weight"], half.weights["heads.weight"])
    assert all(torch.isfinite(t).all() for t in half.weights.values())


def test_overflow_in_half_precision_lowers_the_scale_and_is_no_fault(tmp_path):
    # GradScaler begins at 65,536; with a loss 1,000 times as large its first gradients overflow float16.
    large = recipe(precision="fp16", primary_weight=2000.0, max_skipped_steps=0)
    bundle = train(make(200), large, "scratch", None, 0, tmp_path)
    assert bundle.metrics["skipped_steps"] == 0 and all(torch.isfinite(t).all() for t in bundle.weights.values())
    assert len(bundle.memory["table.rows"]) > 20  # it did train


def test_half_precision_resumes_to_the_same_bits(tmp_path):
    def stop(step, steps, loss):
        if step == 13:
            raise KeyboardInterrupt

    half = recipe(precision="fp16", primary_weight=2000.0)  # the scale has moved by then
    with pytest.raises(KeyboardInterrupt):
        train(make(168), half, "scratch", None, 0, tmp_path / "a", stop)
    one, two = (train(make(168), half, "scratch", None, 0, tmp_path / d) for d in "ab")
    assert one.digest == two.digest


def test_missing_and_infinite_features_are_survived(tmp_path):
    table = make(80)
    numbers = table.item_num.copy()
    numbers[::3] = np.nan
    numbers[1::7, 0] = np.inf
    requests = np.full_like(table.request_num, np.nan)
    broken = dataclasses.replace(table, item_num=numbers, request_num=requests)
    bundle = train(broken, recipe(), "scratch", None, 0, tmp_path)
    assert bundle.metrics["skipped_steps"] == 0 and np.isfinite(score(bundle, broken)).all()


def poison(monkeypatch, steps):
    real, calls = Ranker.forward, iter(range(10_000))

    def forward(self, batch, vectors=None, interest=None):
        logits = real(self, batch, vectors, interest)
        return logits * float("nan") if self.training and next(calls) in steps else logits

    monkeypatch.setattr(Ranker, "forward", forward)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 4})
    bundle = train(make(80), recipe(), "scratch", None, 0, tmp_path)
    assert bundle.metrics["skipped_steps"] == 2
    assert all(torch.isfinite(t).all() for t in bundle.weights.values())


def test_too_many_of_them_end_training_without_a_poisoned_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, range(6, 10_000))
    with pytest.raises(EvergreenError, match="diverged: 4 steps"):
        train(make(168), recipe(max_skipped_steps=3), "scratch", None, 0, tmp_path)
    from safetensors.torch import load_file

    state = load_file(next(tmp_path.glob("step-*")) / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values())


def test_only_rows_that_training_looked_up_differ_from_their_start(tmp_path):
    table = make(40)
    bundle = train(table, recipe(), "scratch", None, 0, tmp_path)
    ids = np.concatenate([table.request_cat.ravel(), table.item_cat.ravel(), table.history_item])
    used = set(rows_of(torch.from_numpy(ids), 4096).flatten().tolist())
    assert set(bundle.weights["table.rows"].tolist()) <= used


@pytest.mark.parametrize(
    ("table", "strategy", "problem"),
    [
        (make(10).select(np.array([], np.int64)), "scratch", "empty"),
        (make(10), "magic", "no strategy 'magic'"),
        (dataclasses.replace(make(10), labels=np.zeros_like(make(10).labels)), "scratch", "action 'save'"),
        (dataclasses.replace(make(10), labels=make(10).labels * 7), "scratch", "other than 0 and 1"),
    ],
)
def test_wrong_calls_are_told_in_one_line(tmp_path, table, strategy, problem):
    with pytest.raises(EvergreenError, match=problem) as told:
        train(table, recipe(), strategy, None, 0, tmp_path)
    assert "\n" not in str(told.value) and told.value.remedy


def test_update_of_a_champion_with_other_features_or_sizes_is_refused(tmp_path):
    champion = train(make(20), recipe(), "scratch", None, 0, tmp_path)
    with pytest.raises(EvergreenError, match="other sizes"):
        train(make(20), recipe(dim=4), "finetune", champion, 0, tmp_path)
    fewer = dataclasses.replace(SPEC, actions=("save", "click", "skip"), negative_actions=())
    with pytest.raises(EvergreenError, match="other features or actions"):
        train(make(20, spec=fewer), recipe(), "finetune", champion, 0, tmp_path)
    train(make(20, spec=fewer), recipe(), "scratch", champion, 0, tmp_path)
