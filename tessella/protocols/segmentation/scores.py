"""How segmenters are judged: ONE confusion matrix over all pixels of the test set, at the masks' own sizes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessella import dist
from tessella.data.masks.layouts import IGNORE
from tessella.errors import UserError
from tessella.ops.philox import stream_key, uniforms
from tessella.protocols.features import from_all_ranks, gather_rows, progress, rank_rows
from tessella.protocols.segmentation.batches import WholeImage, whole_images
from tessella.protocols.segmentation.data import SegmentationData
from tessella.protocols.segmentation.networks import Segmenter
from tessella.protocols.segmentation.predictions import write_mask
from tessella.protocols.segmentation.recipes import SegmentationConfig
from tessella.text import printable

_DRAWS = 1000  # of test sets, for the interval


class Judgement(NamedTuple):
    """Counts over the test images, equal on every rank."""

    confusion: NDArray[np.int64]  # (classes, classes) pixels: row the truth, column the prediction
    per_image: NDArray[np.int64]  # (images, 3, classes) pixels: right, true, predicted
    skipped: dict[str, str]

    @property
    def iou(self) -> NDArray[np.float64]:
        """(classes,) of each class; NaN where it is neither there nor predicted."""
        return intersection_over_union(
            np.stack([np.diag(self.confusion), self.confusion.sum(axis=1), self.confusion.sum(axis=0)])
        )


def intersection_over_union(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Of each class: right / (true + predicted - right).

    Args:
        counts: (..., 3, classes) pixels: right, true, predicted.

    Returns:
        (..., classes) in [0, 1]; NaN for a class that is neither there nor predicted.
    """
    right, true, predicted = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    union = true + predicted - right
    return np.divide(right, union, out=np.full(union.shape, np.nan), where=union > 0)


def judge(
    segmenter: Segmenter, data: SegmentationData, config: SegmentationConfig, folder: Path | None = None
) -> Judgement:
    """Count what is right and wrong in every test image; ranks share the images.

    Args:
        segmenter: put into eval mode.
        data: its test images are judged.
        config: how images are resized, and the windows in which they are seen.
        folder: receives the predicted masks.

    Raises:
        UserError: no image with a label can be read.
    """
    rows, classes = rank_rows(len(data.test)), segmenter.classes
    confusion = torch.zeros(classes * classes, dtype=torch.long, device=data.device)
    per_image = torch.zeros(len(rows), 3, classes, dtype=torch.long)
    skipped: dict[str, str] = {}
    segmenter.eval()
    with contextlib.closing(whole_images(data, rows, config.crops.resize, skipped)) as images:
        for item in progress(images, "judging masks", len(rows)):
            with torch.inference_mode():
                predicted = predict(segmenter, item, config.window, config.window_stride)
            if folder is not None:
                write_mask(folder, data.test.keys[item.row], predicted.cpu().numpy())
            truth = torch.from_numpy(item.mask).to(data.device).long()
            counted = truth != IGNORE
            cells = torch.bincount(truth[counted] * classes + predicted[counted], minlength=classes * classes)
            confusion += cells
            table = cells.view(classes, classes).cpu()
            place = int(np.searchsorted(rows, item.row))
            per_image[place] = torch.stack([table.diagonal(), table.sum(dim=1), table.sum(dim=0)])
    whole = dist.all_reduce_sum(confusion).view(classes, classes).cpu().numpy()
    unreadable = from_all_ranks(list(skipped.items()))
    if not whole.any():
        key, reason = min(unreadable)
        raise UserError(
            f"none of the labelled images of {data.test.name} can be read, such as {printable(key)}: {reason}"
        )
    return Judgement(whole, gather_rows(per_image, len(data.test), data.device).numpy(), dict(unreadable))


def predict(segmenter: Segmenter, image: WholeImage, window: int | None = None, stride: int = 0) -> Tensor:
    """The class of every pixel of an image, at its mask's size: (H, W) int64.

    Args:
        segmenter: in eval mode.
        image: at the size at which it is seen.
        window: side in pixels of square windows whose scores are averaged where they overlap; None: the whole image.
        stride: of the windows.
    """
    if window is None:
        [scores] = segmenter(image.pixels)
        return segmenter.best(scores, *image.mask.shape)
    height, width = image.pixels.shape[-2:]
    parts = [
        (..., slice(top, top + window), slice(left, left + window))
        for top in _starts(height, window, stride)
        for left in _starts(width, window, stride)
    ]
    count = torch.zeros(height, width, device=image.pixels.device)
    total = torch.zeros(1, segmenter.classes, height, width, device=image.pixels.device)
    for part in parts:
        [scores] = segmenter(image.pixels[part])
        total[part] += scores
        count[part] += 1
    return segmenter.best(total / count, *image.mask.shape)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover a side; the last ends with it."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def figures(judged: Judgement, classes: list[str]) -> dict[str, Any]:
    """Means over the classes, figures of each class, and those to expect with shuffled labels."""
    confusion, iou = judged.confusion, judged.iou
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    by_chance = np.outer(true, predicted) / max(1, confusion.sum())  # expected when the pixels' labels are shuffled
    return _means(confusion) | {
        "permuted": _means(by_chance),
        "per_class": {name: float(x) for name, x in zip(classes, iou, strict=True) if not np.isnan(x)},
        "classes": len(classes),
    }


def _means(confusion: NDArray[Any]) -> dict[str, float]:
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = true > 0
    return {
        "miou": float(np.nanmean(intersection_over_union(np.stack([right, true, predicted])))),
        "pixel_accuracy": float(right.sum() / true.sum()),
        "mean_accuracy": float((right[present] / true[present]).mean()),
    }


def interval(per_image: NDArray[np.int64], seed: int) -> list[float]:
    """Where mean IoU lies in 95 of 100 test sets of as many images, drawn from this one with replacement."""
    images = len(per_image)
    flat = per_image.reshape(images, -1).astype(np.float64)
    values = []
    for draw in range(_DRAWS):
        numbers = uniforms(stream_key(seed, "boot"), np.arange(images), draw, [0], 1).ravel()
        weights = np.bincount((numbers * images).astype(np.int64), minlength=images)
        counts = (weights @ flat).reshape(per_image.shape[1:])
        values.append(np.nanmean(intersection_over_union(counts)) if counts.any() else np.nan)
    return [float(np.nanquantile(np.array(values), share)) for share in (0.025, 0.975)]
