"""`python -m model`, by itself and under `torchrun`."""

import dataclasses
import json
import subprocess
import sys

import pytest

from model.bundle import Bundle
from model.config import debug, laptop
from model.optim import dense_parameters
from model.ranker import Ranker
from model.sizes import sizes_of
from tests.unit.model_synth import SPEC, make


def command(*arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    words = [sys.executable, *launcher, "-m", "model", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True)


def test_train_by_hand_then_update_under_torchrun_writes_whole_bundles(tmp_path):
    make(60).save(tmp_path / "table")
    make(60, seed=4, start_hour=500).save(tmp_path / "new")
    first = command("train", tmp_path / "table", "--recipe", "debug", "--out", tmp_path / "first")
    assert first.returncode == 0, first.stderr
    bundle = Bundle.load(tmp_path / "first")
    assert bundle.digest[:12] in first.stdout and bundle.strategy == "scratch" and bundle.recipe == debug()
    words = ["train", tmp_path / "new", "--recipe", "debug", "--strategy", "ewc+distill"]
    words += ["--parent", tmp_path / "first", "--out", tmp_path / "second", "--seed", "3"]
    second = command(*words, processes=2)
    assert second.returncode == 0, second.stderr
    update = Bundle.load(tmp_path / "second")
    assert update.parent == bundle.digest and update.seed == 3
    assert second.stdout.count(update.digest[:12]) == 1  # told once, not by every process


def test_wrong_calls_are_told_in_one_line(tmp_path):
    told = command("train", tmp_path / "nothing", "--out", tmp_path / "out")
    assert told.returncode == 1 and told.stderr.startswith("error: no readable ranking table")
    assert told.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_sizes_equal_those_of_a_real_ranker():
    config = debug().ranker
    measured = sizes_of(config, SPEC)
    ranker = Ranker(config, SPEC)
    assert measured.table == ranker.table.weight.numel()
    assert measured.dense == sum(p.numel() for p in dense_parameters(ranker).values())
    crossed = 2 * sum(
        p.numel() for part in (ranker.interaction, ranker.mlp, ranker.heads) for p in part.parameters() if p.ndim > 1
    )
    assert crossed < measured.flops < 20 * crossed


def test_sizes_of_a_ranker_larger_than_any_machine_cost_nothing():
    huge = dataclasses.replace(laptop().ranker, buckets=2**40, dim=1024)
    assert sizes_of(huge, SPEC).table == 2**40 * 512


def test_sizes_grow_with_the_recipe():
    assert sizes_of(laptop().ranker, SPEC).flops > sizes_of(debug().ranker, SPEC).flops


def test_compiled_training_has_the_loss_of_plain_training(tmp_path):
    # Captured as for the default compiler; its own differentiation and its C++ would take two minutes here.
    script = """
import functools, json, pathlib, sys, torch
from model.train import train
from tests.unit.model_synth import make, recipe

torch.compile = functools.partial(torch.compile, backend="eager")
runs = [
    train(make(60), recipe(compile=c, dropout=0.0), "scratch", None, 0, pathlib.Path(sys.argv[1]))
    for c in (False, True)
]
print(json.dumps([r.metrics["loss"] for r in runs]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, compiled = json.loads(done.stdout.splitlines()[-1])
    assert compiled == pytest.approx(plain, rel=1e-3)
