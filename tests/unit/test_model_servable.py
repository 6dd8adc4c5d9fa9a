"""What is arranged for the export computes what the trained modules do, whatever their weights."""

import dataclasses

import pytest
import torch

from engagement.table import Feature
from model.fields import Numeric
from model.interactions.masknet import ParallelMaskNet
from model.servable import ServableMasks, ServableNumbers, ServableSequence
from model.transact import TransAct


def shaken(module):
    """Every weight drawn anew, of either sign, gains of norms too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0.2, 0.7)
    return module.eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_sequence_with_full_short_and_no_histories(layers):
    transact = shaken(TransAct(6, 4, layers, 5, 3, 7, 0.0))
    action_BLH, cand_BCZ = torch.randn(4, 8, 6), torch.randn(4, 5, 4)
    mask_BL = torch.arange(8) < torch.tensor([8, 2, 0, 1])[:, None]
    rows = torch.arange(4).repeat_interleave(5)
    with torch.no_grad():
        expected_NS = transact(action_BLH, cand_BCZ.flatten(0, 1), mask_BL, rows)
        found_BCS = ServableSequence(transact)(action_BLH, cand_BCZ, mask_BL)
    torch.testing.assert_close(found_BCS.flatten(0, 1), expected_NS, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("of_request", [[True, False, True, False], [False, True, True, True]])
def test_masks_of_fields_of_request_and_candidate_in_any_order(of_request):
    widths = (4, 4, 3, 5)
    masks = shaken(ParallelMaskNet(widths, blocks=2, ratio=0.5, width=6))
    masks.norm.founding[3] = False  # a field that grew
    masks.norm._plan()
    whose = [given for given, width in zip(of_request, widths, strict=True) for _ in range(width)]
    x_BCX = torch.randn(2, 3, sum(widths))
    x_BCX[..., whose] = x_BCX[:, :1, whose]
    with torch.no_grad():
        expected_NY = masks(x_BCX.flatten(0, 1))
        found_NY = ServableMasks(masks, of_request)(x_BCX[:, 0, whose], x_BCX[..., [not own for own in whose]])
    torch.testing.assert_close(found_NY, expected_NY, atol=1e-4, rtol=1e-4)


def test_numbers_with_missing_and_extreme_ones_and_an_embedding():
    number, more = Feature("a", "candidate", "numeric"), Feature("b", "candidate", "numeric")
    numeric = Numeric((number, dataclasses.replace(number, name="e", kind="embedding", width=3), more), 2)
    knots_FK = torch.randn(2, numeric.norm.KNOTS).sort(-1).values
    knots_FK[1, 4:] = knots_FK[1, 4]  # quantiles that are equal
    numeric.norm.fit(torch.randn(2), torch.tensor([0.5, 3.0]), torch.tensor([1.0, 0.0]), knots_FK)
    x_BCF = torch.randn(2, 9, 5)
    x_BCF[0, 0], x_BCF[0, 1], x_BCF[0, 2] = torch.nan, torch.inf, 1e30
    with torch.no_grad():
        torch.testing.assert_close(ServableNumbers(numeric)(x_BCF), numeric(x_BCF), atol=1e-6, rtol=1e-5)
