"""Is an export what it was made of? The same real images through our network and through what a tool has loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella.data.sources import ImageSet
from tessella.data.transform import EvalTransform
from tessella.errors import UserError

LIMIT = 1e-5  # relative difference that float32 may make
_MOST_IMAGES = 16  # of a data set
_SAMPLES = ("china.jpg", "flower.jpg")  # photographs that scikit-learn brings


class Pictures(NamedTuple):
    """Images to compare on."""

    source: str  # in words; never a name of the user's
    pixels: list[NDArray[np.uint8]]  # (h, w, 3) each, of any size
    inputs: Tensor  # (n, 3, size, size), through our transform


Reader = Callable[[Pictures], Mapping[str, Tensor]]  # what a tool computes, by the names of `Model.outputs`


def pictures(transform: EvalTransform, images: ImageSet | None) -> Pictures:
    """Images to compare on.

    Args:
        transform: of the network.
        images: the user's own; some of them, evenly spaced. None: two photographs, and parts of them.

    Raises:
        UserError: one of them cannot be read.
    """
    if images is None:
        source, pixels = "two photographs that scikit-learn brings, and parts of them", _samples()
    else:
        rows = np.linspace(0, len(images) - 1, min(len(images), _MOST_IMAGES)).round().astype(int)
        source = f"{len(rows)} images of a data set of {len(images)}, sha256 {images.fingerprint[:16]}"
        try:
            pixels = [np.ascontiguousarray(images.image(int(row))) for row in rows]
        except OSError as error:
            raise UserError(f"an image of {images.name} cannot be read ({error}): leave --data out") from None
    crops = torch.stack([transform.crop(image) for image in pixels])
    return Pictures(source, pixels, transform.normalised(crops))


def _samples() -> list[NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_image

    found = []
    for name in _SAMPLES:
        photo = load_sample_image(name)
        height, width, _ = photo.shape
        found += [photo, photo[: height // 2], photo[:, width // 3 :], photo[height // 3 :, : width // 3]]
    return [np.ascontiguousarray(pixels) for pixels in found]


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest `relative_difference` of the outputs that both have; NaN where one is."""
    found = [relative_difference(ours[name], values) for name, values in theirs.items()]
    return max(found, key=lambda value: (value != value, value))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """How far outputs (n, d) are apart: of each image the largest difference over the largest value of ours."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    ours, theirs = ours.double(), theirs.double()
    return float(((ours - theirs).abs().amax(1) / ours.abs().amax(1).clamp(min=1e-12)).max())
