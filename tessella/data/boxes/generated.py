"""Scenes of drawn shapes whose boxes and masks are known by construction: detection without a download."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tessella.data.boxes.images import AnnotatedImages, ObjectTable
from tessella.data.boxes.outlines import fold
from tessella.data.sources import ArrayImages
from tessella.data.sources.messages import check_split
from tessella.data.sources.scenes import CLASSES, draw_scenes

SPLITS = {"train": np.arange(400), "test": np.arange(400, 500)}  # numbers of scenes


def open_shapes(data: str, split: str) -> AnnotatedImages:
    """Scenes of one to four shapes, 400 for training and 100 for testing; "shapes::train" names a split itself."""
    part = data.partition("::")[2] or split
    check_split(data, part, tuple(SPLITS))
    return annotated_scenes(data, SPLITS[part])


def annotated_scenes(name: str, rows: NDArray[np.int64]) -> AnnotatedImages:
    """Scenes by their (n,) ascending numbers, as images with objects; the name is for reports."""
    scenes = draw_scenes(rows)
    masks = np.concatenate([scene.masks for scene in scenes])
    boxes = []
    for mask in masks:
        ys, xs = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        boxes.append([xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]])
    table = ObjectTable.of(
        np.arange(len(scenes)).repeat([len(scene.labels) for scene in scenes]),
        len(scenes),
        np.array(boxes, dtype=np.float64),
        np.concatenate([scene.labels for scene in scenes]),
        areas=masks.sum(axis=(1, 2)).astype(np.float64),
        outlines=[fold(mask) for mask in masks],
    )
    pixels = np.stack([scene.pixels for scene in scenes])
    images = ArrayImages(name, pixels, keys=[f"shapes/{row:04d}" for row in rows.tolist()])
    source = hashlib.sha256(table.boxes.tobytes() + table.labels.tobytes()).hexdigest()
    ids: list[int | str] = [int(row) + 1 for row in rows]
    return AnnotatedImages(name, images, np.arange(len(rows)), ids, list(CLASSES), [1, 2, 3], table, source)
