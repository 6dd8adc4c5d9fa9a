"""Bundles and checkpoints on disk: round trips, damage, kills in the middle of a write."""

import contextlib
import dataclasses
import json

import pytest
import torch

from engagement.errors import EvergreenError
from model import files
from model.bundle import CARD, FORMAT, MEMORY, WEIGHTS, Bundle
from model.checkpoint import Checkpoints
from model.predict import score
from model.train import train
from tests.unit.model_synth import make, recipe


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return train(make(60), recipe(), "scratch", None, 0, tmp_path_factory.mktemp("c")).with_metrics(hit3=1.5)


def test_bundle_survives_a_round_trip(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    back = Bundle.load(tmp_path / "b")
    assert back.digest == bundle.digest and back.metrics == bundle.metrics
    for field in dataclasses.fields(Bundle):
        if field.name not in ("weights", "memory"):
            assert getattr(back, field.name) == getattr(bundle, field.name)
    table = make(20, seed=3)
    assert (score(back, table) == score(bundle, table)).all()


def test_saving_twice_keeps_what_was_put_beside_it(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    (tmp_path / "b" / "reference.parquet").write_bytes(b"x")
    bundle.save(tmp_path / "b")
    assert (tmp_path / "b" / "reference.parquet").exists() and Bundle.load(tmp_path / "b").digest == bundle.digest


def test_digest_follows_weights_and_lineage_but_not_metrics(bundle):
    assert bundle.with_metrics(seconds=9.0).digest == bundle.digest
    other = {**bundle.weights, "heads.bias": bundle.weights["heads.bias"] + 1e-6}
    assert dataclasses.replace(bundle, weights=other).digest != bundle.digest
    assert dataclasses.replace(bundle, seed=1).digest != bundle.digest


def test_only_seen_rows_of_the_table_are_stored(bundle):
    rows = bundle.weights["table.rows"]
    half = bundle.recipe.ranker.dim // 2
    assert 120 < len(rows) < 400 and bundle.weights["table.values"].shape == (len(rows), half)
    assert "table.weight" not in bundle.weights and 0 not in rows


@pytest.mark.parametrize("name", [WEIGHTS, MEMORY, CARD])
def test_missing_file_is_told(bundle, tmp_path, name):
    bundle.save(tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(EvergreenError, match=name):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize("name", [WEIGHTS, MEMORY, CARD])
def test_one_changed_byte_is_noticed(bundle, tmp_path, name):
    bundle.save(tmp_path / "b")
    data = bytearray((tmp_path / "b" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b" / name).write_bytes(bytes(data))
    with pytest.raises(EvergreenError):
        Bundle.load(tmp_path / "b")


def test_edited_lineage_is_noticed(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    card = json.loads((tmp_path / "b" / CARD).read_text())
    (tmp_path / "b" / CARD).write_text(json.dumps(card | {"train_rows": 1}))
    with pytest.raises(EvergreenError, match="damaged"):
        Bundle.load(tmp_path / "b")


def test_weights_of_other_sizes_are_refused(bundle):
    with pytest.raises(EvergreenError, match="do not fit"):
        dataclasses.replace(bundle, recipe=recipe(hidden=(5,))).ranker()


def test_directory_is_old_or_new_or_absent_whatever_move_fails(tmp_path, monkeypatch):
    target, real = tmp_path / "d", type(tmp_path).replace
    for failing in (1, 2):
        files.write_directory(target, {"a": b"old", "b": b"old"})
        moves = []

        def replace(self, to, moves=moves, failing=failing):
            moves.append(to)
            if len(moves) == failing:
                raise KeyboardInterrupt
            return real(self, to)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(type(tmp_path), "replace", replace)
            files.write_directory(target, {"a": b"new", "b": b"new"})
        assert len(moves) == failing
        assert not target.exists() or {p.read_bytes() for p in target.iterdir()} == {b"old"}
    (tmp_path / ".d.999999.new").mkdir()  # left by another process
    files.write_directory(target, {"a": b"new", "b": b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert {p.read_bytes() for p in target.iterdir()} == {b"new"}


def test_newest_whole_checkpoint_of_this_run_is_taken(tmp_path):
    kept = Checkpoints(tmp_path, "mine")
    assert kept.latest() is None
    kept.save(5, {"w": torch.ones(2)}, {"n": 1})
    kept.save(10, {"w": torch.zeros(2)}, {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000010"]
    step, tensors, counters = kept.latest()
    assert step == 10 and tensors["w"].tolist() == [0, 0] and counters == {"n": 2}
    assert Checkpoints(tmp_path, "other").latest() is None


def test_damaged_checkpoint_is_passed_over(tmp_path):
    Checkpoints(tmp_path, "mine").save(5, {"w": torch.ones(2)}, {})
    later = tmp_path / "step-000000009"
    later.mkdir()
    assert Checkpoints(tmp_path, "mine").latest()[0] == 5
    (tmp_path / "step-000000005" / "state.safetensors").write_bytes(b"cut")
    assert Checkpoints(tmp_path, "mine").latest() is None


def test_clearing_removes_half_written_checkpoints_and_nothing_else(tmp_path):
    kept = Checkpoints(tmp_path, "mine")
    kept.save(5, {"w": torch.ones(2)}, {})
    (tmp_path / ".step-000000007.123.new").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    kept.clear()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_model_of_another_format_is_told_apart_from_a_damaged_one(bundle, tmp_path, monkeypatch):
    bundle.save(tmp_path / "b")
    monkeypatch.setattr("model.bundle.FORMAT", FORMAT + 1)
    with pytest.raises(EvergreenError, match="format") as e:
        Bundle.load(tmp_path / "b")
    assert "fresh home" in e.value.remedy
