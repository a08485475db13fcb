"""Annotated images as detectors see them: resized, mirrored, padded to one size, with boxes and masks moved along.

What is random about an image (shorter side, mirroring, which anchors are drawn) is a function of the seed, the epoch
and the image's id; which images make a batch is a function of the seed and the step. So ranks share a batch without
communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from tessella.data.transform import resize_pixels
from tessella.errors import UserError
from tessella.ops.augment import normalise
from tessella.ops.philox import permutation, stream_key, uniforms
from tessella.protocols.detection.data import DetectionData
from tessella.text import printable

_UNREADABLE_SHARE = 0.01  # of the training images that may turn out damaged; one always may


class Sample(NamedTuple):
    """What is to be seen of one image."""

    position: int  # in the annotated images
    height: int  # pixels after resizing
    width: int
    mirror: bool = False
    seed: int = 0  # of the draw of anchors and regions


Plan = tuple[list[Sample], list[Sample]]  # the samples of all ranks in a step, which decide its size, and of this rank


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

    images: AnnotatedImages
    positions: NDArray[np.int64]  # of the images that are trained on
    sizes: tuple[int, ...]  # shorter sides to draw from, pixels
    longest: int  # pixels of the longer side, at most
    mirror: float  # chance
    seed: int
    _order: tuple[int, NDArray[np.int64]] = field(default=(-1, np.empty(0, dtype=np.int64)), init=False, repr=False)

    def batch(self, step: int, batch_size: int) -> list[Sample]:
        """The images of one step over all ranks."""
        return [self._sample(number) for number in range(step * batch_size, (step + 1) * batch_size)]

    def plans(self, first: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Plan]:
        """The samples of every step from `first` on; `batch_size` counts those of all ranks."""
        share = batch_size // ranks
        for step in itertools.count(first):
            samples = self.batch(step, batch_size)
            yield samples, samples[rank * share : (rank + 1) * share]

    def _sample(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.positions))
        if self._order[0] != epoch:
            order = permutation(stream_key(self.seed, "dord"), np.arange(len(self.positions)), epoch)
            self._order = epoch, self.positions[order]
        position = int(self._order[1][place])
        image_id = self.images.images.ids[self.images.rows[position]]
        size, mirror, draw = uniforms(stream_key(self.seed, "dett"), [image_id], epoch, [0], 3)[0, 0].tolist()
        shorter = self.sizes[int(size * len(self.sizes))]
        height, width = resized(self.images.size(position), shorter, self.longest)
        return Sample(position, height, width, mirror < self.mirror, int(draw * 2**32))


def test_plans(images: AnnotatedImages, positions: Iterable[int], shorter: int, longest: int) -> Iterator[Plan]:
    """One image at a time, so that detections do not depend on the sizes of other images."""
    for position in positions:
        sample = Sample(int(position), *resized(images.size(position), shorter, longest))
        yield [sample], [sample]


def resized(size: tuple[int, int], shorter: int, longest: int) -> tuple[int, int]:
    """Height and width of an image of `size` (width, height) with the shorter side at `shorter`, all in pixels.

    The sides are smaller where the longer one would exceed `longest`.
    """
    width, height = size
    scale = min(shorter / min(size), longest / max(size))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def batches(
    images: AnnotatedImages,
    plans: Iterable[Plan],
    data: DetectionData,
    *,
    divisor: int,
    masks: bool,
    skipped: dict[str, str],
    allowed: int | None = None,
) -> Generator[DetectionBatch, None, None]:
    """Decode on threads, some batches ahead. A damaged image is shown black and without objects.

    Args:
        images: what to read.
        plans: of the steps.
        data: mean and deviation of each channel, device and threads.
        divisor: padded sides are multiples of it.
        masks: also paint the masks.
        skipped: receives key -> reason of what could not be decoded.
        allowed: of so many images, 1 % may be damaged, or one; default: any number.

    Raises:
        UserError: more are damaged than allowed.
    """

    def drafts() -> Iterator[tuple[Any, Sequence[Callable[[], None]]]]:
        for samples, mine in plans:
            height = max(-(-sample.height // divisor) * divisor for sample in samples)
            width = max(-(-sample.width // divisor) * divisor for sample in samples)
            pinned = data.device.type == "cuda"
            pixels = torch.zeros(len(mine), height, width, 3, dtype=torch.uint8, pin_memory=pinned)
            targets: list[dict[str, Any]] = [{} for _ in mine]
            readable = [True] * len(mine)
            tasks = [partial(fill, pixels, targets, readable, sample, i) for i, sample in enumerate(mine)]
            yield (pixels, targets, readable, mine), tasks

    def fill(pixels: Tensor, targets: list[dict[str, Any]], readable: list[bool], sample: Sample, i: int) -> None:
        try:
            pixels[i, : sample.height, : sample.width] = _pixels(images, sample)
        except Unreadable as error:
            readable[i] = False
            skipped[images.key(sample.position)] = error.reason
        targets[i] = _target(images, sample, masks, empty=not readable[i])

    with closing(run_ahead(drafts(), max(1, data.workers))) as done:
        for pixels, targets, readable, mine in done:
            _check_damage(skipped, allowed)
            x = pixels.to(data.device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32).div_(255)
            x = normalise(x, data.mean, data.std)
            for i, sample in enumerate(mine):
                x[i, :, sample.height :] = 0
                x[i, :, :, sample.width :] = 0
            on_device = [
                {name: value.to(data.device) if isinstance(value, Tensor) else value for name, value in target.items()}
                for target in targets
            ]
            yield DetectionBatch(x, [(sample.height, sample.width) for sample in mine], on_device, mine, readable)


def _check_damage(skipped: dict[str, str], images: int | None) -> None:
    if images is not None and len(skipped) > max(1, _UNREADABLE_SHARE * images):
        examples = "; ".join(f"{printable(key)}: {why}" for key, why in itertools.islice(skipped.items(), 3))
        raise UserError(
            f"{len(skipped)} of {images} training images could not be decoded, more than the allowed "
            f"{_UNREADABLE_SHARE:.0%} ({examples}): repair them, or take them out of the annotations"
        )


def _pixels(images: AnnotatedImages, sample: Sample) -> Tensor:
    image = images.images.image(int(images.rows[sample.position]))
    width, height = images.size(sample.position)
    if image.shape != (height, width, 3):
        raise Unreadable(f"{image.shape[1]} x {image.shape[0]} pixels, but {width} x {height} when it was indexed")
    pixels = resize_pixels(image, sample.height, sample.width)
    return pixels.flip(1) if sample.mirror else pixels


def _target(images: AnnotatedImages, sample: Sample, masks: bool, empty: bool) -> dict[str, Any]:
    """Boxes, labels, seed and masks of an image as it is shown."""
    boxes, labels, outlines = images.objects(sample.position)
    if empty:
        boxes, labels, outlines = boxes[:0], labels[:0], []
    width, height = images.size(sample.position)
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
