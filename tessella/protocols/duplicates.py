"""How many test images are near-copies of train images: on these, a figure measures memory.

The images are compared as `ops.near_copies` says; the backbone has no part in it. A copy that was scaled, encoded
again, brightened, mirrored or cut at the border is found; one that was turned by more than a few degrees is not.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from tessella import dist, files
from tessella.data.index import cache_folder
from tessella.data.transform import EvalTransform
from tessella.ops.near_copies import CUTS, SIDE, near_copies, signatures, threshold_for
from tessella.protocols.dense import DenseData
from tessella.protocols.features import ImageData
from tessella.protocols.lowshot import ChosenImages
from tessella.protocols.protocol import Protocol
from tessella.ranges import NonNegativeInt, Range

_SQUASHED = EvalTransform(2 * SIDE, 2 * SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), fit="both sides")
_GRAY = (0.299, 0.587, 0.114)
_SHOWN = 12  # pairs with thumbnails
_SIDE = 100  # pixels of a thumbnail and its margin
SHEET = "near-copies.jpg"


@dataclass(frozen=True)
class DuplicatesConfig:
    """What counts as a near-copy."""

    version: ClassVar[int] = 2
    # Of signatures, at least; default: by how alike the train images are.
    similarity: Annotated[float, Range(-1, 1)] | None = None
    listed: NonNegativeInt = 100  # pairs named in the record


class Signatures(nn.Module):
    """Pixels in [0, 1] -> signatures."""

    feature_dim = len(CUTS) * 80

    def extra_repr(self) -> str:
        """The version of the comparison, part of the key in the cache of features."""
        return "1"

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, 240)."""
        gray = (x * x.new_tensor(_GRAY).view(3, 1, 1)).sum(dim=1, keepdim=True)
        return signatures(F.interpolate(gray, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]).flatten(1)


def duplicates(
    backbone: nn.Module | None, data: ImageData | DenseData[Any], config: DuplicatesConfig
) -> dict[str, Any]:
    """Compare every test image with every train image.

    When both are the same images, an image is not its own copy.

    With `data.predictions`, thumbnails of the pairs are written there, as `near-copies.jpg`.

    Args:
        backbone: not used.
        data: the images, of whatever kind; their signatures are cached as features are.
        config: what counts.

    Returns:
        `near_duplicates`, the number of test images that have a near-copy among the train images, and their
        `near_duplicate_share`; `pairs`: those that are most alike, by name, with their similarity; `similarity`, from
        which on two images are called near-copies.
    """
    folder = data.predictions
    if isinstance(data, DenseData):
        sets = ChosenImages(data.train), ChosenImages(data.test)
        data = ImageData(*sets, _SQUASHED, device=data.device, workers=data.workers, cache=cache_folder())
    train, test = (data.features(_SIGNATURES, split, _SQUASHED) for split in ("train", "test"))
    ours, theirs = (features.x.unflatten(1, (len(CUTS), -1)) for features in (test, train))
    least = threshold_for(theirs, data.device) if config.similarity is None else config.similarity
    pairs = near_copies(ours, theirs, same=data.same_images, device=data.device, threshold=least)
    count = len(pairs.first.unique())
    most_alike = pairs.similarity.argsort(descending=True, stable=True)[: config.listed].tolist()
    rows = [(int(test.rows[pairs.first[i]]), int(train.rows[pairs.second[i]])) for i in most_alike]
    with dist.shared_errors():
        if rows and folder is not None and dist.rank() == 0:
            files.make_folder(folder)
            images = [(data.test.image(a), data.train.image(b)) for a, b in rows[:_SHOWN]]
            files.write_bytes(folder / SHEET, _sheet(images))
    return {
        "near_duplicates": count,
        "near_duplicate_share": count / len(test.x),
        "pairs": [
            {"test": data.test.key(a), "train": data.train.key(b), "similarity": round(float(pairs.similarity[i]), 4)}
            for i, (a, b) in zip(most_alike, rows, strict=True)
        ],
        "similarity": least,
        "leave_one_out": data.same_images,
    }


def _sheet(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> bytes:
    """A JPEG with one pair of thumbnails per row: test image, train image."""
    sheet = Image.new("RGB", (2 * _SIDE, len(pairs) * _SIDE), "white")
    for row, pair in enumerate(pairs):
        for column, pixels in enumerate(pair):
            thumbnail = ImageOps.contain(Image.fromarray(pixels), (_SIDE - 4, _SIDE - 4))
            sheet.paste(thumbnail, (column * _SIDE, row * _SIDE))
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


_SIGNATURES = Signatures()

DUPLICATES = Protocol(
    "Near-duplicates",
    DuplicatesConfig,
    duplicates,
    {"duplicates": DuplicatesConfig()},
    kinds=("classes", "boxes", "masks"),
    quick={"classes": ("duplicates",)},
)
