"""Batches cut ahead: the same batches, bounded, and no thread left behind."""

import threading
import time
from contextlib import closing

import pytest
import torch

from model.data import Batcher
from model.distributed import Ranks
from model.loader import Loader, ahead
from model.train import train
from model.trainer import Trainer
from tests.unit.model_synth import make, recipe


def loaders():
    return [t for t in threading.enumerate() if t.name.startswith("loader")]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_step_comes_once_and_in_order(depth):
    assert list(ahead(lambda step: step * step, range(5, 30), depth)) == [s * s for s in range(5, 30)]
    assert list(ahead(lambda step: step, range(3, 3), depth)) == [] and not loaders()


def test_no_more_are_made_than_the_depth_allows():
    made = []
    with closing(ahead(lambda step: made.append(step), range(100), 2)) as parts:
        for _ in range(3):
            next(parts)
        time.sleep(0.05)
        assert 3 <= len(made) <= 5
    assert not loaders() and len(made) <= 5


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_in_the_loader_reaches_the_trainer_at_its_step_and_leaves_no_thread(depth):
    def broken(step):
        if step == 4:
            raise ValueError("torn column")
        return step

    seen = []
    with pytest.raises(ValueError, match="torn column"):
        for step in ahead(broken, range(100), depth):
            seen.append(step)
    assert seen == [0, 1, 2, 3] and not loaders()


@pytest.fixture
def prefetching(monkeypatch):
    """Batches cut ahead on a CPU too, as on a GPU."""
    real = Trainer.__init__

    def init(self, *arguments):
        real(self, *arguments)
        self.ahead = 2

    return lambda: monkeypatch.setattr(Trainer, "__init__", init)


def test_training_with_batches_cut_ahead_ends_in_the_same_bits_also_after_a_kill(tmp_path, prefetching):
    plain = train(make(160), recipe(), "scratch", None, 0, tmp_path / "plain")
    prefetching()

    def stop(step, steps, loss):
        assert loaders() or step > steps - 3
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(160), recipe(), "scratch", None, 0, tmp_path / "kept", stop)
    assert not loaders()
    resumed = train(make(160), recipe(), "scratch", None, 0, tmp_path / "kept")
    assert resumed.digest == plain.digest and not loaders()
    assert 0 < resumed.metrics["loader_share"] < 1 and resumed.metrics["peak_memory_mb"] > 10


def test_a_part_depends_on_seed_and_step_alone():
    table, config = make(100), recipe().train
    one, two = (Loader(Batcher(table, recipe().ranker), config, 7, Ranks()) for _ in range(2))
    first = one.part(9)
    for step in (0, 3, 12, 9):
        again = two.part(step)
    assert torch.equal(first.batch.rows, again.batch.rows) and first.share == again.share == 1.0
    assert torch.equal(first.batch.history_ids_BL, again.batch.history_ids_BL)


def test_shares_of_the_processes_make_up_the_batch():
    table, config = make(35), recipe().train
    whole = Loader(Batcher(table, recipe().ranker), config, 7, Ranks())
    parts = [Loader(Batcher(table, recipe().ranker), config, 7, Ranks(r, 2)) for r in range(2)]
    for step in range(whole.per_epoch):
        pieces, everything = [p.part(step) for p in parts], whole.part(step).batch
        counted = [p.batch for p in pieces if p.share]
        assert sum(p.share for p in pieces) == pytest.approx(1.0)
        assert torch.equal(torch.cat([b.rows for b in counted]), everything.rows)
        assert torch.equal(torch.cat([b.item_ids_NW for b in counted]), everything.item_ids_NW)
