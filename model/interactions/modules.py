"""Which module computes which variant."""

from collections.abc import Callable
from typing import Any

from model.interactions import crosses, masknet, sizes, towers
from model.interactions.base import Interaction

MODULES: dict[type[sizes.Sizes], Callable[[Any, tuple[int, ...]], Interaction]] = {
    sizes.ParallelMaskNetDCN: masknet.ParallelMaskNetDCN,
    sizes.StackedDCN: crosses.StackedDCN,
    sizes.ParallelDCN: crosses.ParallelDCN,
    sizes.LowRankDCN: crosses.LowRankDCN,
    sizes.Transformer: towers.Transformer,
    sizes.FinalMLP: towers.FinalMLP,
    sizes.GDCN: crosses.GDCN,
    sizes.SDCNv3: crosses.SDCNv3,
    sizes.DeepLight: towers.DeepLight,
    sizes.DHEN: masknet.DHEN,
}
