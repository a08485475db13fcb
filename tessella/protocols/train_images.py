"""Augmented batches of labelled images, for probes and fine-tuning.

rows of a subset -> an order per epoch -> random resized crops and flips -> pixels, labels, weights
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from tessella import dist
from tessella.data.loader import Loader
from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key
from tessella.protocols.features import EvalData


class SubsetOrder:
    """Every row of a subset once per epoch, in a random order; this rank's part of each step.

    Args:
        rows: (n,) rows of the data set.
        ids: (N,) stable ids of the whole data set.
        batch_size: images per step over all ranks.
        seed: of the order.
        partial: keep the last batch of an epoch though it is not full, as most published probes do.
        equal: every rank gets equally many, so that a batch norm over all ranks may count on it; up to ranks - 1
            images of the last batch then wait for another epoch. Else the ranks' parts differ by one at most, and a
            rank that would have none gets an image that does not count.
    """

    def __init__(
        self, rows: ArrayLike, ids: ArrayLike, batch_size: int, seed: int, *, partial: bool = True, equal: bool = False
    ) -> None:
        self.rows, self.batch_size = np.asarray(rows, dtype=np.int64), batch_size
        self._ids, self._key = np.asarray(ids)[self.rows], stream_key(seed, "rows")
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # an epoch, and its rows
        ranks = dist.world_size()
        if equal and batch_size % ranks:
            raise UserError(
                f"batch_size={batch_size} cannot be shared equally by {ranks} ranks: use a multiple of {ranks}"
            )
        full, rest = divmod(len(self.rows), batch_size)
        if equal:
            rest -= rest % ranks
            rest = 0 if rest == 1 else rest  # batch norm refuses a single vector
        self.steps_per_epoch = full + bool(rest and (partial or not full))
        self._rest = rest
        if not self.steps_per_epoch:
            raise UserError(f"{len(self.rows)} train images are too few to train on: give at least {2 * ranks}")

    def step(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Rows of one step over all ranks."""
        if self._order[0] != epoch:
            self._order = epoch, self.rows[permutation(self._key, self._ids, epoch)]
        start = step * self.batch_size
        left = len(self.rows) - start
        return self._order[1][start : start + (self.batch_size if left >= self.batch_size else self._rest)]

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Rows of one step that this rank reads, at least one."""
        rows = self.step(epoch, step)
        mine = np.array_split(rows, dist.world_size())[dist.rank()]
        return mine if len(mine) else rows[:1]

    def counts(self, epoch: int, step: int) -> bool:
        """Whether this rank's rows of a step are its own, not only there to keep it busy."""
        return len(self.step(epoch, step)) > dist.rank()


class LabelledBatch(NamedTuple):
    """This rank's images of one step, on the device."""

    pixels: Tensor  # (b, 3, size, size) float32, or what stands for images: (b, d)
    labels: Tensor  # (b,) int64
    weights: Tensor  # (b,) float32; over all ranks they sum to 1

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """This rank's part of the mean over the images of all ranks. Logits: (b, classes)."""
        return (F.cross_entropy(logits, self.labels, reduction="none") * self.weights).sum()


class TrainImages:
    """Train images as random resized crops and flips, nothing else, as in every published probe.

    An image that cannot be read is left out of the loss.

    Attributes:
        order: rows of each step.
        skipped: key -> reason of the images that could not be read so far.
    """

    def __init__(self, data: EvalData, order: SubsetOrder, seed: int) -> None:
        flips = ColorAugmentation(flip=0.5, jitter=0, gray=0, blur=0, solarize=0)
        crops = CropGroup(views=1, size=data.transform.size, scale=(0.08, 1.0), colors=flips)
        spec = ViewSpec((crops,), data.transform.mean, data.transform.std)
        options = {"seed": seed, "device": data.device, "workers": data.workers, "max_unreadable": 1.0}
        self.order, self._labels = order, data.labels("train").to(data.device)
        self._loader = Loader(data.train, spec, order, **options)  # type: ignore[arg-type]
        self.skipped = self._loader.skipped

    @property
    def notes(self) -> list[str]:
        """For the reader of the scores."""
        skipped = len(self.skipped)
        return [f"{skipped} train images could not be read and were left out"] if skipped else []

    def batches(self, first: int) -> Generator[LabelledBatch, None, None]:
        """This rank's part of every step from `first` on, epoch after epoch."""
        epoch, first = divmod(first, self.order.steps_per_epoch)
        while True:
            for step, (batch,) in enumerate(self._loader.epoch(epoch, first), first):
                rows = torch.from_numpy(self.order.batch(epoch, step)).to(batch.instances.device)
                # The loader puts another image in the place of one that it cannot read.
                counted = (batch.instances == rows).float() * self.order.counts(epoch, step)
                total = dist.all_reduce_sum(counted.sum()).clamp(min=1)
                yield LabelledBatch(batch.views[0][0], self._labels[batch.instances], counted / total)
            epoch, first = epoch + 1, 0


def initial_head(classes: int, dim: int, seed: int) -> nn.Linear:
    """Weights from N(0, 0.01²), bias 0, equal on every rank."""
    head = nn.utils.skip_init(nn.Linear, dim, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.01, generator=generator)
        head.bias.zero_()
    return head
