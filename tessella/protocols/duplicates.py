"""How many test images are near-copies of train images: what a figure measures on them is memory.

    gray 9 x 8 thumbnail -> which of two neighbours is brighter: 64 bits (dHash) -> few bits differ -> a candidate
    correlation of the thumbnails, cosine of the features less their mean -> confirmed, or not

A copy that was scaled, encoded anew or slightly brightened is found; one that was mirrored, rotated or cropped is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.data.transform import EvalTransform
from tessella.protocols.features import EvalData, progress
from tessella.ranges import NonNegativeInt, Range

_SIDE = 64  # pixels to which an image is squashed before it is hashed
_BITS, _PIXELS = 64, 72  # of a thumbnail
_TRAIN_ROWS, _TEST_ROWS = 16_384, 512  # of one block of pairs
_GRAY = (0.299, 0.587, 0.114)
_FLAT = 0.01  # of white; a smaller step between two neighbours is no edge but noise


@dataclass(frozen=True)
class DuplicatesConfig:
    """What counts as a near-copy: all three conditions."""

    version: ClassVar[int] = 1
    bits: Annotated[int, Range(0, 64)] = 6  # of 64 that may differ
    correlation: Annotated[float, Range(-1, 1)] = 0.98  # at least; of the thumbnails
    cosine: Annotated[float, Range(-1, 1)] = 0.9  # at least; of features less the train images' mean
    listed: NonNegativeInt = 100  # pairs named in the record


class DifferenceHash(nn.Module):
    """64 signs: whether a pixel of the thumbnail is brighter than its right neighbour; and the thumbnail."""

    feature_dim = _BITS + _PIXELS

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] -> (b, 136): 1 or -1, 0 where there is no edge to speak of; then pixels in [0, 1]."""
        gray = (x * x.new_tensor(_GRAY).view(3, 1, 1)).sum(dim=1, keepdim=True)
        small = F.interpolate(gray, (8, 9), mode="bilinear", antialias=True)[:, 0]
        step = small[:, :, :-1] - small[:, :, 1:]
        signs = torch.where(step.abs() < _FLAT, 0.0, step.sign())
        return torch.cat([signs.flatten(1), small.flatten(1)], dim=1)


def duplicates(backbone: nn.Module, data: EvalData, config: DuplicatesConfig) -> dict[str, Any]:
    """Compare every test image with every train image.

    When both are the same images, an image is not its own copy.

    Returns:
        `near_duplicates`, the number of test images that have a near-copy among the train images, and their
        `near_duplicate_share`; `pairs`: some of them, by name, with the bits that differ and the cosine.
    """
    small = EvalTransform(_SIDE, _SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), squash=True)
    hasher = DifferenceHash()
    train_hash, test_hash = (data.features(hasher, split, small) for split in ("train", "test"))
    train, test = data.features(backbone, "train"), data.features(backbone, "test")
    middle = train.x.mean(dim=0)
    found = torch.zeros(len(test.x), dtype=torch.bool)
    pairs: list[dict[str, Any]] = []
    blocks = range(0, len(test.x), _TEST_ROWS)
    for start in progress(blocks, "near-duplicates", len(blocks)):
        for test_row, train_row, bits in _candidates(test_hash.x, train_hash.x, start, config.bits, data):
            near = F.cosine_similarity(test.x[test_row] - middle, train.x[train_row] - middle, dim=1)
            alike = _correlation(test_hash.x[test_row, _BITS:], train_hash.x[train_row, _BITS:])
            close = (near >= config.cosine) & (alike >= config.correlation)
            found[test_row[close]] = True
            for i in close.nonzero()[: max(0, config.listed - len(pairs)), 0].tolist():
                names = data.test.key(int(test.rows[test_row[i]])), data.train.key(int(train.rows[train_row[i]]))
                pairs.append({"test": names[0], "train": names[1], "bits": float(bits[i]), "cosine": float(near[i])})
    return {
        "near_duplicates": int(found.sum()),
        "near_duplicate_share": float(found.double().mean()),
        "pairs": pairs,
        "leave_one_out": data.same_images,
    }


def _candidates(
    test: Tensor, train: Tensor, start: int, most: int, data: EvalData
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Test rows from `start` on, train rows and distances of the pairs whose hashes differ in few bits.

    The distance is |a - b|² / 4: 1 for opposite signs, 1/4 for an edge against none. One matrix product gives it for
    all pairs of a block.
    """
    part = test[start : start + _TEST_ROWS, :_BITS].to(data.device)
    results = []
    for first in range(0, len(train), _TRAIN_ROWS):
        other = train[first : first + _TRAIN_ROWS, :_BITS].to(data.device)
        squares = part.square().sum(dim=1)[:, None] + other.square().sum(dim=1)
        distance = (squares - 2 * part @ other.T) / 4
        if data.same_images:
            own = torch.arange(len(part), device=data.device) + start
            distance[own[:, None] == torch.arange(len(other), device=data.device) + first] = torch.inf
        rows, columns = (distance <= most).nonzero(as_tuple=True)
        results.append((rows.cpu() + start, columns.cpu() + first, distance[rows, columns].cpu()))
    return results


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of each row of (n, p) with its counterpart, (n,); 1 for two rows without contrast, 0 for one."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    flat_a, flat_b = (x.abs().amax(dim=1) < _FLAT for x in (a, b))
    return torch.where(flat_a | flat_b, (flat_a & flat_b).float(), F.cosine_similarity(a, b, dim=1))
