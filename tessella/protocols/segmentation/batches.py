"""Images with masks as segmenters see them: random crops in training, whole images in the test.

    training  resize by a random factor -> crop (again, while one class fills it) -> flip -> colour -> normalise -> pad
    test      resize to the test size -> normalise; the mask stays as it is stored

The random decisions are numbers drawn at (seed, epoch, image id), as for pretraining: workers, ranks and restarts
cannot change them. Crops are padded by the mean colour, their masks by `IGNORE`.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tessella.data.decode import Unreadable
from tessella.data.masks.layouts import IGNORE, MaskedImages
from tessella.data.sampler import EpochSampler, check_shares, share
from tessella.data.threads import portions, run_ahead
from tessella.data.transform import resize_pixels
from tessella.errors import UserError
from tessella.ops.augment import normalise, turn_hue
from tessella.ops.philox import stream_key, uniforms
from tessella.protocols.segmentation.data import SegmentationData
from tessella.protocols.segmentation.recipes import CropSpec, SegmentationConfig

_TRIES = 10  # of a crop before one that a single class fills is accepted
_NUMBERS = 2 + 2 * _TRIES + 9  # uniforms per image; the order in which they are read is part of a figure


class MaskBatch(NamedTuple):
    """Training crops of one rank."""

    step: int  # of the training
    pixels: Tensor  # (b, 3, size, size) float32, normalised
    labels: Tensor  # (b, size, size) int64


class WholeImage(NamedTuple):
    """A test image."""

    row: int
    pixels: Tensor  # (1, 3, h, w) float32, normalised, at the test size
    mask: NDArray[np.uint8]  # (H, W) as stored


def fitted(width: int, height: int, bounds: tuple[int, int] | None, factor: float = 1.0) -> tuple[int, int]:
    """Width and height, at least 1, of an image that keeps its shape; all in pixels.

    Within `bounds` of the longest and the shortest side it becomes as large as both allow; None: its own size. `factor`
    multiplies the bounds, or the size.
    """
    if bounds is not None:
        longest, shortest = max(bounds) * factor, min(bounds) * factor
        factor = min(longest / max(width, height), shortest / min(width, height))
    return max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))


def draw_numbers(seed: int, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Everything random about the crops of some images in one epoch: (n, _NUMBERS) in (0, 1)."""
    return uniforms(stream_key(seed, "segm"), ids, epoch, [0], _NUMBERS)[:, 0]


def crop_with_mask(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], numbers: NDArray[np.float64], spec: CropSpec
) -> tuple[Tensor, NDArray[np.uint8]]:
    """One training crop, before it is normalised and padded.

    The crop is cut from the resized image; only its part of the image is resized, by Pillow's antialiased bilinear
    filter. The mask is resized to the nearest pixel. `numbers` is a row of `draw_numbers`.

    (H, W, 3) image and (H, W) mask -> (3, h, w) float32 in [0, 255] and (h, w) uint8, both sides at most `spec.size`.
    """
    low, high = spec.scale
    width, height = fitted(mask.shape[1], mask.shape[0], spec.resize, low + numbers[0] * (high - low))
    w, h = min(width, spec.size), min(height, spec.size)
    for place in numbers[2 : 2 + 2 * _TRIES].reshape(-1, 2):
        left, top = int(place[0] * (width - w + 1)), int(place[1] * (height - h + 1))
        rows = ((np.arange(top, top + h) + 0.5) * mask.shape[0] / height).astype(np.int64)
        columns = ((np.arange(left, left + w) + 0.5) * mask.shape[1] / width).astype(np.int64)
        labels = mask[rows[:, None], columns]
        if spec.most >= 1 or _is_mixed(labels, spec.most):
            break
    x, y = mask.shape[1] / width, mask.shape[0] / height
    box = (left * x, top * y, min((left + w) * x, mask.shape[1]), min((top + h) * y, mask.shape[0]))
    resized = Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    if numbers[1] < spec.flip:
        pixels, labels = pixels.flip(-1), labels[:, ::-1]
    return distort(pixels, numbers[2 + 2 * _TRIES :]) if spec.distort else pixels, np.ascontiguousarray(labels)


def distort(pixels: Tensor, numbers: NDArray[np.float64]) -> Tensor:
    """Brightness, contrast, saturation and hue, each with a chance of one half; contrast before or after the colours.

    As in SSD's training and in the segmentation code of OpenMMLab: brightness moves by up to 32 levels, contrast and
    saturation by a factor in [0.5, 1.5], hue by up to a tenth of a turn. Values stay within [0, 255] after each.

    Args:
        pixels: (3, h, w) float32 in [0, 255]; may be overwritten.
        numbers: nine in (0, 1): chance and strength of each of the four, and the place of contrast.
    """
    brightness, contrast, saturation, hue = (
        value if chance < 0.5 else None for chance, value in numbers[:8].reshape(4, 2).tolist()
    )
    if brightness is not None:
        pixels = (pixels + 32 * (2 * brightness - 1)).clamp_(0, 255)
    if contrast is not None and numbers[8] < 0.5:
        pixels = (pixels * (0.5 + contrast)).clamp_(0, 255)
    if saturation is not None:
        value, least = pixels.amax(dim=0), pixels.amin(dim=0)
        # In HSV saturation is (value - least) / value and at most 1.
        factor = torch.minimum(torch.tensor(0.5 + saturation), value / (value - least).clamp_min(1e-6))
        pixels = value - (value - pixels) * factor
    if hue is not None:
        turns = torch.full((1, 1, 1, 1), 0.1 * (2 * hue - 1))
        pixels = turn_hue(pixels[None] / 255, turns)[0] * 255
    if contrast is not None and numbers[8] >= 0.5:
        pixels = (pixels * (0.5 + contrast)).clamp_(0, 255)
    return pixels


