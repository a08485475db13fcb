"""Assignments of embeddings to prototypes, shared equally."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella import dist
from tessella.errors import UserError

# Below this, exp((score - highest score) / epsilon) of two cosines can leave float32's range: exp(-2 / 0.025) = 2e-35.
_FLOAT32_EPSILON = 0.025


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes that share the batch of all ranks equally among the prototypes. SwAV, section 3.1.

    Sinkhorn-Knopp scales rows and columns of one fixed matrix exp(scores / epsilon), prototypes first and samples
    last, so only two vectors of scales change: an iteration is two matrix-vector products. A sample lives on one
    rank; a prototype's mass is summed over all of them.

    Args:
        scores: (n, K) cosine similarities of this rank's samples, n equal on all ranks.
        epsilon: > 0, smaller is sharper (SwAV: 0.05).
        iterations: at least 1 (SwAV: 3).

    Returns:
        (n, K), rows sum to 1; float32, or float64 for float64 scores.

    Raises:
        UserError: epsilon or iterations is out of range.
    """
    if epsilon <= 0 or iterations < 1:
        raise UserError(
            f"sinkhorn got epsilon={epsilon}, iterations={iterations}: epsilon must be above 0 (SwAV: 0.05) and "
            "iterations at least 1 (SwAV: 3)"
        )
    result = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.to(torch.float64 if epsilon < _FLOAT32_EPSILON else result)
    # A constant shift of all scores cancels in the scaling and keeps exp finite.
    mass = ((scores - dist.all_reduce_max(scores.max())) / epsilon).exp_()
    smallest = torch.finfo(mass.dtype).tiny  # a prototype whose mass underflowed stays at 0 instead of 0 / 0
    share = len(mass) * dist.world_size() / mass.shape[1]  # samples per prototype
    sample_scale = mass.new_ones(len(mass))
    for _ in range(iterations):
        prototype_scale = share / dist.all_reduce_sum(sample_scale @ mass).clamp_min(smallest)
        sample_scale = 1 / (mass @ prototype_scale).clamp_min(smallest)
    return mass.mul_(prototype_scale).mul_(sample_scale[:, None]).to(result)
