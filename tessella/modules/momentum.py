"""The momentum encoder: a copy of modules that follows them slowly and is never trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tessella.modules.drop_path import drop_paths


class MomentumEncoder(nn.ModuleDict):
    """Copies of named modules; their parameters are moving averages, their batch statistics their own.

    Parameters are paired by name. Nothing is averaged but parameters: batch norm buffers come from what the copy
    itself sees. Stochastic depth is off in the copy.
    """

    def __init__(self, online: Mapping[str, nn.Module]) -> None:
        """Copy the modules as they are, by the names under which they can be asked for."""
        super().__init__({name: copy.deepcopy(module) for name, module in online.items()})
        self.requires_grad_(False)
        for module in drop_paths(self):
            module.drop_prob = 0.0

    @torch.no_grad()
    def ema_update(self, online: Mapping[str, nn.Module], momentum: float) -> None:
        """Move every parameter, in place: momentum * own + (1 - momentum) * online.

        Args:
            online: the modules that were copied.
            momentum: in [0, 1]; 0 copies.
        """
        own, theirs = self._pairs(online)
        torch._foreach_lerp_(own, theirs, 1 - momentum)

    @torch.no_grad()
    def reset(self, online: Mapping[str, nn.Module]) -> None:
        """Copy the parameters, in place; buffers stay."""
        own, theirs = self._pairs(online)
        torch._foreach_copy_(own, theirs)

    def _pairs(self, online: Mapping[str, nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
        own: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, module in online.items():
            parameters = dict(module.named_parameters())
            for key, parameter in self[name].named_parameters():
                own.append(parameter)
                theirs.append(parameters[key])
        return own, theirs
