"""Which images of one set are near-copies of images of another: scaled, encoded again, brighter, mirrored, cropped.

    gray 32 x 32 thumbnail, whole and cut at the border -> 80 lowest frequencies (DCT), weighted by frequency, length 1
    -> cosine with every image of the other set, as it is and mirrored -> above a threshold: a near-copy

Natural images lose power with the square of the frequency, so that the weights make all frequencies count alike.
Without the mean, and at length 1, a signature does not depend on brightness and contrast.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels of a thumbnail
CUTS = (0, 2, 3)  # pixels cut off at each border: an image may be a part of the other, by up to a fifth of its side
ORIENTATIONS = (  # what turns one image of a pair into the other
    "",
    "mirrored",
    "turned by 180 degrees",
    "upside down",
    "transposed",
    "turned by 90 degrees",
    "turned by 270 degrees",
    "mirrored and turned",
)
_LOWEST = 9  # frequencies in each direction
_LENGTH = _LOWEST**2 - 1  # of a signature: all but the mean
_FLAT = 1.0 / 255  # standard deviation of gray values below which an image shows nothing to compare
_LEAST, _MOST = 0.85, 0.99  # bounds of the threshold
_SAMPLE = 500  # images that say how alike different images are
_ROWS = 4096, 16_384  # of one block of pairs


class Pairs(NamedTuple):
    """Near-copies, ordered by the row of the first set."""

    first: Tensor  # (p,) int64 rows
    second: Tensor  # (p,) int64 rows
    similarity: Tensor  # (p,) float32, at most 1


def signatures(gray: Tensor) -> Tensor:
    """What is compared of each image.

    Args:
        gray: (n, 32, 32) float, in [0, 1].

    Returns:
        (n, 3, 80) float32 of length 1, for each of `CUTS`; zeros for an image without contrast.
    """
    parts = []
    for cut in CUTS:
        basis = _basis(SIDE - 2 * cut).to(gray)
        part = gray[:, cut : SIDE - cut, cut : SIDE - cut]
        spectrum = basis @ part @ basis.T * _frequencies().to(gray)
        flat = part.flatten(1).std(dim=1) < _FLAT
        parts.append(F.normalize(spectrum.flatten(1)[:, 1:], dim=1).masked_fill(flat[:, None], 0.0))
    return torch.stack(parts, dim=1)


def near_copies(
    first: Tensor,
    second: Tensor,
    *,
    same: bool = False,
    device: torch.device | str = "cpu",
    threshold: float | None = None,
) -> Pairs:
    """Compare every image of one set with every image of another.

    Args:
        first: (n, 3, 80) signatures.
        second: (m, 3, 80) signatures.
        same: both are one set: an image is not its own copy, and each pair is given in both orders.
        device: where the products run.
        threshold: least similarity of a copy; default: `threshold_for(second)`.
    """
    threshold = threshold_for(second, device) if threshold is None else threshold
    empty = torch.empty(0, dtype=torch.long)
    found = [(empty, empty, torch.empty(0))]
    for start in range(0, len(first), _ROWS[0]):
        for begin in range(0, len(second), _ROWS[1]):
            similarity = _similarity(first[start : start + _ROWS[0]], second[begin : begin + _ROWS[1]], device)
            rows, columns = (similarity >= threshold).nonzero(as_tuple=True)
            values = similarity[rows, columns]
            rows, columns = rows.cpu() + start, columns.cpu() + begin
            kept = rows != columns if same else torch.ones_like(rows, dtype=torch.bool)
            found.append((rows[kept], columns[kept], values.cpu()[kept]))
    pairs = [torch.cat(column) for column in zip(*found, strict=True)]
    order = pairs[0].argsort(stable=True)
    return Pairs(*(column[order] for column in pairs))


def threshold_for(images: Tensor, device: torch.device | str = "cpu") -> float:
    """The least similarity of a near-copy among images of this kind, in [0.85, 0.99].

    Different photos are never as similar as 0.85, but different handwritten digits are. A near-copy is at most a third
    as far away as the nearest of the other images is from an ordinary image: from one of four, to be exact, so that
    copies within the set may be many.

    Args:
        images: (n, 3, 80) signatures.
        device: where the products run.
    """
    rows = torch.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).round().long()
    nearest = torch.full((len(rows),), -1.0)
    for begin in range(0, len(images), _ROWS[1]):
        similarity = _similarity(images[rows], images[begin : begin + _ROWS[1]], device).cpu()
        inside = (rows >= begin) & (rows < begin + _ROWS[1])
        similarity[inside, rows[inside] - begin] = -1.0
        nearest = torch.maximum(nearest, similarity.amax(dim=1))
    usual = float(nearest.quantile(0.25)) if len(rows) else 0.0
    return min(max(1 - (1 - usual) / 3, _LEAST), _MOST)


def invariants(signature: Tensor) -> Tensor:
    """What stays of signatures when images are mirrored or turned by quarters: it proposes pairs to `pair_similarity`.

    Mirroring changes signs, and a quarter turn exchanges rows and columns, so that sums of absolute values stay.

    Args:
        signature: (..., 80) of length 1, or zeros.

    Returns:
        (..., 44) of length 1, or zeros.
    """
    size = F.pad(signature.float(), (1, 0)).abs().unflatten(-1, (_LOWEST, _LOWEST))
    upper = torch.triu_indices(_LOWEST, _LOWEST)
    both = (size + size.transpose(-1, -2))[..., upper[0], upper[1]]
    return F.normalize(both[..., 1:], dim=-1)


def pair_similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """How alike the images of each pair are, in the best of eight orientations.

    Args:
        a: (p, 3, 80) signatures.
        b: (p, 3, 80) signatures of their partners.

    Returns:
        (p,) the largest cosine of one image, whole, with a part of the other, and (p,) index into `ORIENTATIONS`.
    """
    a, b = a.float(), b.float()
    values = []
    for index, sign in _orientations():
        turned = a[..., index] * sign
        whole = (turned[:, :1] * b).sum(dim=-1).amax(dim=1)  # with the whole and each part of b
        part = (turned * b[:, :1]).sum(dim=-1).amax(dim=1)
        values.append(torch.maximum(whole, part))
    best = torch.stack(values, dim=1).max(dim=1)
    return best.values, best.indices


@cache
def _orientations() -> list[tuple[Tensor, Tensor]]:
    """For each of `ORIENTATIONS`: where the frequencies of a turned image come from, and their signs."""
    place = torch.arange(_LOWEST**2).view(_LOWEST, _LOWEST)
    alternate = 1.0 - 2.0 * (torch.arange(_LOWEST) % 2)
    left_right, upside_down = alternate.expand(_LOWEST, -1), alternate[:, None].expand(-1, _LOWEST)
    one = torch.ones(_LOWEST, _LOWEST)
    signs = one, left_right, left_right * upside_down, upside_down
    # Turned by a quarter: rows and columns change places, and one direction is reversed.
    turned = one, left_right, upside_down, left_right * upside_down
    found = [(place, sign) for sign in signs] + [(place.T, sign) for sign in turned]
    return [(index.flatten()[1:] - 1, sign.flatten()[1:].contiguous()) for index, sign in found]


def _similarity(a: Tensor, b: Tensor, device: torch.device | str) -> Tensor:
    """(n, 3, 80), (m, 3, 80) -> (n, m) on the device: the largest cosine of one image, whole, with a part of the other.

    Images are compared as they are and mirrored, which changes the sign of the odd horizontal frequencies.
    """
    a, b = a.to(device), b.to(device)
    signs = torch.ones(_LOWEST, _LOWEST, device=a.device)
    signs[:, 1::2] = -1.0
    best = a.new_full((len(a), len(b)), -1.0)
    for one in (a, a * signs.flatten()[1:]):
        for i, j in ((0, 0), *((0, cut) for cut in range(1, len(CUTS))), *((cut, 0) for cut in range(1, len(CUTS)))):
            torch.maximum(best, one[:, i] @ b[:, j].T, out=best)
    return best


@cache
def _basis(size: int) -> Tensor:
    """The lowest frequencies of the cosine transform, (9, size)."""
    place, frequency = torch.arange(size) + 0.5, torch.arange(_LOWEST)[:, None]
    return torch.cos(math.pi / size * frequency * place) * torch.where(frequency == 0, 0.5, 1.0).sqrt()


@cache
def _frequencies() -> Tensor:
    """(9, 9): the length of each frequency."""
    return torch.cartesian_prod(*[torch.arange(_LOWEST, dtype=torch.float32)] * 2).norm(dim=1).view(_LOWEST, _LOWEST)
