"""State that outlives a step: equal on every rank, filled from gathered rows, saved with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella import dist


class FeatureQueue(nn.Module):
    """The newest `length` embeddings of all ranks.

    A ring: the oldest rows are overwritten in place. `length` is a multiple of the rows pushed at once.
    """

    features: Tensor
    pushed: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(length, dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # rows ever pushed, all ranks
        self._pushed_on_host: int | None = None  # a copy of `pushed`, so that a step need not wait for the device
        self.register_load_state_dict_post_hook(lambda *_: setattr(self, "_pushed_on_host", None))

    def _count(self) -> int:
        if self._pushed_on_host is None:
            self._pushed_on_host = int(self.pushed)
        return self._pushed_on_host

    @property
    def is_full(self) -> bool:
        """Whether every row has been written at least once."""
        return self._count() >= len(self.features)

    def local_rows(self) -> Tensor:
        """This rank's share of the rows: (length / world_size, dim)."""
        share = len(self.features) // dist.world_size()
        return self.features[dist.rank() * share : (dist.rank() + 1) * share]

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Store the rows of all ranks. (n, dim) of this rank, the same n on every rank."""
        rows = dist.gather(rows.detach())
        start = self._count() % len(self.features)
        self.features[start : start + len(rows)] = rows.to(self.features.dtype)
        self.pushed += len(rows)
        self._pushed_on_host = self._count() + len(rows)
