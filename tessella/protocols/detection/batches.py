"""Annotated images as detectors see them: resized, mirrored, padded to one size, with boxes and masks moved along.

What is random about an image (shorter side, mirroring, which anchors are drawn) is a function of the seed, the epoch
and the image's id; which images make a batch is one of the seed and the step. So ranks share a batch without talking.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella.data.boxes.layouts import AnnotatedImages
from tessella.data.boxes.outlines import paint
from tessella.data.decode import Unreadable
from tessella.data.threads import run_ahead
from tessella.data.transform import resize_pixels as resize
from tessella.errors import UserError
from tessella.ops.augment import normalise
from tessella.ops.philox import permutation, stream_key, uniforms
from tessella.text import printable

_UNREADABLE_SHARE = 0.01  # of the training images that may turn out damaged; one always may


class Sample(NamedTuple):
    """What is to be seen of one image."""

    position: int  # in the annotated images
    height: int  # pixels after resizing
    width: int
    mirror: bool
    seed: int  # of the draw of anchors and regions


class DetectionBatch(NamedTuple):
    """Images of one rank."""

    pixels: Tensor  # (b, 3, h, w) float32 on the device, normalised, zero beyond each image
    sizes: list[tuple[int, int]]  # height and width of each image
    targets: list[dict[str, Any]]  # boxes, labels from 1, seed, and masks if asked for
    samples: list[Sample]
    readable: list[bool]


@dataclass
class Stream:
    """An endless order of training images: each once per epoch, epoch after epoch, batches across their borders."""

    data: AnnotatedImages
    positions: NDArray[np.int64]  # of the images that are trained on
    sizes: tuple[int, ...]  # shorter sides to draw from, pixels
    longest: int  # pixels of the longer side, at most
    mirror: float  # chance
    seed: int
    _kept: tuple[int, NDArray[np.int64]] = field(default=(-1, np.empty(0, dtype=np.int64)), init=False, repr=False)

    def batch(self, step: int, batch_size: int) -> list[Sample]:
        """The images of one step over all ranks."""
        return [self._sample(number) for number in range(step * batch_size, (step + 1) * batch_size)]

    def _sample(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.positions))
        if self._kept[0] != epoch:
            order = permutation(stream_key(self.seed, "dord"), np.arange(len(self.positions)), epoch)
            self._kept = epoch, self.positions[order]
        position = int(self._kept[1][place])
        image_id = self.data.images.ids[self.data.rows[position]]
        size, mirror, draw = uniforms(stream_key(self.seed, "dett"), [image_id], epoch, [0], 3)[0, 0].tolist()
        shorter = self.sizes[int(size * len(self.sizes))]
        height, width = resized(self.data.size(position), shorter, self.longest)
        return Sample(position, height, width, mirror < self.mirror, int(draw * 2**32))


def resized(size: tuple[int, int], shorter: int, longest: int) -> tuple[int, int]:
    """Height and width with the shorter side as asked, or less where the longer one would be too long.

    Args:
        size: width and height, pixels.
        shorter: pixels.
        longest: pixels.
    """
    width, height = size
    scale = min(shorter / min(size), longest / max(size))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def batches(
    data: AnnotatedImages,
    plans: Iterator[tuple[list[Sample], list[Sample]]],
    *,
    divisor: int,
    masks: bool,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    workers: int,
    skipped: dict[str, str],
) -> Iterator[DetectionBatch]:
    """Execute plans on threads, some batches ahead.

    A damaged image is shown black and without objects, and told in `skipped`.

    Args:
        data: what to read.
        plans: per step, the samples of all ranks, which decide the padded size, and those of this rank.
        divisor: padded sides are multiples of it.
        masks: also paint the masks.
        mean: of each channel, values in [0, 1].
        std: of each channel.
        device: where the batches go.
        workers: threads that decode.
        skipped: receives key -> reason of what could not be decoded.
    """

    def drafts() -> Iterator[tuple[Any, Sequence[Callable[[], None]]]]:
        for everyone, mine in plans:
            height = max(-(-sample.height // divisor) * divisor for sample in everyone)
            width = max(-(-sample.width // divisor) * divisor for sample in everyone)
            pixels = torch.zeros(len(mine), height, width, 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
            targets: list[dict[str, Any]] = [{} for _ in mine]
            readable = [True] * len(mine)
            tasks = [partial(fill, pixels, targets, readable, sample, i) for i, sample in enumerate(mine)]
            yield (pixels, targets, readable, mine), tasks

    def fill(pixels: Tensor, targets: list[dict[str, Any]], readable: list[bool], sample: Sample, i: int) -> None:
        try:
            shown = _pixels(data, sample)
            pixels[i, : sample.height, : sample.width] = shown
        except Unreadable as error:
            readable[i] = False
            skipped[data.key(sample.position)] = error.reason
        targets[i] = _target(data, sample, masks, empty=not readable[i])

    with closing(run_ahead(drafts(), max(1, workers))) as done:
        for pixels, targets, readable, mine in done:
            images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32).div_(255)
            images = normalise(images, mean, std)
            for i, sample in enumerate(mine):
                images[i, :, sample.height :] = 0
                images[i, :, :, sample.width :] = 0
            on_device = [
                {name: x.to(device) if isinstance(x, Tensor) else x for name, x in target.items()} for target in targets
            ]
            sizes = [(sample.height, sample.width) for sample in mine]
            yield DetectionBatch(images, sizes, on_device, mine, readable)


def training_plans(
    stream: Stream, first: int, steps: int, batch_size: int, rank: int, ranks: int
) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """The samples of all ranks and of one, for each of some steps."""
    share = batch_size // ranks
    for step in range(first, first + steps):
        everyone = stream.batch(step, batch_size)
        yield everyone, everyone[rank * share : (rank + 1) * share]


def test_plans(
    data: AnnotatedImages, positions: NDArray[np.int64], shorter: int, longest: int
) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """One image at a time, so that what is found in it does not depend on its neighbours' sizes."""
    for position in positions.tolist():
        one = [Sample(position, *resized(data.size(position), shorter, longest), mirror=False, seed=0)]
        yield one, one


