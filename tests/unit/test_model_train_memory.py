"""The batch that fits a device: chosen by trials, refused where nothing fits."""

import dataclasses

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from model.data import Batcher
from model.distributed import Ranks
from model.memory import LIMIT, TARGET, choose_batch, used
from model.trainer import Trainer, reproducible
from model.weights import row_weights
from tests.unit.model_synth import make, recipe

MB, CPU = 2**20, torch.device("cpu")


class Cost:
    """A device's peak by batch size; remembers what was tried."""

    def __init__(self, fixed, each, power=1.0):
        self.fixed, self.each, self.power, self.tried = fixed, each, power, []

    def __call__(self, requests):
        self.tried.append(requests)
        return int(self.fixed + self.each * requests**self.power)


@pytest.mark.parametrize("fixed", [0, 100 * MB, 500 * MB])
@pytest.mark.parametrize("each", [MB // 7, MB, 37 * MB])
def test_chosen_batch_fills_most_of_the_target_and_no_more(fixed, each):
    cost, total = Cost(fixed, each), 1000 * MB
    size = choose_batch(cost, total, most=100_000)
    assert cost(size) <= TARGET * total
    assert cost(int(size * 1.3) + 1) > TARGET * total
    assert len(cost.tried) < 8 and max(cost.tried[:-1]) <= size * 1.1 + 8  # no trial far above what fits


def test_a_size_that_fits_is_taken_as_it_was_asked_for():
    assert choose_batch(Cost(MB, MB), 1000 * MB, most=77) == 77
    assert choose_batch(Cost(MB, MB), 1000 * MB, most=1) == 1


def test_a_cost_that_grows_faster_than_its_trials_say_still_ends_within_the_target():
    cost = Cost(10 * MB, MB, power=1.5)
    assert cost(choose_batch(cost, 1000 * MB, most=10_000)) <= TARGET * 1000 * MB


def test_small_differences_between_measurements_choose_the_same():
    assert (
        len({choose_batch(Cost(100 * MB + noise, MB), 1000 * MB, 10_000) for noise in range(0, 2 * MB, MB // 4)}) == 1
    )


def test_a_run_that_would_pass_the_limit_is_refused_in_one_line():
    with pytest.raises(
        EvergreenError, match="needs 751 MB for one request, more than 75% of the device's 1,000 MB"
    ) as e:
        choose_batch(Cost(750 * MB, MB), 1000 * MB, most=16)
    assert "\n" not in str(e.value) and e.value.remedy
    between = Cost((TARGET + LIMIT) / 2 * 1000 * MB, 0)
    assert choose_batch(between, 1000 * MB, most=16) == 1  # above the target, within the limit: as small as can be


@pytest.fixture
def trainer():
    large, table = recipe(history=64, attended=64, ffn=64, rows_per_batch=5000), make(1500, users=5, size=40)
    with reproducible(1):
        yield Trainer(table.spec, large, 0, Batcher(table, large.ranker), None, CPU, Ranks())


def test_real_steps_choose_a_batch_whose_peak_is_near_the_target(trainer):
    alone, many = trainer.peak_of(1), trainer.peak_of(64)
    assert many > alone + 20 * MB  # it does measure the step
    # A device on which 64 requests are the target.
    size = trainer.fit_batch(int(many / TARGET))
    per_request = trainer.batcher.table.rows / trainer.batcher.table.requests
    assert 16 <= size / per_request <= 128 and trainer.config.rows_per_batch == size


def test_trials_train_nothing(trainer):
    before = {k: v.clone() for k, v in trainer.ranker.state_dict().items()}
    trainer.peak_of(8)
    assert all(torch.equal(v, before[k]) for k, v in trainer.ranker.state_dict().items())
    assert all(p.grad is None for p in trainer.ranker.parameters()) and not trainer.dense_optimizer.state


def test_memory_in_use_counts_what_is_held_and_forgets_what_is_freed():
    before = used(CPU)
    held = torch.ones(64 * MB)  # 256 MB
    assert used(CPU) > before + 250 * MB
    del held
    assert used(CPU) < before + 50 * MB


def test_weights_of_rows_do_not_grow_with_rows():
    table, weighted = make(400), recipe(user_weight_power=0.5).train
    twice = table.select(np.repeat(np.arange(400), 2))
    one, two = row_weights(table, weighted), row_weights(twice, weighted)
    for field in (f.name for f in dataclasses.fields(one) if f.name != "table"):
        value = getattr(two, field)
        assert getattr(value, "nbytes", 0) == getattr(getattr(one, field), "nbytes", 0)
