"""Assignments of embeddings to prototypes or centres of equal or minimum size."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella import dist
from tessella.errors import UserError
from tessella.ops.layout import widest_float

# Below this, exp((score - 1) / epsilon) of a cosine can leave float32's range: exp(-2 / 0.025) = 2e-35.
_FLOAT32_EPSILON = 0.025


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, past: Tensor | None = None) -> Tensor:
    """Codes that share the batch of all ranks equally among the prototypes. SwAV, section 3.1.

    Sinkhorn-Knopp scales rows and columns of one fixed matrix exp(scores / epsilon), so only two vectors of scales
    change: an iteration is two matrix-vector products. A prototype's mass is summed over all ranks, for all views at
    once.

    Args:
        scores: (n, K) cosine similarities of this rank's samples, n equal on all ranks; or (A, n, K) of A views, each
            balanced by itself.
        epsilon: > 0, smaller is sharper (SwAV: 0.05).
        iterations: at least 1 (SwAV: 3).
        past: (m, K) or (A, m, K) cosine similarities of samples that share the prototypes with these and get no code;
            overwritten, because copies of it would be the largest tensors of a step.

    Returns:
        Like scores; rows sum to 1; float32, or float64 for float64 scores.

    Raises:
        UserError: epsilon or iterations is out of range.
    """
    if epsilon <= 0 or iterations < 1:
        raise UserError(
            f"sinkhorn got epsilon={epsilon}, iterations={iterations}: epsilon must be above 0 (SwAV: 0.05) and "
            "iterations at least 1 (SwAV: 3)"
        )
    result = torch.float64 if scores.dtype == torch.float64 else torch.float32
    wide = widest_float(scores.device) if epsilon < _FLOAT32_EPSILON else result
    mass = _mass(scores.to(wide, copy=True), epsilon)
    blocks = [mass] if past is None else [mass, _mass(past.to(wide), epsilon)]
    views = list(zip(*[block.view(-1, *block.shape[-2:]) for block in blocks], strict=True))  # A tuples of blocks
    share = sum(block.shape[-2] for block in blocks) * dist.world_size() / scores.shape[-1]  # samples per prototype
    smallest = torch.finfo(wide).tiny  # a prototype whose mass underflowed stays at 0 instead of 0 / 0

    def prototype_scales_of(sample_scales: list[list[Tensor]]) -> Tensor:
        masses = [
            torch.stack([scale @ block for scale, block in zip(*both, strict=True)]).sum(dim=0)
            for both in zip(sample_scales, views, strict=True)
        ]
        return share / dist.all_reduce_sum(torch.stack(masses)).clamp_min(smallest)  # (A, K)

    prototype_scales = prototype_scales_of([[block.new_ones(len(block)) for block in view] for view in views])
    for _ in range(iterations - 1):
        both = zip(views, prototype_scales, strict=True)
        sample_scales = [[1 / (block @ scale).clamp_min(smallest) for block in view] for view, scale in both]
        prototype_scales = prototype_scales_of(sample_scales)
    codes = mass.mul_(prototype_scales.view(*scores.shape[:-2], 1, -1))
    return codes.div_(codes.sum(dim=-1, keepdim=True).clamp_min(smallest)).to(result)


def _mass(scores: Tensor, epsilon: float) -> Tensor:
    """exp((scores - 1) / epsilon), in place: a constant cancels in the scaling, and no cosine is above 1."""
    one = torch.full((), -1 / epsilon, dtype=scores.dtype, device=scores.device)
    return torch.add(one, scores, alpha=1 / epsilon, out=scores).exp_()


@torch.no_grad()
def harden(codes: Tensor) -> Tensor:
    """Hard codes: all mass of a (..., K) code on its largest entry, the first of equal ones. An option of SwAV."""
    return torch.zeros_like(codes).scatter_(-1, codes.argmax(dim=-1, keepdim=True), 1)


@torch.no_grad()
def dual_assignment(scores: Tensor, duals: Tensor) -> Tensor:
    """Cluster of each sample, (n,) int64: argmax of scores + duals. CoKe, online assignment.

    Duals (K,) make clusters that are too small attractive; at 0 it is the nearest centre. Scores (n, K) are cosines.
    """
    return (scores + duals).argmax(dim=1)


@torch.no_grad()
def dual_step(duals: Tensor, counts: Tensor, ratio: float, lr: float) -> Tensor:
    """One projected gradient step on the duals of "every cluster gets at least ratio * N / K of N samples". CoKe.

    For any data and order, a cluster's shortfall over batches of B is at most B / lr times the growth of its dual.

    Args:
        duals: (K,) before the batch.
        counts: (K,) samples of the batch of all ranks in each cluster.
        ratio: in [0, 1]; at 1, equal clusters, duals may be negative.
        lr: > 0. About 0.02 min(B, K): far above that, single batches change the assignment.

    Returns:
        (K,), at least 0 if ratio < 1.
    """
    moved = duals - lr * (counts / counts.sum() - ratio / len(duals))
    return moved.clamp_min(0) if ratio < 1 else moved


@torch.no_grad()
def average_labels(labels: Tensor, weights: Tensor, new: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running average of one-hot labels, of which the S heaviest clusters are kept. CoKe, single view, second stage.

    A label without a slot takes that of the smallest weight, whose weight is distributed over the others in proportion.

    Args:
        labels: (..., S) int, cluster of each slot, S at least 2.
        weights: (..., S) sum to 1; all 0 where nothing has been averaged yet.
        new: (...) label of this epoch.
        share: of the new label in the average, in (0, 1]; 1 where nothing has been averaged yet.

    Returns:
        Labels and weights after; weights sum to 1.
    """
    same = (labels == new[..., None]) & (weights > 0)
    known = same.any(dim=-1, keepdim=True)
    slot = torch.where(known, same.byte().argmax(dim=-1, keepdim=True), weights.argmin(dim=-1, keepdim=True))
    evicted = torch.where(known, 0, weights.gather(-1, slot))
    old = torch.where(known, weights, weights.scatter(-1, slot, 0)) * ((1 - share) / (1 - evicted))
    first = weights.sum(dim=-1, keepdim=True) == 0
    added = torch.full_like(evicted, share).masked_fill(first, 1)
    return labels.scatter(-1, slot, new[..., None]), old.scatter_add(-1, slot, added)


@torch.no_grad()
def averaged_targets(weights: Tensor, temperature: float) -> Tensor:
    """Soft target of each slot: softmax of weights / temperature over the slots in use. CoKe, single view.

    Weights (..., S) are those of `average_labels`, temperature is > 0 (CoKe: 0.5). The result sums to 1, is exactly 0
    where the weight is 0, and one-hot on slot 0 where all weights are 0.
    """
    used = weights > 0
    used[..., 0] |= ~used.any(dim=-1)
    return (weights / temperature).masked_fill(~used, -torch.inf).softmax(dim=-1)
