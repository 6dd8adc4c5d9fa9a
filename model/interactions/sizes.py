"""Sizes of the feature-interaction variants: what a recipe says about them. No torch here: the command line reads it.

X is the width of the input vector, a concatenation of fields.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from engagement.errors import EvergreenError


@dataclass(frozen=True)
class ParallelMaskNetDCN:
    """Pinterest's final architecture (arXiv 2412.01985, figure 2b): parallel MaskNet under stacked DCNv2; the default.

    Attributes:
        blocks: MaskNet blocks side by side.
        ratio: Hidden width of a block's mask, in multiples of X ("projection ratio").
        width: Outputs of a block, and of their projection, which the crosses work on.
        crosses: Stacked full-rank DCNv2 layers on the projection.
    """

    name: ClassVar[str] = "parallel_masknet_dcn"
    blocks: int = 3
    ratio: float = 2.0
    width: int = 512
    crosses: int = 4


@dataclass(frozen=True)
class StackedDCN:
    """Stacked full-rank DCNv2 (arXiv 2008.13535), the baseline of arXiv 2412.01985.

    Attributes:
        crosses: Layers.
        concat: Give [x0; xL], as the baseline does, and not xL alone.
    """

    name: ClassVar[str] = "stacked_dcn"
    crosses: int = 4
    concat: bool = True


@dataclass(frozen=True)
class ParallelDCN:
    """Several DCNv2 stacks over the same input, concatenated (arXiv 2412.01985, table 1).

    Attributes:
        stacks: Stacks side by side.
        crosses: Layers of each.
    """

    name: ClassVar[str] = "parallel_dcn"
    stacks: int = 2
    crosses: int = 4


@dataclass(frozen=True)
class LowRankDCN:
    """Low-rank DCNv2 with a ReLU between the two factors (arXiv 2008.13535; the ReLU: arXiv 2412.01985, table 1).

    Attributes:
        crosses: Layers.
        rank: Width between the factors.
    """

    name: ClassVar[str] = "lowrank_dcn"
    crosses: int = 4
    rank: int = 64


@dataclass(frozen=True)
class Transformer:
    """A transformer over tokens that are cut from the input (tried in arXiv 2412.01985 with C=4, U=4).

    The text of that paper at hand does not define C and U. They are read here as C tokens, each a projection of the
    whole input, and a feed-forward part U times as wide as a token.

    Attributes:
        tokens: C.
        width: Of one token; a multiple of `heads`.
        multiplier: U.
        layers: Pre-norm encoder layers; more than two did not fit the memory in the paper.
        heads: Attention heads.
    """

    name: ClassVar[str] = "transformer"
    tokens: int = 4
    width: int = 64
    multiplier: int = 4
    layers: int = 2
    heads: int = 2

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise EvergreenError(
                f"tokens of width {self.width} do not split into {self.heads} heads", "Choose a multiple"
            )


@dataclass(frozen=True)
class FinalMLP:
    """Two gated MLP streams that meet in a bilinear form (arXiv 2304.00902).

    Attributes:
        hidden: Hidden widths of each stream; the last is a multiple of `heads`.
        gate: Hidden width of a stream's feature gate.
        heads: k, chunks of the bilinear form; more chunks are cheaper.
        outputs: Of the bilinear form. The paper has one, the logit; here the action heads come later.
    """

    name: ClassVar[str] = "final_mlp"
    hidden: tuple[int, ...] = (128, 128)
    gate: int = 64
    heads: int = 8
    outputs: int = 64

    def __post_init__(self) -> None:
        if not self.hidden or self.hidden[-1] % self.heads:
            raise EvergreenError(f"streams of {self.hidden} do not split into {self.heads} heads", "Choose a multiple")


@dataclass(frozen=True)
class GDCN:
    """Stacked DCNv2 layers behind gates (arXiv 2311.04635).

    Attributes:
        crosses: Layers.
    """

    name: ClassVar[str] = "gdcn"
    crosses: int = 4


@dataclass(frozen=True)
class SDCNv3:
    """Shallow (linear) and deep (exponential) crosses side by side, with self-masks (arXiv 2407.13349).

    Attributes:
        shallow: Layers whose order grows by one.
        deep: Layers whose order doubles.
    """

    name: ClassVar[str] = "sdcn_v3"
    shallow: int = 4
    deep: int = 4


@dataclass(frozen=True)
class DeepLight:
    """Field-weighted factorisation machine beside an MLP: DeepFwFM (arXiv 2002.06987).

    Attributes:
        width: Of one field's vector; fields are as unequal as their data, so each is projected to it.
        maps: Field-pair matrices. The paper has one, for one logit; here the action heads choose among several.
        hidden: Hidden widths of the MLP.
    """

    name: ClassVar[str] = "deeplight"
    width: int = 16
    maps: int = 8
    hidden: tuple[int, ...] = (128, 128)


@dataclass(frozen=True)
class DHEN:
    """Layers that each ensemble a DCNv2 cross and parallel MaskNet (arXiv 2203.11014).

    Attributes:
        layers: Ensemble layers.
        blocks: MaskNet blocks side by side in each layer.
        ratio: Hidden width of a block's mask, in multiples of the layer's input.
        width: Outputs of a layer.
    """

    name: ClassVar[str] = "dhen"
    layers: int = 2
    blocks: int = 3
    ratio: float = 2.0
    width: int = 512


Sizes = (
    ParallelMaskNetDCN
    | StackedDCN
    | ParallelDCN
    | LowRankDCN
    | Transformer
    | FinalMLP
    | GDCN
    | SDCNv3
    | DeepLight
    | DHEN
)

SIZES: dict[str, type[Sizes]] = {
    sizes.name: sizes
    for sizes in (
        ParallelMaskNetDCN,
        StackedDCN,
        ParallelDCN,
        LowRankDCN,
        Transformer,
        FinalMLP,
        GDCN,
        SDCNv3,
        DeepLight,
        DHEN,
    )
}


def to_json(sizes: Sizes) -> dict[str, Any]:
    """A JSON form that `from_json` reads back."""
    return {"name": sizes.name, **asdict(sizes)}


def from_json(data: dict[str, Any]) -> Sizes:
    """The inverse of `to_json`.

    Raises:
        EvergreenError: There is no variant of that name, or it has other sizes.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "name"}
    try:
        return SIZES[data["name"]](**values)
    except (KeyError, TypeError) as error:
        raise EvergreenError(
            f"{data} names no feature interaction ({error})", f"Choose one of {', '.join(SIZES)} and its own sizes"
        ) from error
