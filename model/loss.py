"""Weighted multi-task cross-entropy with a label-weight matrix (TransAct's equation 1 and Table 9).

Shapes: N rows, A actions; heads and actions are the same list, so the matrix M is (A heads, A + 1 labels), its last
column for rows without any action.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from engagement.table import TableSpec
from model.config import TrainConfig


def label_weights(spec: TableSpec, config: TrainConfig) -> Tensor:
    """M for any set of actions.

    A head weighs `primary_weight` if it is the primary action's, else 1, on every row. A row with a negative action
    weighs `negative_weight` more on the primary head: who hides an item says more than who passes it by.
    """
    primary = spec.actions.index(spec.primary_action)
    heads = torch.ones(len(spec.actions))
    heads[primary] = config.primary_weight
    matrix = heads[:, None].repeat(1, len(spec.actions) + 1)
    for action in spec.negative_actions:
        matrix[primary, spec.actions.index(action)] += config.negative_weight
    return matrix


def head_weights(labels_NA: Tensor, matrix: Tensor) -> Tensor:
    """(N, A): how much each head counts on each row; the mean of M over the row's labels.

    (The paper sums over labels. On its data labels exclude each other; where they do not, a sum would make a row
    with two actions count twice.)
    """
    none_N1 = (labels_NA.sum(-1, keepdim=True) == 0).to(labels_NA.dtype)
    labels = torch.cat([labels_NA, none_N1], -1)
    return labels @ matrix.T / labels.sum(-1, keepdim=True)


def row_losses(logits_NA: Tensor, targets_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """(N,): cross-entropy summed over heads; targets may be soft."""
    entropy = F.binary_cross_entropy_with_logits(logits_NA.float(), targets_NA, reduction="none")
    return (weights_NA * entropy).sum(-1)


def task_loss(logits_NA: Tensor, labels_NA: Tensor, weight_N: Tensor, matrix: Tensor) -> Tensor:
    """The training loss: mean over rows of row weight times weighted cross-entropy."""
    return (weight_N * row_losses(logits_NA, labels_NA, head_weights(labels_NA, matrix))).mean()
