"""Data sets that need no download, by name: scikit-learn's digits, and drawn shapes (see `shapes`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tessella.data.sources.images import ArrayImages, ImageSet, Request
from tessella.data.sources.messages import check_split
from tessella.data.sources.shapes import CLASSES as SHAPES
from tessella.data.sources.shapes import draw_shapes


def open_digits(request: Request) -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to 32 x 32; every fifth for tests."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = _rows_of_split(request, testing=np.arange(len(bunch.target)) % 5 == 0)
    levels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(level).resize((32, 32), Image.Resampling.BICUBIC)) for level in levels]
    return _named(request, "digits", np.stack(images), rows, bunch.target[rows], [str(digit) for digit in range(10)])


def open_shapes(request: Request) -> ImageSet:
    """Generated shapes, 2000 for training and 500 for testing."""
    rows = _rows_of_split(request, testing=np.arange(2500) >= 2000)
    images, labels = draw_shapes(rows)
    return _named(request, "shapes", images, rows, labels, SHAPES)


def _rows_of_split(request: Request, testing: NDArray[np.bool_]) -> NDArray[np.int64]:
    split = request.part or "all"
    check_split(request.data, split, ("train", "test", "all"))
    return np.flatnonzero({"train": ~testing, "test": testing, "all": np.ones_like(testing)}[split])


def _named(
    request: Request, name: str, images: NDArray[np.uint8], rows: NDArray[np.int64], labels: NDArray, classes: list[str]
) -> ImageSet:
    keys = [f"{name}/{row:04d}" for row in rows]
    if not request.labels:
        return ArrayImages(request.data, images, keys=keys)
    return ArrayImages(request.data, images, labels, classes=classes, keys=keys)


EMBEDDED = {"digits": open_digits, "shapes": open_shapes}
