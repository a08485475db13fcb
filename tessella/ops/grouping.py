"""Groups: unit vectors that move with every batch and are rebuilt at intervals. SMoG.

The rows of all ranks are one batch: a rank passes its own, and sums are over all of them.

Source: Pang, Zhang, Li, Cai, Lu, "Unsupervised visual representation learning by synchronous momentum grouping",
ECCV 2022; Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", 2001 (spherical
k-means).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import dist
from tessella.ops.layout import widest_float

_BLOCK = 4_000_000  # scores held at a time


@torch.no_grad()
def nearest_group(embeddings: Tensor, groups: Tensor) -> Tensor:
    """The group (K, D) with the highest cosine to each row (n, D), the first of several: (n,) int64 in [0, K)."""
    rows = max(1, _BLOCK // len(groups))
    return torch.cat([(part.to(groups.dtype) @ groups.T).argmax(dim=1) for part in embeddings.split(rows)])


def group_sums(embeddings: Tensor, assignments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D), differentiable, and number (K,) of this rank's rows in each group.

    On a GPU, which adds in no fixed order, in double precision, so that the order does not reach the float32 groups.

    Args:
        embeddings: (n, D).
        assignments: (n,) int64 in [0, count).
        count: number of groups K.
    """
    rows = embeddings.double() if embeddings.is_cuda else embeddings
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, assignments, rows)
    counts = rows.new_zeros(count).index_add(0, assignments, rows.new_ones(len(rows)))
    return sums, counts


def moved_groups(groups: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """Groups after a step towards the mean of the rows assigned to them: normalised momentum * old + rest * mean.

    Args:
        groups: (..., K, D) unit rows.
        sums: (..., K, D) sum of the rows of all ranks that were assigned to each group; may require gradient.
        counts: (..., K) their number; a group without rows does not change.
        momentum: share of the old group, in [0, 1]; 0 is the update of spherical k-means.

    Returns:
        (..., K, D) unit rows, in the precision of `groups`.
    """
    means = sums / counts.clamp(min=1)[..., None]
    mixed = torch.lerp(groups.to(means.dtype), means, 1 - momentum)  # exact for a momentum within 1e-8 of 1
    return torch.where(counts[..., None] > 0, F.normalize(mixed, dim=-1).to(groups.dtype), groups)


def group_loss(predictions: Tensor, groups: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every view's scores against every label of its image.

    Args:
        predictions: (V, B, D) unit rows of V views.
        groups: (K, D) unit rows.
        labels: (A, B) int64 in [0, K), A labels per image.
        temperature: > 0 (SMoG: 0.1).

    Returns:
        Scalar mean over the V * A pairs and the batch; ln K for equal scores.
    """
    log_p = F.log_softmax((predictions / temperature) @ groups.T, dim=-1)  # divided where it is small
    return -log_p.gather(-1, labels.T.expand(len(predictions), -1, -1)).mean()


@torch.no_grad()
def spherical_kmeans(rows: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm on unit rows with the cosine, for a fixed number of iterations. SMoG's regrouping.

    Unlike `ops.kmeans` it works on rows that are distributed over ranks, from given centres, and an empty cluster keeps
    its centre.

    Args:
        rows: (n, D) unit rows of this rank; n may differ between ranks.
        centres: (K, D) unit rows, equal on all ranks.
        iterations: of assignment and mean.

    Returns:
        (K, D) unit rows, equal on all ranks.
    """
    block = max(1, _BLOCK // centres.shape[1])
    for _ in range(iterations):
        total = torch.zeros(len(centres), centres.shape[1] + 1, dtype=widest_float(rows.device), device=rows.device)
        for part in rows.split(block):
            sums, counts = group_sums(part, nearest_group(part, centres), len(centres))
            total += torch.cat([sums, counts[:, None]], dim=1)
        total = dist.all_reduce_sum(total)
        centres = moved_groups(centres, total[:, :-1], total[:, -1], momentum=0.0)
    return centres
