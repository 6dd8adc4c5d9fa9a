"""Two processes that train together go where one goes, skip together, and survive a kill."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from model.bundle import Bundle
from model.distributed import Ranks
from model.fisher import Importance
from model.ranker import Ranker
from model.train import train
from tests.unit.model_synth import make, recipe
from tests.unit.together import together

# Dropout inside layers is each process's own. Few steps: Adam makes much of rounding where a gradient is almost 0.
EXACT = {"dropout": 0.0, "user_weight_power": 0.5, "epochs": 1}
# The last batch has one request: a process without a share of its own.
FIRST, NEW = make(65), make(49, seed=4, start_hour=500)


def learn(out: Path) -> None:
    """A run from scratch and an update of it, with what every process got."""
    rank, losses = Ranks.current().rank, []
    where = out / f"rank{rank}"
    first = train(
        FIRST, recipe(**EXACT), "scratch", None, 0, out / "kept", lambda step, steps, loss: losses.append(loss)
    )
    after = train(NEW, recipe(**EXACT), "ewc+distill+replay", first, 0, out / "kept")
    first.save(where / "first")
    after.save(where / "after")
    (where / "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    assert together(2, learn, out / "two") == [0, 0]
    learn(out / "one")
    return out


def close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, two[name], equal_nan=True, **tolerance, msg=lambda told, n=name: f"{n}: {told}"
        )


@pytest.mark.parametrize("name", ["first", "after"])
def test_two_processes_end_in_the_weights_and_importance_of_one(runs, name):
    one, two = (Bundle.load(runs / d / "rank0" / name) for d in ("one", "two"))
    close(one.weights, two.weights, rtol=1e-3, atol=1e-4)
    close(one.memory, two.memory, rtol=1e-2, atol=1e-5)
    assert Importance.from_tensors(two.memory).table_UD.sum() > 0


def test_two_processes_have_the_loss_of_one_on_every_step(runs):
    one, two = (json.loads((runs / d / "rank0" / "losses.json").read_text()) for d in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-6) and len(one) == 4


def test_every_process_gets_the_same_bundle(runs):
    mine, other = (Bundle.load(runs / "two" / r / "after") for r in ("rank0", "rank1"))
    assert mine.digest == other.digest
    assert (runs / "two" / "rank0" / "losses.json").read_text() == (runs / "two" / "rank1" / "losses.json").read_text()
    assert not list((runs / "two").glob("kept/*"))


def break_one_process(out: Path) -> None:
    """The second process alone computes a loss that is not a number, twice."""
    real, calls = Ranker.forward, iter(range(10_000))

    def forward(self, batch, vectors=None, interest=None):
        logits = real(self, batch, vectors, interest)
        broken = self.training and next(calls) in (1, 4) and Ranks.current().rank == 1
        return logits * float("nan") if broken else logits

    Ranker.forward = forward
    bundle = train(make(80), recipe(), "scratch", None, 0, out / "kept")
    bundle.save(out / f"rank{Ranks.current().rank}")


def test_a_step_that_one_process_cannot_compute_is_skipped_by_all(tmp_path):
    assert together(2, break_one_process, tmp_path) == [0, 0]
    mine, other = (Bundle.load(tmp_path / r) for r in ("rank0", "rank1"))
    assert mine.metrics["skipped_steps"] == other.metrics["skipped_steps"] == 2 and mine.digest == other.digest
    assert all(torch.isfinite(t).all() for t in mine.weights.values())


def train_until(out: Path, kept: str, kill_at: int) -> None:
    def progress(step, steps, loss):
        if step == kill_at and Ranks.current().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    bundle = train(make(160), recipe(), "scratch", None, 0, out / kept, progress)
    bundle.save(out / f"{kept}{Ranks.current().rank}")


def test_two_processes_of_which_one_is_killed_resume_to_the_bits_of_an_unbroken_run(tmp_path):
    assert -signal.SIGKILL in together(2, train_until, tmp_path, "killed", 13)
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["step-000000010"]
    assert together(2, train_until, tmp_path, "killed", 0) == together(2, train_until, tmp_path, "whole", 0) == [0, 0]
    ends = [Bundle.load(tmp_path / n) for n in ("killed0", "killed1", "whole0")]
    assert len({b.digest for b in ends}) == 1


def look_elsewhere(out: Path) -> None:
    """Each process with a directory of its own; the first one has a checkpoint there."""

    def stop(step, steps, loss):
        if step == 7:
            raise KeyboardInterrupt

    rank = Ranks.current().rank
    with suppress(KeyboardInterrupt):
        train(make(160), recipe(), "scratch", None, 0, out / str(rank), stop)
    try:
        train(make(160), recipe(), "scratch", None, 0, out / str(rank))
    except EvergreenError as error:
        (out / f"told{rank}").write_text(str(error))


def test_processes_that_do_not_share_their_checkpoints_are_told(tmp_path):
    assert together(2, look_elsewhere, tmp_path) == [0, 0]
    assert all("different checkpoints" in (tmp_path / f"told{r}").read_text() for r in (0, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_shares_cover_everything_once(size, length):
    spans = [Ranks(rank, size).span(length) for rank in range(size)]
    covered = np.concatenate([np.arange(a, b) for a, b, own in spans if own])
    assert sorted(covered.tolist()) == list(range(length)) and all(a < b for a, b, _ in spans)


def first_step(out: Path) -> None:
    steps: list[int] = []
    train(make(160), recipe(), "scratch", None, 0, out, lambda step, total, loss: steps.append(step))
    (out / f"began{Ranks.current().rank}").write_text(str(steps[0]))


def test_a_run_with_another_number_of_processes_does_not_take_up_a_checkpoint(tmp_path):
    def stop(step, steps, loss):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(160), recipe(), "scratch", None, 0, tmp_path, stop)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]
    assert together(2, first_step, tmp_path) == [0, 0]
    assert [(tmp_path / f"began{r}").read_text() for r in (0, 1)] == ["1", "1"]
