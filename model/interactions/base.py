"""What every interaction is, and parts that several of them use.

Shapes: N rows, X width of the input.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

FIELD_EPS = 0.01
"""Added to the variance of a field. Ids with little data have short embeddings on purpose (`layers.LEARNED_EPS`); with
the usual 1e-5 a field norm would blow them up to the size of a well-known id's."""


class Interaction(nn.Module):
    """(N, X) -> (N, out_features)."""

    out_features: int

    def __call__(self, x_NX: Tensor) -> Tensor:
        """`nn.Module.__call__`, with its type."""
        return super().__call__(x_NX)


class FieldNorm(nn.Module):
    """LayerNorm of every field by itself, with one gain and bias an element.

    Neighbouring fields of one width are normalised in one call.

    An update can bring elements into an old field (a new numeric column: all numbers of a level are one field). Mean
    and variance stay those of the elements that `founding` marks, or the old ones would move; see `model/grow.py`.
    """

    founding: Tensor

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.runs = [(len(list(same)), width, True) for width, same in itertools.groupby(widths)]
        self.weight = nn.Parameter(torch.ones(sum(widths)))
        self.bias = nn.Parameter(torch.zeros(sum(widths)))
        self.register_buffer("founding", torch.ones(sum(widths), dtype=torch.bool))
        self.register_load_state_dict_post_hook(lambda norm, keys: norm._plan())

    def _plan(self) -> None:
        """Runs of neighbouring fields: (fields, width, whether all their elements are founding ones)."""
        whole = [bool(part.all()) for part in self.founding.split(self.widths)]
        fields = zip(self.widths, whole, range(len(whole)), strict=True)
        # A grown field is a run alone: the third key tells it from its neighbours.
        runs = itertools.groupby(fields, lambda field: (*field[:2], -1 if field[1] else field[2]))
        self.runs = [(len(list(same)), width, all_found) for (width, all_found, _), same in runs]

    def part(self, chosen: Sequence[bool]) -> "FieldNorm":
        """The same of some of the fields, for inference."""
        part = FieldNorm(tuple(itertools.compress(self.widths, chosen)))
        columns = torch.tensor(chosen).repeat_interleave(torch.tensor(self.widths))
        part.load_state_dict({name: value[columns] for name, value in self.state_dict().items()})
        return part

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, X)."""
        sizes = [count * width for count, width, _ in self.runs]
        parts = zip(x_NX.split(sizes, -1), self.founding.split(sizes), self.runs, strict=True)
        normed = [
            functional.layer_norm(part.unflatten(-1, run[:2]), run[1:2], eps=FIELD_EPS).flatten(-2)
            if run[2]
            else _norm_by(part, founding)
            for part, founding, run in parts
        ]
        return torch.cat(normed, -1) * self.weight + self.bias


def _norm_by(x_NE: Tensor, founding_E: Tensor) -> Tensor:
    """Layer norm of one field with the mean and variance of some of its elements."""
    share_E = founding_E / founding_E.sum()
    gap_NE = x_NE - (x_NE * share_E).sum(-1, keepdim=True)
    return gap_NE * torch.rsqrt((gap_NE.square() * share_E).sum(-1, keepdim=True) + FIELD_EPS)
