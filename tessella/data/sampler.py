"""Which image is seen when: a pure function of (seed, epoch, position), the same for any number of ranks."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella.errors import UserError
from tessella.ops.partition import partition
from tessella.ops.philox import permutation, stream_key


class Order(Protocol):
    """What the loader and the engine ask of an order."""

    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        ...

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """(batch_size,) rows of one step over all ranks; `step` counts within the epoch, from 0."""
        ...


class EpochOrder:
    """Every image once per epoch in a random order; those that do not fill a last batch sit this epoch out."""

    def __init__(self, ids: ArrayLike, batch_size: int, seed: int) -> None:
        """Keep the ids.

        Args:
            ids: (N,) stable 64-bit ids of the images, in row order.
            batch_size: images per step over all ranks and micro-batches.
            seed: of the run.

        Raises:
            UserError: if the images do not fill one batch.
        """
        self.ids = np.asarray(ids)
        self.batch_size = batch_size
        if not 0 < batch_size <= len(self.ids):
            raise UserError(
                f"batch_size={batch_size} does not fit a data set of {len(self.ids)} images: "
                f"set batch_size between 1 and {len(self.ids)}, or give more images"
            )
        self._key = stream_key(seed, "rows")
        self._kept: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))  # the epoch at hand

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return len(self.ids) // self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """(N,) rows of the data set in the order of `epoch`, counted from 0."""
        if self._kept[0] != epoch:
            self._kept = epoch, permutation(self._key, self.ids, epoch)
        return self._kept[1]

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """(batch_size,) rows of one step over all ranks; `step` counts within the epoch, from 0."""
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        return self.order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]


class SlotOrder:
    """Each slot of the batch draws from a part of the images that is its own for the whole run. MEJigClu.

    The images are cut once into C parts (`ops.partition`); an epoch changes the order within a part, never the
    membership. With C equal to the batch size, slot k of every batch holds an image of part k. With more parts
    than slots, each batch holds images of as many different parts, ascending: the parts take turns in an order that
    each epoch draws anew.
    """

    def __init__(
        self,
        ids: ArrayLike,
        batch_size: int,
        seed: int,
        *,
        parts: int,
        partition_seed: int,
        uneven: Literal["drop", "wrap"] = "drop",
    ) -> None:
        """Cut the images into parts.

        Args:
            ids: (N,) stable 64-bit ids of the images, in row order.
            batch_size: images per step over all ranks and micro-batches, n.
            seed: of the run: the order within the parts.
            parts: C, in [n, N].
            partition_seed: of the split into parts.
            uneven: what becomes of parts that differ in size, which they do by one image at most. "drop": an epoch is
                as long as the smaller ones last, and the larger leave out one image, another one each epoch; "wrap": as
                long as the larger ones last, and the smaller show one image twice.

        Raises:
            UserError: if there are fewer parts than slots, or fewer images than parts.
        """
        self.ids = np.asarray(ids)
        self.batch_size, self.parts = batch_size, parts
        if not 0 < batch_size <= parts:
            raise UserError(
                f"batch_size={batch_size} needs as many different categories in each batch, and there are {parts}: "
                f"set categories to {batch_size} or more, or batch_size between 1 and {parts}"
            )
        if parts > len(self.ids):
            raise UserError(
                f"{len(self.ids)} images cannot be cut into {parts} categories: set batch_size and categories to "
                f"{len(self.ids)} or less, or give more images"
            )
        self._part = partition(len(self.ids), parts, partition_seed)
        self._sizes = np.bincount(self._part, minlength=parts)
        self._rounds = int(self._sizes.min() if uneven == "drop" else self._sizes.max())
        self._rows_key, self._turns_key = stream_key(seed, "slot"), stream_key(seed, "turn")
        self._kept: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))  # the epoch at hand

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return self.parts * self._rounds // self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """(steps_per_epoch * batch_size,) rows of the data set in the order of `epoch`, counted from 0."""
        if self._kept[0] != epoch:
            self._kept = epoch, self._draw(epoch)
        return self._kept[1]

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """(batch_size,) rows of one step over all ranks; `step` counts within the epoch, from 0."""
        assert 0 <= step < self.steps_per_epoch, (step, self.steps_per_epoch)
        return self.order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        shuffled = permutation(self._rows_key, self.ids, epoch)
        by_part = shuffled[np.argsort(self._part[shuffled], kind="stable")]  # part after part, shuffled within
        first = np.cumsum(self._sizes) - self._sizes
        # The parts take turns, round after round. Any n <= C consecutive turns are of different parts.
        turns = permutation(self._turns_key, np.arange(self.parts), epoch)
        round_, turn = np.divmod(np.arange(self.steps_per_epoch * self.batch_size), self.parts)
        slots = np.stack((turns[turn], round_)).reshape(2, -1, self.batch_size)
        part, number = np.take_along_axis(slots, slots[:1].argsort(axis=-1), axis=-1).reshape(2, -1)
        return by_part[first[part] + number % self._sizes[part]]


def check_shares(batch_size: int, world_size: int, accumulate: int) -> None:
    """Refuse a batch that cannot be cut into equal parts for ranks and micro-batches.

    Args:
        batch_size: images per step over all ranks and micro-batches.
        world_size: number of ranks.
        accumulate: micro-batches per step.

    Raises:
        UserError: if `batch_size` is not a multiple of `world_size * accumulate`.
    """
    parts = world_size * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        mend = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(
            f"batch_size={batch_size} cannot be shared equally by {world_size} ranks x {accumulate} "
            f"micro-batches: use {mend}, or change the number of ranks or of micro-batches (accumulate)"
        )


def share(rows: NDArray[np.int64], rank: int, world_size: int, accumulate: int) -> list[NDArray[np.int64]]:
    """One rank's part of a global batch.

    The batch is cut into `accumulate` consecutive micro-batches and each of them into consecutive slices of
    the
    ranks: what all ranks see together in one forward pass does not depend on their number.

    Args:
        rows: (batch_size,) rows of the global batch.
        rank: in [0, world_size).
        world_size: number of ranks.
        accumulate: micro-batches per step.

    Returns:
        `accumulate` arrays of batch_size / (accumulate * world_size) rows.
    """
    return list(rows.reshape(accumulate, world_size, -1)[:, rank])
