"""Which image is seen when: a pure function of (seed, epoch, position), the same for any number of ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key


class EpochOrder:
    """Every image once per epoch in a random order; those that do not fill a last batch sit this epoch out.

    The loader and the engine ask an order only for `batch_size`, `steps_per_epoch` and `batch`, so another
    class may arrange the rows differently.
    """

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
