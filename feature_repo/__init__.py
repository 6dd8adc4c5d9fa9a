"""Feast: entities, sources, views, the feature service, the offline store."""

import sys
from types import ModuleType


def _torch_on_demand() -> None:
    """Keep Feast from importing PyTorch, two of its seven seconds, before somebody hands it a tensor."""

    def get_torch() -> ModuleType:
        import torch

        return torch

    wrapper = ModuleType("feast.torch_wrapper")
    wrapper.get_torch = get_torch  # type: ignore[attr-defined]
    sys.modules.setdefault(wrapper.__name__, wrapper)


_torch_on_demand()
