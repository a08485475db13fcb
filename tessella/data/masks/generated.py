"""Scenes of drawn shapes with a class for every pixel: segmentation without a download."""

from __future__ import annotations

import numpy as np

from tessella.data.boxes.generated import SPLITS
from tessella.data.masks.images import ArrayMasks
from tessella.data.sources.messages import check_split
from tessella.data.sources.scenes import CLASSES, draw_scenes


def open_shapes(data: str, split: str) -> ArrayMasks:
    """Scenes of one to four shapes, as in `data.boxes.generated`; class 0 is the background."""
    part = data.partition("::")[2] or split
    check_split(data, part, tuple(SPLITS))
    scenes = draw_scenes(SPLITS[part])
    masks = np.zeros((len(scenes), *scenes[0].pixels.shape[:2]), dtype=np.uint8)
    for mask, scene in zip(masks, scenes, strict=True):
        for shape, label in zip(scene.masks, scene.labels, strict=True):
            mask[shape] = label + 1
    pixels, keys = np.stack([scene.pixels for scene in scenes]), [f"{row:04d}" for row in SPLITS[part]]
    return ArrayMasks(f"shapes [{part}]", pixels, masks, ["background", *CLASSES], keys)
