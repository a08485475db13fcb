"""The momentum encoder: a copy of modules whose weights are a moving average of theirs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
        torch._foreach_lerp_(*self._pairs(online), 1 - momentum)

    def _pairs(self, online: Mapping[str, nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of the copies and of the online modules, in the same order."""
        copies: list[Tensor] = [p for name in online for _, p in sorted(self[name].named_parameters())]
        return copies, [p for module in online.values() for _, p in sorted(module.named_parameters())]
