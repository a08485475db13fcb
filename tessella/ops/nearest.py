"""The largest values of long rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k, dim=1)`, exact and for long rows several times faster.

    Columns are cut into groups: those of the k largest lie in the k groups with the largest maxima. A group takes every
    n-th column, so that the maxima are taken along contiguous memory.
    """
    length = x.shape[1]
    size = math.isqrt(length // k)  # of a group: as many groups as candidates
    if size < 2:
        return x.topk(k, dim=1)
    groups = length // size
    maxima = x[:, : groups * size].unflatten(1, (size, groups)).amax(dim=1)
    chosen = maxima.topk(k, dim=1, sorted=False).indices
    inside = chosen[:, None, :] + groups * torch.arange(size, device=x.device)[:, None]  # (n, size, k)
    rest = torch.arange(groups * size, length, device=x.device).expand(len(x), -1)
    columns = torch.cat([inside.flatten(1), rest], dim=1)
    values, order = x.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, order)
