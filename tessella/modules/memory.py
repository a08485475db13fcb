"""State that is kept from step to step: equal on every rank, filled from gathered rows, saved with the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tessella import dist


class FeatureQueue(nn.Module):
    """The newest `length` embeddings of all ranks; the oldest rows are overwritten."""

    features: Tensor
    pushed: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(length, dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))  # rows ever pushed, all ranks
        self._pushed_on_host: int | None = None  # a copy of `pushed`: reading that waits for the device
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
        """Store the rows of all ranks, at most `length`. (n, dim) of this rank, the same n on every rank."""
        rows = dist.gather(rows.detach())
        places = torch.arange(len(rows), device=rows.device).add_(self._count()).remainder_(len(self.features))
        self.features.index_copy_(0, places, rows.to(self.features.dtype))
        self.pushed += len(rows)
        self._pushed_on_host = self._count() + len(rows)


class InstanceTable(nn.Module):
    """One row per training image, by the image's row in the index; equal on every rank.

    Every rank writes the rows of all ranks, so DDP need not broadcast them: see `keep_from_broadcast`. A table for 0
    images takes the length of the state that is loaded into it.
    """

    rows: Tensor

    def __init__(self, images: int, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> None:
        super().__init__()
        self.register_buffer("rows", torch.full((images, *shape), fill, dtype=dtype))
        self.register_load_state_dict_pre_hook(_take_length)

    def read(self, instances: Tensor) -> Tensor:
        """The rows of some images: (n,) int64 -> (n, *shape)."""
        return self.rows.index_select(0, instances)

    @torch.no_grad()
    def write(self, instances: Tensor, values: Tensor) -> None:
        """Store the rows of all ranks. (n,) int64 and (n, *shape) of this rank, the same n on every rank."""
        self.rows.index_copy_(0, dist.gather(instances), dist.gather(values.to(self.rows.dtype)))


def keep_from_broadcast(module: nn.Module) -> None:
    """Exclude instance tables and feature banks of `module` from the buffers that DDP copies from rank 0 every step."""
    names = [
        f"{name}.{buffer}"
        for name, part in module.named_modules()
        if isinstance(part, InstanceTable | FeatureBank)
        for buffer, _ in part.named_buffers()
    ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _take_length(table: InstanceTable, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    saved = state.get(f"{prefix}rows")
    if saved is not None and not len(table.rows):
        table.rows = torch.empty_like(saved, device=table.rows.device)


class FeatureBank(nn.Module):
    """The newest embeddings of every training image, one per image for each of several views.

    Every rank holds the whole bank and writes the rows of all ranks, so a run may continue on another number of ranks.

    Args:
        views: embeddings per image.
        images: rows; with 0, as for an evaluation, saved rows are not loaded.
        dim: D.
    """

    features: Tensor
    written: Tensor

    def __init__(self, views: int, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(views, images, dim))
        self.register_buffer("written", torch.zeros(images, dtype=torch.bool))
        self.register_load_state_dict_pre_hook(_skip_rows)

    @torch.no_grad()
    def write(self, instances: Tensor, embeddings: Tensor) -> None:
        """Store the rows of all ranks: (n,) int64 and (views, n, D) of this rank, n equal on all ranks."""
        rows = dist.gather(instances)
        self.features[:, rows] = dist.gather(embeddings.transpose(0, 1)).transpose(0, 1).to(self.features.dtype)
        self.written[rows] = True

    def known(self) -> Tensor:
        """Rows that were written at least once, ascending: (n,) int64. Waits for the device."""
        return self.written.nonzero()[:, 0]


def _skip_rows(bank: FeatureBank, state: dict[str, Any], prefix: str, *_: object) -> None:
    if not len(bank.written):
        state.update({f"{prefix}features": bank.features, f"{prefix}written": bank.written})
