"""Cluster centres that are computed from the images, batch by batch, not learned by gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.ops.assignment import dual_assignment, dual_step
from tessella.ops.kmeans import online_means


class OnlineCentres(nn.Module):
    """One clustering by online k-means with a minimum cluster size. CoKe.

    `previous` holds the centres of the last epoch, `current` those of this epoch so far. State is equal on all ranks,
    because it is updated from the rows of all ranks.
    """

    previous: Tensor
    current: Tensor
    duals: Tensor
    seen: Tensor

    def __init__(self, count: int, dim: int) -> None:
        """Random unit centres from torch's global generator; `current` starts equal to `previous`."""
        super().__init__()
        self.register_buffer("previous", F.normalize(torch.randn(count, dim), dim=1))
        self.register_buffer("current", self.previous.clone())
        self.register_buffer("duals", torch.zeros(count))  # never reset
        self.register_buffer("seen", torch.zeros(count))  # images of each cluster since the epoch's start

    def assign(self, features: Tensor, to_previous: bool = False) -> Tensor:
        """Cluster of each image under the duals: (n, dim) float32 -> (n,) int64."""
        centres = self.previous if to_previous else self.current
        return dual_assignment(features @ centres.T, self.duals)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, ratio: float, dual_lr: float, to_unit: bool = True) -> None:
        """Update the duals and this epoch's centres by one batch of all ranks.

        Counts start at 0 every epoch, so the first images of a cluster replace its centre of the last epoch.

        Args:
            features: (n, dim) float32.
            labels: (n,) from `assign`, before this call.
            ratio: minimum cluster size, as a share of images / clusters.
            dual_lr: learning rate of the duals.
            to_unit: whether changed centres are scaled back to unit length.
        """
        means, counts = online_means(self.current, self.seen, features, labels)
        if to_unit:
            means = torch.where(counts[:, None] > 0, F.normalize(means, dim=1), means)
        self.duals.copy_(dual_step(self.duals, counts, ratio, dual_lr))
        self.current.copy_(means)
        self.seen.add_(counts)

    @torch.no_grad()
    def close_epoch(self, share: float | None = None) -> None:
        """Make this epoch's centres those of the last epoch, and count from 0.

        `share` is the weight of this epoch's centres in a running average over epochs; None: no average.
        """
        if share is not None:
            average = (1 - share) * self.previous + share * F.normalize(self.current, dim=1)
            self.current.copy_(F.normalize(average, dim=1))
        self.previous.copy_(self.current)
        self.seen.zero_()
