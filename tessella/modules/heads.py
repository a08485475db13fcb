"""Heads on top of a backbone."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Linear, optional batch norm, ReLU, Linear; then unit length.

    From `dim_in` features through `hidden` values to an embedding of `dim_out`. SwAV has the batch norm, JigClu not.
    """

    def __init__(self, dim_in: int, hidden: int, dim_out: int, norm: bool) -> None:
        middle = [nn.BatchNorm1d(hidden)] if norm else []
        super().__init__(nn.Linear(dim_in, hidden), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """(n, dim_in) -> (n, dim_out) float32, rows of unit length."""
        return F.normalize(super().forward(x).float(), dim=1)


class Prototypes(nn.Linear):
    """K learned unit vectors; scores are cosine similarities. No bias: it would shift the softmax but not the codes."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(dim, count, bias=False)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Scale every prototype back to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


def mlp(*widths: int, norm_last: bool) -> nn.Sequential:
    """Linear layers of these widths with batch norm and ReLU between them; not normalised to unit length.

    `norm_last` adds a batch norm after the last layer.
    """
    layers: list[nn.Module] = []
    for dim_in, dim_out in itertools.pairwise(widths):
        layers += [nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[: -1 if norm_last else -2])
