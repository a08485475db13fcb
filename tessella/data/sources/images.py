"""What every source opens into: an `ImageSet`; and the simplest one, an array in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella.data.decode import decode
from tessella.data.index import Index
from tessella.errors import UserError


class Request(NamedTuple):
    """The images that a user names; the argument of the openers of all kinds of sources."""

    data: str  # as given, for messages and records
    path: str  # of the folder, archive, list or pack; or the name of the data set
    part: str | None  # a folder within it, or a split
    labels: bool  # show the classes
    cache: Path | None  # folder for indexes and decompressed archives; None: the usual one
    download: bool  # whether a data set by name may be fetched


class ImageSet:
    """Images with stable ids, in the order of their keys. Threads may share it."""

    def __init__(self, name: str, index: Index, labelled: bool) -> None:
        self.name = name  # as given
        self.index = index
        self.ids: NDArray[np.int64] = index.ids  # (N,) stable, distinct, non-negative
        self.sizes: NDArray[np.int32] = index.sizes  # (N, 2) width and height in pixels of the upright images
        self.labels = index.labels if labelled else None  # (N,) int64 indices into `classes`; None unless asked for
        self.classes = index.classes if labelled else None  # their names
        self.fingerprint = index.fingerprint  # changes when an image comes, goes, is renamed or encoded again
        self.unreadable = index.unreadable  # (key, reason) of what has the name of an image and is not in the set
        self.passed_over = index.passed_over  # ending -> number of files among the images that are of no kind to read

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def uniform_size(self) -> tuple[int, int] | None:
        """Width and height, if all images have the same."""
        width, height = (int(side) for side in self.sizes[0])
        return (width, height) if (self.sizes == (width, height)).all() else None

    def key(self, row: int) -> str:
        """Name of an image within the set, '/' between parts."""
        return self.index.key(row)

    def read(self, row: int) -> bytes | NDArray[np.uint8]:
        """An image as it is stored: encoded, or (height, width, 3) uint8 pixels. Unreadable if it is gone."""
        raise NotImplementedError

    def image(self, row: int, shrink: int = 1) -> NDArray[np.uint8]:
        """Upright pixels, (height, width, 3) uint8 RGB.

        A JPEG may come at 1/shrink of its size, sides rounded up; shrink is 1, 2, 4 or 8.

        Raises:
            Unreadable: the image cannot be read or decoded whole.
        """
        stored = self.read(row)
        return decode(stored, shrink) if isinstance(stored, bytes) else stored


class ArrayImages(ImageSet):
    """Images that are one array in memory.

    Args:
        name: for reports.
        images: (N, H, W, 3) or, gray, (N, H, W) uint8; not copied.
        labels: (N,) integers, or None.
        classes: their names; by default the numbers.
        keys: N names in ascending order; by default the row numbers.

    Raises:
        UserError: wrong shape or type.
    """

    def __init__(
        self,
        name: str,
        images: NDArray[np.uint8],
        labels: ArrayLike | None = None,
        *,
        classes: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        images = np.asarray(images)
        gray, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
        if images.dtype != np.uint8 or not (gray or colour) or 0 in images.shape:
            raise UserError(
                f"{name} is an array of {images.dtype} {images.shape}: give uint8 (N, H, W, 3), or (N, H, W) for"
                " gray, with N, H and W at least 1"
            )
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise UserError(
                    f"labels of {name} are {labels.dtype} {labels.shape}: give one integer per image,"
                    f" {len(images)} in all"
                )
            classes = classes or [str(number) for number in range(int(labels.max()) + 1)]
        digest = hashlib.sha256(repr(images.shape).encode())
        for image in images:  # one by one: a whole array that is not contiguous would be copied
            digest.update(image.tobytes())
        index = Index.of(
            keys or [f"{row:09d}" for row in range(len(images))],
            (images.shape[2], images.shape[1]),
            labels=-1 if labels is None else labels,
            classes=classes or (),
            fingerprint=digest.hexdigest(),
        )
        super().__init__(name, index, labels is not None)
        self._images = images

    def read(self, row: int) -> NDArray[np.uint8]:  # noqa: D102
        image = self._images[row]
        return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
