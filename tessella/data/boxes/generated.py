"""Scenes of drawn shapes whose boxes and masks are known by construction: detection without a download."""

from __future__ import annotations

import hashlib

import numpy as np

from tessella.data.boxes.objects import AnnotatedImages, ObjectTable
from tessella.data.boxes.outlines import Outline, fold
from tessella.data.sources import ArrayImages
from tessella.data.sources.messages import check_split
from tessella.data.sources.scenes import CLASSES, draw_scenes

_TRAIN, _TEST = 400, 100  # images


def open_shapes(data: str, split: str) -> AnnotatedImages:
    """Scenes of one to four shapes, 400 for training and 100 for testing.

    Args:
        data: "shapes"; "shapes::train" and "shapes::test" name a split themselves.
        split: "train" or "test".
    """
    part = data.partition("::")[2] or split
    check_split(data, part, ("train", "test"))
    rows = np.arange(_TRAIN) if part == "train" else np.arange(_TRAIN, _TRAIN + _TEST)
    return annotated_scenes(data, rows)


def annotated_scenes(name: str, rows: np.ndarray) -> AnnotatedImages:
    """Scenes by number, as images with objects.

    Args:
        name: for reports.
        rows: (n,) ascending numbers of scenes.
    """
    scenes = draw_scenes(rows)
    boxes, labels, outlines = list[np.ndarray](), list[np.ndarray](), list[Outline | None]()
    for scene in scenes:
        for mask in scene.masks:
            ys, xs = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            boxes.append(np.array([xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]], dtype=np.float64))
            outlines.append(fold(mask))
        labels.append(scene.labels)
    count = len(boxes)
    table = ObjectTable(
        boxes=np.array(boxes),
        labels=np.concatenate(labels),
        ids=np.arange(1, count + 1),
        areas=np.array([float(mask.sum()) for scene in scenes for mask in scene.masks]),
        crowd=np.zeros(count, dtype=bool),
        difficult=np.zeros(count, dtype=bool),
        outlines=outlines,
        first=np.concatenate([[0], np.cumsum([len(scene.labels) for scene in scenes])]).astype(np.int64),
    )
    pixels = np.stack([scene.pixels for scene in scenes])
    images = ArrayImages(name, pixels, keys=[f"shapes/{row:04d}" for row in rows.tolist()])
    source = hashlib.sha256(table.boxes.tobytes() + table.labels.tobytes()).hexdigest()
    ids: list[int | str] = [int(row) + 1 for row in rows]
    numbers = list(range(1, len(CLASSES) + 1))
    return AnnotatedImages(name, images, np.arange(len(rows)), ids, list(CLASSES), numbers, table, source)
