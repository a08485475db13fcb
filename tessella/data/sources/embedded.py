"""Data sets that need no download, by name: scikit-learn's digits, and drawn shapes (see `shapes`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tessella.data.sources.images import ArrayImages, ImageSet
from tessella.data.sources.messages import check_split
from tessella.data.sources.shapes import CLASSES as SHAPES
from tessella.data.sources.shapes import draw_shapes


def open_digits(data: str, part: str | None, labels: bool) -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to 32 x 32; every fifth for tests."""
    from PIL import Image
    from sklearn.datasets import load_digits

    check_split(data, part or "all", ("train", "test", "all"))
    bunch = load_digits()
    rows = _rows_of_split(len(bunch.target), part, testing=np.arange(len(bunch.target)) % 5 == 0)
    levels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(level).resize((32, 32), Image.Resampling.BICUBIC)) for level in levels]
    return ArrayImages(
        data,
        np.stack(enlarged),
        bunch.target[rows] if labels else None,
        classes=[str(digit) for digit in range(10)] if labels else None,
        keys=[f"digits/{row:04d}" for row in rows],
    )


def open_shapes(data: str, part: str | None, labels: bool) -> ImageSet:
    """Generated shapes, 2000 for training and 500 for testing."""
    check_split(data, part or "all", ("train", "test", "all"))
    rows = _rows_of_split(2500, part, testing=np.arange(2500) >= 2000)
    images, numbers = draw_shapes(rows)
    return ArrayImages(
        data,
        images,
        numbers if labels else None,
        classes=SHAPES if labels else None,
        keys=[f"shapes/{row:04d}" for row in rows],
    )


def _rows_of_split(count: int, part: str | None, testing: NDArray[np.bool_]) -> NDArray[np.int64]:
    if part in (None, "all"):
        return np.arange(count)
    return np.flatnonzero(testing if part == "test" else ~testing)


EMBEDDED = {"digits": open_digits, "shapes": open_shapes}  # (data, part, labels) -> images
