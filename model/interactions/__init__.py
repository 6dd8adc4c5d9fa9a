"""Feature interactions: from the concatenated fields (N, X) to the vector (N, out_features) under the MLP and heads.

One interface, many variants: `build(sizes, widths)` makes the module that `sizes` names. No module here has batch
statistics or control flow that depends on data, so gradients per sample, export and compilation work for each.
"""

from typing import TYPE_CHECKING

from model.interactions.sizes import Sizes

if TYPE_CHECKING:
    from model.interactions.base import Interaction


def build(sizes: Sizes, widths: tuple[int, ...]) -> "Interaction":
    """The module of a variant.

    Args:
        sizes: The variant and its sizes.
        widths: Widths of the fields, in the order of their concatenation; their sum is X.
    """
    from model.interactions.modules import MODULES  # here, so that a recipe can be read without importing torch

    return MODULES[type(sizes)](sizes, widths)
