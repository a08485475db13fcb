"""The momentum encoder: a copy of modules whose weights are a moving average of theirs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from tessella.modules.drop_path import drop_paths


class MomentumEncoder(nn.ModuleDict):
    """Copies of named modules. Parameters are moving averages; batch norm buffers come from the copy's own input.

    Stochastic depth is off in the copy.
    """

    def __init__(self, online: Mapping[str, nn.Module]) -> None:
        """Copy the modules; `self[name]` is the copy."""
        super().__init__({name: copy.deepcopy(module) for name, module in online.items()})
        self.requires_grad_(False)
        for module in drop_paths(self):
            module.drop_prob = 0.0

    @torch.no_grad()
    def ema_update(self, online: Mapping[str, nn.Module], momentum: float) -> None:
        """Set every parameter to momentum * copy + (1 - momentum) * online; momentum in [0, 1], 0 copies."""
        copies, originals = (
            [p for name in online for _, p in sorted(modules[name].named_parameters())] for modules in (self, online)
        )
        torch._foreach_lerp_(copies, originals, 1 - momentum)  # type: ignore[arg-type]
