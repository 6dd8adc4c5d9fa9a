"""Every threshold of the gate on its boundary."""

import pytest

from model import gate_rules as rules
from model.config import RECIPES, debug

TINY = 1e-9


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        (rules.enough, (rules.MIN_REQUESTS, rules.MIN_USERS), (rules.MIN_REQUESTS - 1, rules.MIN_USERS)),
        (rules.enough, (rules.MIN_REQUESTS, rules.MIN_USERS), (rules.MIN_REQUESTS, rules.MIN_USERS - 1)),
        (rules.above_floor, (0.0, rules.FLOOR_AUC), (-TINY, rules.FLOOR_AUC)),
        (rules.above_floor, (0.0, rules.FLOOR_AUC), (0.0, rules.FLOOR_AUC - TINY)),
        (rules.not_worse, (-rules.MARGIN + TINY,), (-rules.MARGIN,)),
        (rules.proven_worse, (-TINY,), (0.0,)),
        (rules.better, (0.02 + TINY, TINY, 0.02), (0.02, TINY, 0.02)),
        (rules.better, (0.02 + TINY, TINY, 0.02), (0.02 + TINY, 0.0, 0.02)),
        (rules.better, (0.02 + TINY, TINY, 0.02), (0.9, 0.8, None)),  # nobody knows how much seeds differ
        (rules.cheaper, (rules.CHEAPER, rules.NOT_HIGHER), (rules.CHEAPER + TINY, 0.95)),
        (rules.cheaper, (rules.NOT_HIGHER, rules.CHEAPER), (rules.CHEAPER, rules.NOT_HIGHER + TINY)),
        (rules.cheaper, (0.5, 1.0), (1.0, 1.0)),  # nothing was measured
        (rules.fresher, (True, -0.02, 0.02), (True, -0.02 - TINY, 0.02)),
        (rules.fresher, (True, 0.0, None), (True, -TINY, None)),
        (rules.fresher, (True, 0.1, 0.02), (False, 0.1, 0.02)),
        (rules.slice_worse, (rules.SLICE_ALPHA - TINY,), (rules.SLICE_ALPHA,)),
        (rules.negative_not_worse, (0.0,), (TINY,)),
        (rules.remembers, (-rules.FORGETTING_BUDGET,), (-rules.FORGETTING_BUDGET - TINY,)),
        (rules.calibrated, (rules.ECE_BUDGET + 0.02, 0.02, None), (rules.ECE_BUDGET + 0.02 + TINY, 0.02, None)),
        (rules.calibrated, (0.2 + rules.ECE_SLACK, 0.0, 0.2), (0.2 + rules.ECE_SLACK + TINY, 0.0, 0.2)),
        (rules.calibrated, (0.01, 0.0, 0.0), (float("nan"), 0.0, 0.2)),
        (rules.scores_close, (rules.PSI_LIMIT,), (rules.PSI_LIMIT + TINY,)),
        (rules.scores_close, (0.0,), (float("nan"),)),
        (rules.latency_fits, (rules.LATENCY_MS, rules.LATENCY_RATIO), (rules.LATENCY_MS + TINY, 1.0)),
        (rules.latency_fits, (rules.LATENCY_MS, rules.LATENCY_RATIO), (1.0, rules.LATENCY_RATIO + TINY)),
        (rules.memory_fits, (rules.MEMORY_BYTES, rules.MEMORY_RATIO), (rules.MEMORY_BYTES + 1, 1.0)),
        (rules.memory_fits, (rules.MEMORY_BYTES, rules.MEMORY_RATIO), (1, rules.MEMORY_RATIO + TINY)),
    ],
)
def test_rule_passes_on_one_side_of_its_boundary_and_fails_on_the_other(rule, passes, fails):
    assert rule(*passes) and not rule(*fails)


def test_deviation_between_seeds_is_known_for_the_measured_recipe_alone():
    assert rules.seed_std(RECIPES["laptop"]()) == pytest.approx(0.0086, abs=1e-4)
    assert rules.seed_std(debug()) is None
