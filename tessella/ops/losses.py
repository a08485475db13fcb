"""Losses as pure functions; float32 inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def swapped_prediction(scores: Tensor, codes: Tensor, code_views: Sequence[int], temperature: float) -> Tensor:
    """Every view predicts the codes of the other views that have one. SwAV, equations 1 and 2.

    Args:
        scores: (V, B, K) cosine similarities of V views to the prototypes.
        codes: (A, B, K) assignments, rows sum to 1, constant.
        code_views: the A views that the codes belong to; a view never predicts its own code.
        temperature: > 0 (SwAV: 0.1).

    Returns:
        Scalar: mean over the A codes, over the V - 1 views that predict each, and over the batch.
    """
    loss: Tensor = _SwappedPrediction.apply(scores.float(), codes, code_views, temperature)
    return loss


class _SwappedPrediction(torch.autograd.Function):
    """The loss and, in the same passes over the scores, its gradient: the only large tensor that is kept.

    A code q sums to 1, so its cross-entropy with x = scores / temperature is logsumexp(x) - q.x, whose gradient with
    respect to x is softmax(x) - q. Both are linear in the code, so a view that predicts several codes uses their sum.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, codes: Tensor, code_views: Sequence[int], temperature: float) -> Tensor:
        views, batch, _ = scores.shape
        share = 1 / (len(code_views) * (views - 1) * batch)
        targets = scores.new_full((views, 1, 1), len(code_views))  # number of codes that each view predicts
        total = codes.sum(dim=0)
        x = scores / temperature  # becomes the gradient in place
        attraction = (total * x.sum(dim=0)).sum()
        for code, view in zip(codes, code_views, strict=True):
            attraction -= (code * x[view]).sum()
            targets[view] -= 1
        highest = x.amax(dim=-1, keepdim=True)
        sums = x.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        loss = (targets * (highest + sums.log())).sum() - attraction
        x.mul_(targets / sums).sub_(total)
        for code, view in zip(codes, code_views, strict=True):
            x[view] += code
        ctx.save_for_backward(x)
        ctx.scale = share / temperature
        return loss * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # scaled in place: torch refuses a second pass through the same graph
        return gradient.mul_(grad * ctx.scale), None, None, None


def supervised_contrastive(embeddings: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Embeddings of one group attract, all others repel: -log softmax, averaged over positives outside the log.

    JigClu, section 3.3, L_clu: an anchor's positives are the other members of its group; the denominator holds
    everything but the anchor itself. The positives' similarities are summed through group sums, without an N x N mask.

    Args:
        embeddings: (N, D) unit rows.
        groups: (N,) int64 in [0, N); every group that occurs has at least two members.
        temperature: > 0 (JigClu: 0.3).

    Returns:
        Scalar mean over anchors.
    """
    z = embeddings.float()
    logits = (z @ z.T).div_(temperature).fill_diagonal_(-torch.inf)
    sums = torch.zeros_like(z).index_add(0, groups, z)
    counts = torch.zeros(len(z), device=z.device).index_add(0, groups, torch.ones(len(z), device=z.device))
    # index_select, not brackets: the backward pass of brackets adds in the order in which CPU threads arrive.
    attraction = (z * (sums.index_select(0, groups) - z)).sum(dim=1) / (temperature * (counts[groups] - 1))
    return (logits.logsumexp(dim=1) - attraction).mean()


def label_cross_entropy(log_p: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy to a target of a few clusters, averaged over the batch: (...).

    Log-probabilities are (..., B, K); the target is clusters (B, S) int64, which may repeat, with constant weights
    (B, S) that sum to 1 in each row.
    """
    chosen = log_p.gather(-1, labels.expand(*log_p.shape[:-1], -1))
    return -(weights * chosen).sum(dim=-1).mean(dim=-1)


def crop_prediction(
    scores: Tensor, labels: Tensor, weights: Tensor, temperature: float, label_weight: float, large_weight: float
) -> Tensor:
    """Crops predict a label and each other: cross-entropies averaged over heads, crops and the batch. CoKe.

    The target of a crop is `label_weight` of its image's label and, for the rest, what the first head predicts for the
    other large crop; small crops, from the third one on, predict the mean of the two large ones.

    Args:
        scores: (H, V, B, K) cosine similarities from H heads for V >= 2 crops.
        labels: (B, S) int64 clusters of the image's label; a cluster may repeat.
        weights: (B, S) their shares, rows sum to 1, constant.
        temperature: > 0 (CoKe: 0.05).
        label_weight: in [0, 1] (CoKe: 0.2).
        large_weight: share of the two large crops in the loss, in [0, 1]; without small crops it has no effect.

    Returns:
        Scalar.
    """
    share = large_weight if scores.shape[1] > 2 else 1.0
    loss: Tensor = _CropPrediction.apply(scores.float(), labels, weights, temperature, label_weight, share)
    return loss


class _CropPrediction(torch.autograd.Function):
    """The loss and its gradient in the same passes, as in `_SwappedPrediction`."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, labels: Tensor, weights: Tensor, temperature: float, label_weight: float, share: float
    ) -> Tensor:
        heads, views, batch, _ = scores.shape
        large = share / (heads * 2 * batch)  # weight of one row of a large crop in the loss; of a small one:
        small = (1 - share) / (heads * (views - 2) * batch) if views > 2 else 0.0
        of_row = scores.new_full((1, views, 1, 1), small)
        of_row[:, :2] = large

        x = scores / temperature  # becomes the gradient in place
        predicted = x[0, :2].softmax(dim=-1)  # (2, B, K)
        to_other, to_both = predicted.flip(0), predicted.mean(dim=0)
        labels = labels.expand(heads, views, -1, -1)
        to_label = (label_weight * of_row) * weights  # (1, V, B, S)

        attraction = (to_label * x.gather(-1, labels)).sum()
        attraction += (1 - label_weight) * large * (to_other * x[:, :2].sum(dim=0)).sum()
        attraction += (1 - label_weight) * small * (to_both * x[:, 2:].sum(dim=(0, 1))).sum()
        highest = x.amax(dim=-1, keepdim=True)
        sums = x.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        loss = (of_row * (highest + sums.log())).sum() - attraction

        x.mul_(of_row / sums)
        x[:, :2].sub_(to_other, alpha=(1 - label_weight) * large)
        x[:, 2:].sub_(to_both, alpha=(1 - label_weight) * small)
        x.scatter_add_(-1, labels, -to_label.expand_as(labels))
        ctx.save_for_backward(x)
        ctx.scale = 1 / temperature
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # scaled in place: torch refuses a second pass through the same graph
        return gradient.mul_(grad * ctx.scale), None, None, None, None, None