def training_batches(
    data: SegmentationData, config: SegmentationConfig, first: int = 0, rank: int = 0, ranks: int = 1
) -> Generator[MaskBatch, None, None]:
    """One rank's part of every step's global batch, from step `first` on, epoch after epoch.

    An image or mask that cannot be read is replaced by the next that can be, with the numbers drawn for that one.

    Raises:
        UserError: the batch cannot be shared equally, a mask is wrong, or nothing can be read.
    """
    images, spec, device = data.train, config.crops, data.device
    order = EpochSampler(len(images), config.batch_size, config.seed)
    check_shares(config.batch_size, ranks, 1)

    def fill(batch: MaskBatch, rows: NDArray[np.int64], epoch: int, positions: list[int]) -> None:
        for position in positions:
            row, image, mask = _readable_from(images, int(rows[position]))
            crop, labels = crop_with_mask(image, mask, draw_numbers(config.seed, epoch, images.ids[[row]])[0], spec)
            _, h, w = crop.shape
            batch.pixels[position, :, :h, :w] = normalise(crop[None] / 255, data.mean, data.std)[0]
            batch.labels[position, :h, :w] = torch.from_numpy(labels)

    def drafts() -> Iterator[tuple[MaskBatch, list[partial[None]]]]:
        pinned = device.type == "cuda"
        for step in itertools.count(first):
            epoch, within = divmod(step, order.steps_per_epoch)
            [rows] = share(order.batch(epoch, within), rank, ranks, 1)
            shape = len(rows), spec.size, spec.size
            pixels = torch.zeros(shape[0], 3, *shape[1:], pin_memory=pinned)
            batch = MaskBatch(step, pixels, torch.full(shape, IGNORE, dtype=torch.uint8, pin_memory=pinned))
            yield batch, [partial(fill, batch, rows, epoch, positions) for positions in portions(len(rows))]

    with closing(run_ahead(drafts(), max(1, data.workers))) as done:
        for step, pixels, labels in done:
            yield MaskBatch(step, pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True).long())


def whole_images(
    data: SegmentationData, rows: NDArray[np.int64], resize: tuple[int, int] | None, skipped: dict[str, str]
) -> Generator[WholeImage, None, None]:
    """The test images of these (n,) rows, whole, one by one, each decoded ahead; memory holds a few at a time.

    `resize` are bounds as in `fitted`; `skipped` receives key -> reason of what cannot be read.
    """
    images = data.test

    def read(row: int, decoded: list[tuple[Tensor, NDArray[np.uint8]]]) -> None:
        try:
            image, mask = images.image(row), images.mask(row)
        except Unreadable as error:
            skipped[images.keys[row]] = error.reason
            return
        width, height = fitted(image.shape[1], image.shape[0], resize)
        same = (height, width) == image.shape[:2]
        decoded.append((torch.tensor(image) if same else resize_pixels(image, height, width), mask))

    def drafts() -> Iterator[tuple[tuple[int, list[tuple[Tensor, NDArray[np.uint8]]]], list[partial[None]]]]:
        for row in rows.tolist():
            decoded: list[tuple[Tensor, NDArray[np.uint8]]] = []
            yield (row, decoded), [partial(read, row, decoded)]

    with closing(run_ahead(drafts(), max(1, data.workers))) as done:
        for row, decoded in done:
            for pixels, mask in decoded:
                on_device = pixels.to(data.device).permute(2, 0, 1)[None].float().div_(255)
                yield WholeImage(row, normalise(on_device, data.mean, data.std), mask)


def _is_mixed(labels: NDArray[np.uint8], most: float) -> bool:
    """Whether several classes are there, and none fills more than its share of the labelled pixels."""
    counts = np.bincount(labels.ravel(), minlength=256)[:IGNORE]
    return bool((counts > 0).sum() > 1 and counts.max() < most * counts.sum())


def _readable_from(images: MaskedImages, row: int) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8]]:
    """The first row from `row` on whose image and mask can be read, and what they hold."""
    reason = ""
    for candidate in range(row, row + len(images)):
        candidate %= len(images)
        try:
            return candidate, images.image(candidate), images.mask(candidate)
        except Unreadable as error:
            reason = reason or f"{images.keys[candidate]}: {error.reason}"
    raise UserError(f"none of the images of {images.name} can be read with its mask, beginning with {reason}")
