"""Batches for evaluations: each image once, whole and in order, through one transform."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tessella.data.decode import Unreadable
from tessella.data.sources import ImageSet
from tessella.data.threads import Task, portions, run_ahead
from tessella.data.transform import EvalTransform


def evaluation_batches(
    images: ImageSet,
    rows: ArrayLike,
    transform: EvalTransform,
    *,
    batch_size: int,
    device: torch.device | str,
    workers: int,
    skipped: dict[str, str] | None = None,
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Images as evaluations see them.

    Args:
        images: what to read.
        rows: (n,) which, in this order.
        transform: applied to each image.
        batch_size: images per batch; the last may be smaller.
        device: where the batches go.
        workers: threads that decode, at least 1.
        skipped: receives key -> reason of every image that could not be decoded.

    Yields:
        (b, 3, size, size) float32 on the device, in `image_layout`, and their (b,) rows, without undecodable images.
    """
    device, rows, size = torch.device(device), np.asarray(rows, dtype=np.int64), transform.size

    def fill(pixels: Tensor, readable: NDArray[np.bool_], chosen: NDArray[np.int64], positions: list[int]) -> None:
        for position in positions:
            row = int(chosen[position])
            try:
                pixels[position] = transform.crop(images.image(row))
                readable[position] = True
            except Unreadable as error:
                if skipped is not None:
                    skipped[str(images.key(row))] = error.reason

    def drafts() -> Iterator[tuple[tuple[Tensor, NDArray[np.bool_], NDArray[np.int64]], Sequence[Task]]]:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            pixels = torch.empty(len(chosen), size, size, 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
            draft = pixels, np.zeros(len(chosen), dtype=np.bool_), chosen
            yield draft, [partial(fill, *draft, positions) for positions in portions(len(chosen))]

    with closing(run_ahead(drafts(), max(1, workers))) as done:
        for pixels, readable, chosen in done:
            if readable.any():
                pixels = pixels if readable.all() else pixels[torch.from_numpy(readable)]
                yield transform.normalised(pixels.to(device, non_blocking=True)), chosen[readable]
