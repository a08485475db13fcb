"""Which image is seen when: a pure function of (seed, epoch, position), the same for any number of ranks.

The rows of a step are computed from their positions (`ops.philox.shuffled`), without an order of the whole epoch, so
that a hundred million images cost no more time and memory than a thousand.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tessella.errors import UserError
from tessella.ops.partition import rows_of_part
from tessella.ops.philox import shuffled, stream_key


class Sampler(Protocol):
    """Which images make up each step, as loader and engine use it."""

    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        ...

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """(batch_size,) rows of one step over all ranks; `step` counts within the epoch, from 0."""
        ...


class EpochSampler:
    """Every image once per epoch in a random order; those that do not fill the last batch are left out."""

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        """Raise a UserError if `images` do not fill one batch of `batch_size`, over all ranks; `seed` is the run's."""
        self.images, self.batch_size = images, batch_size
        if not 0 < batch_size <= images:
            raise UserError(
                f"batch_size={batch_size} does not fit a data set of {images} images: "
                f"set batch_size between 1 and {images}, or give more images"
            )
        self._key = stream_key(seed, "rows")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return self.images // self.batch_size

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """(batch_size,) rows of one step over all ranks; `step` counts within the epoch, from 0."""
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        return shuffled(self._key, step * self.batch_size + np.arange(self.batch_size), self.images, epoch)


class SlotSampler:
    """Each slot of the batch draws from its own part of the images, the same in the whole run. MEJigClu.

    The images are divided once into C parts (`ops.partition`); an epoch changes the order within a part only. With C
    equal to the batch size, slot k of every batch holds an image of part k. With more parts than slots, the images of
    a batch are of different parts, ascending; the parts take turns in an order that is random in each epoch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        parts: int,
        partition_seed: int,
        uneven: Literal["drop", "wrap"] = "drop",
    ) -> None:
        """Divide the images into parts.

        Args:
            images: in the data set, N.
            batch_size: images per step over all ranks and micro-batches, n.
            seed: of the run: the order within the parts.
            parts: C, in [n, N].
            partition_seed: of the division into parts.
            uneven: part sizes may differ by one image. "drop": the larger parts leave out one image per epoch, each
                time another one; "wrap": the smaller ones show one image twice.

        Raises:
            UserError: there are fewer parts than slots, or fewer images than parts.
        """
        self.images, self.batch_size, self.parts = images, batch_size, parts
        if not 0 < batch_size <= parts:
            raise UserError(
                f"batch_size={batch_size} needs as many different categories in each batch, and there are {parts}: "
                f"set categories to {batch_size} or more, or batch_size between 1 and {parts}"
            )
        if parts > images:
            raise UserError(
                f"{images} images cannot be cut into {parts} categories: set batch_size and categories to "
                f"{images} or less, or give more images"
            )
        self._rounds = images // parts + (uneven == "wrap" and images % parts > 0)
        self._partition_seed = partition_seed
        self._rows_key, self._turns_key = stream_key(seed, "slot"), stream_key(seed, "turn")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return self.parts * self._rounds // self.batch_size

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """(batch_size,) rows of one step over all ranks; `step` counts within the epoch, from 0."""
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        # The parts take turns, round after round. Any n <= C consecutive turns are of different parts.
        round_, turn = np.divmod(step * self.batch_size + np.arange(self.batch_size), self.parts)
        part = shuffled(self._turns_key, turn, self.parts, epoch)
        ascending = part.argsort()
        part, round_ = part[ascending], round_[ascending]
        sizes = self.images // self.parts + (part < self.images % self.parts)
        numbers = shuffled(self._rows_key, round_ % sizes, sizes, epoch, lanes=part)
        return rows_of_part(part, numbers, self.images, self.parts, self._partition_seed)


def check_shares(batch_size: int, world_size: int, accumulate: int) -> None:
    """Raise a UserError unless `batch_size` is a multiple of `world_size * accumulate`."""
    parts = world_size * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        choices = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(
            f"batch_size={batch_size} cannot be shared equally by {world_size} ranks x {accumulate} "
            f"micro-batches: use {choices}, or change the number of ranks or of micro-batches (accumulate)"
        )


def share(rows: NDArray[np.int64], rank: int, world_size: int, accumulate: int) -> list[NDArray[np.int64]]:
    """One rank's part of the (batch_size,) rows of a global batch: `accumulate` arrays.

    The batch is divided into `accumulate` consecutive micro-batches and each of them into consecutive slices for the
    ranks, so that what all ranks see in one forward pass does not depend on their number.
    """
    return list(rows.reshape(accumulate, world_size, -1)[:, rank])
