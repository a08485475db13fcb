"""How many test images are near-copies of train images: what a figure measures on them is memory.

The images are compared as `ops.near_copies` says; the backbone has no part in it. A copy that was scaled, encoded
again, brightened, mirrored or cut at the border is found; one that was turned by more than a few degrees is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

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
        """What tells one way to compare from another in the cache of features."""
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

    Args:
        backbone: not used; a protocol is given one.
        data: the images; it keeps their signatures as it keeps features.
        config: what counts.

    Returns:
        `near_duplicates`, the number of test images that have a near-copy among the train images, and their
        `near_duplicate_share`; `pairs`: those that are most alike, by name, with their similarity; `similarity`, from
        which on two images are called near-copies.
    """
    if isinstance(data, DenseData):
        sets = ChosenImages(data.train), ChosenImages(data.test)
        data = ImageData(*sets, _SQUASHED, device=data.device, workers=data.workers, cache=cache_folder())
    train, test = (data.features(_SIGNATURES, split, _SQUASHED) for split in ("train", "test"))
    ours, theirs = (found.x.unflatten(1, (len(CUTS), -1)) for found in (test, train))
    least = threshold_for(theirs, data.device) if config.similarity is None else config.similarity
    pairs = near_copies(ours, theirs, same=data.same_images, device=data.device, threshold=least)
    count = len(pairs.first.unique())
    named = [
        {
            "test": data.test.key(int(test.rows[pairs.first[i]])),
            "train": data.train.key(int(train.rows[pairs.second[i]])),
            "similarity": round(float(pairs.similarity[i]), 4),
        }
        for i in pairs.similarity.argsort(descending=True, stable=True)[: config.listed].tolist()
    ]
    return {
        "near_duplicates": count,
        "near_duplicate_share": count / len(test.x),
        "pairs": named,
        "similarity": least,
        "leave_one_out": data.same_images,
    }


_SIGNATURES = Signatures()


DUPLICATES = Protocol(
    "Near-duplicates",
    DuplicatesConfig,
    duplicates,
    {"duplicates": DuplicatesConfig()},
    kinds=("classes", "boxes", "masks"),
    quick={"classes": ("duplicates",)},
)