def check_damage(skipped: dict[str, str], images: int) -> None:
    """Refuse a training set of which too much is damaged.

    Raises:
        UserError: more than one image and more than 1 % could not be decoded.
    """
    if len(skipped) > max(1, _UNREADABLE_SHARE * images):
        examples = "; ".join(f"{printable(key)}: {why}" for key, why in itertools.islice(skipped.items(), 3))
        raise UserError(
            f"{len(skipped)} of {images} training images could not be decoded, more than the allowed "
            f"{_UNREADABLE_SHARE:.0%} ({examples}): repair them, or take them out of the annotations"
        )


def _pixels(data: AnnotatedImages, sample: Sample) -> Tensor:
    image = data.images.image(int(data.rows[sample.position]))
    width, height = data.size(sample.position)
    if image.shape != (height, width, 3):
        raise Unreadable(f"{image.shape[1]} x {image.shape[0]} pixels, but {width} x {height} when it was indexed")
    shown = resize(image, sample.height, sample.width)
    return shown.flip(1) if sample.mirror else shown


def _target(data: AnnotatedImages, sample: Sample, masks: bool, empty: bool) -> dict[str, Any]:
    """Boxes, labels, seed and masks of an image as it is shown."""
    boxes, labels, outlines = data.objects(sample.position)
    if empty:
        boxes, labels, outlines = boxes[:0], labels[:0], []
    width, height = data.size(sample.position)
    boxes = boxes * np.tile([sample.width / width, sample.height / height], 2)
    if sample.mirror:
        boxes = np.stack([sample.width - boxes[:, 2], boxes[:, 1], sample.width - boxes[:, 0], boxes[:, 3]], axis=1)
    target: dict[str, Any] = {
        "boxes": torch.from_numpy(boxes.astype(np.float32)),
        "labels": torch.from_numpy(labels) + 1,
        "seed": sample.seed,
    }
    if masks:
        painted = np.zeros((len(outlines), sample.height, sample.width), dtype=np.uint8)
        for mask, outline in zip(painted, outlines, strict=True):
            assert outline is not None  # refused before training
            mask[:] = paint(outline, width, height, (sample.height, sample.width))
        target["masks"] = torch.from_numpy(np.ascontiguousarray(painted[:, :, ::-1]) if sample.mirror else painted)
    return target
