"""Generated scenes for tests and demonstrations: one to four shapes on a striped background, with their masks.

Every scene is a function of its number alone. A later shape hides what lies below it; one that would be hidden by more
than a third is not drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessella.data.sources import shapes
from tessella.ops.philox import stream_key, uniforms

CLASSES = ("circle", "square", "triangle")
SIDE = 128  # pixels
_MOST = 4  # shapes in a scene
_NUMBERS = 20  # uniforms per shape, as many as `shapes` draws


class Scene(NamedTuple):
    """An image and what is in it."""

    pixels: NDArray[np.uint8]  # (128, 128, 3) RGB
    masks: NDArray[np.bool_]  # (n, 128, 128) the visible part of each shape
    labels: NDArray[np.int64]  # (n,) indices into `CLASSES`


def draw_scenes(rows: NDArray[np.int64]) -> list[Scene]:
    """Scenes by number.

    Args:
        rows: (n,) non-negative.
    """
    numbers = uniforms(stream_key(0, "scen"), rows, 0, np.arange(_MOST + 1), _NUMBERS)
    return [_draw(scene.astype(np.float32)) for scene in numbers]


def _draw(numbers: NDArray[np.float32]) -> Scene:
    """One scene: the first row of numbers draws the background and the count, each of the others a shape."""
    _, dark, light = shapes.colours_of(numbers[:1])
    stripes = shapes.stripes_of(numbers[:1])[0].repeat(SIDE // shapes.SIDE, axis=0).repeat(SIDE // shapes.SIDE, axis=1)
    pixels = dark[0] * (1 - stripes[..., None]) + light[0] * stripes[..., None]
    colours, _, _ = shapes.colours_of(numbers[1:])
    masks: list[NDArray[np.bool_]] = []
    labels: list[int] = []
    for drawn, colour in zip(numbers[1 : 2 + int(_MOST * numbers[0, 19])], colours, strict=False):
        label = int(len(CLASSES) * drawn[19])
        coverage = _coverage(label, drawn)
        mask = coverage >= 0.5
        if any((old & mask).sum() * 3 > old.sum() for old in masks):
            continue
        masks = [old & ~mask for old in masks]
        masks.append(mask)
        labels.append(label)
        pixels = pixels * (1 - coverage[..., None]) + colour * coverage[..., None]
    return Scene(np.rint(pixels * 255).astype(np.uint8), np.array(masks), np.array(labels, dtype=np.int64))


def _coverage(label: int, drawn: NDArray[np.float32]) -> NDArray[np.float32]:
    """(128, 128) share of each pixel that the shape covers; edges are one pixel soft."""
    radius = SIDE * (0.08 + 0.14 * float(drawn[0]))
    left, top = (radius + float(place) * (SIDE - 2 * radius) for place in drawn[1:3])
    angle = 2 * math.pi * float(drawn[3])
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    x, y = (grid[None, :] - left) / radius, (grid[:, None] - top) / radius
    cos, sin = math.cos(angle), math.sin(angle)
    outside = shapes.DISTANCES[shapes.CLASSES.index(CLASSES[label])](cos * x + sin * y, cos * y - sin * x)
    return np.clip(0.5 - outside * radius, 0, 1)
