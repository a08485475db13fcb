"""Losses as pure functions; float32 inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OFFICIAL_BASE_TEMPERATURE = 0.07  # JigClu's official code multiplies its contrastive loss by temperature / 0.07


def swapped_prediction(scores: Tensor, codes: Tensor, code_views: Sequence[int], temperature: float) -> Tensor:
    """Every view predicts the codes of the other views that have one. SwAV, equations 1 and 2.

    Args:
        scores: (V, B, K) cosine similarities of V views to the prototypes.
        codes: (A, B, K) soft assignments, rows sum to 1, constant.
        code_views: the A views that the codes belong to; a view never predicts its own code.
        temperature: > 0 (SwAV: 0.1).

    Returns:
        Scalar: mean over the A codes, over the V - 1 views that predict each, and over the batch.
    """
    views, batch, _ = scores.shape
    log_p = F.log_softmax(scores.float() / temperature, dim=-1)
    # Views that predict several codes meet their sum once: cross-entropy is linear in the target.
    total = codes.sum(dim=0)
    targets = total.expand(views, -1, -1).clone()
    targets[list(code_views)] -= codes
    return -(targets * log_p).sum() / (len(code_views) * (views - 1) * batch)


def supervised_contrastive(embeddings: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Embeddings of one group attract, all others repel: -log softmax, averaged over positives outside the log.

    JigClu, section 3.3, L_clu: an anchor's positives are the other members of its group; the denominator holds
    everything but the anchor itself. The positives' similarities are summed through group sums, so no N x N mask
    is kept.

    Args:
        embeddings: (N, D) unit rows.
        groups: (N,) int64 in [0, N); every group that occurs has at least two members.
        temperature: > 0 (JigClu: 0.3).

    Returns:
        Scalar mean over anchors.
    """
    z = embeddings.float()
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    sums = torch.zeros_like(z).index_add(0, groups, z)
    counts = torch.zeros(len(z), device=z.device).index_add(0, groups, torch.ones(len(z), device=z.device))
    # index_select, not brackets: the backward pass of brackets adds in the order in which CPU threads arrive.
    attraction = (z * (sums.index_select(0, groups) - z)).sum(dim=1) / (temperature * (counts[groups] - 1))
    return (logits.logsumexp(dim=1) - attraction).mean()


def label_cross_entropy(log_p: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy to a target of a few clusters, averaged over the batch.

    Args:
        log_p: (..., B, K) log-probabilities.
        labels: (B, S) int64 clusters of the target; a cluster may occur twice.
        weights: (B, S) their shares, rows sum to 1, constant.

    Returns:
        (...), one mean per leading index.
    """
    chosen = log_p.gather(-1, labels.expand(*log_p.shape[:-1], -1))
    return -(weights * chosen).sum(dim=-1).mean(dim=-1)


def view_cross_entropy(log_p: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy of every view to the mean prediction of the other target views, averaged over the batch. CoKe.

    Args:
        log_p: (..., V, B, K) log-probabilities of V views, of which the first two give targets.
        p: (2, B, K) probabilities of the first two views, constant.

    Returns:
        (..., V): each of the first two views to the other one, every further view to the mean of the two.
    """
    pair, rest = log_p[..., :2, :, :], log_p[..., 2:, :, :]
    losses = [-(p.flip(0) * pair).sum(dim=-1).mean(dim=-1), -(p.mean(dim=0) * rest).sum(dim=-1).mean(dim=-1)]
    return torch.cat(losses, dim=-1)
