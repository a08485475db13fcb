"""Images in a numpy archive: `npz:FILE` with arrays `images` (N, H, W, 3) uint8 and, if there are classes, `labels`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tessella import UserError
from tessella.data.sources import ArrayImages, ImageSet


def open_npz(data: str, labels: bool) -> ImageSet:
    """Open `npz:FILE`.

    Args:
        data: as the user gave it.
        labels: whether classes are asked for.

    Raises:
        UserError: there is no such file, or it lacks an array.
    """
    path = Path(data.removeprefix("npz:"))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, classes = arrays["images"], arrays["labels"] if labels else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be used: {error}. Give an .npz file with images, and labels for classes"
        ) from None
    return ArrayImages(data, images, classes)
