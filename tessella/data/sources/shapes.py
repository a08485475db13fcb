"""Generated images for tests and demonstrations: ten kinds of shape on striped backgrounds, 64 x 64.

Place, size, angle and colours are random and independent of the class, so raw pixels predict it poorly.
Every image is a function of its number alone.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numpy.typing import NDArray

from tessella.ops.philox import stream_key, uniforms

CLASSES = ["arrow", "circle", "crescent", "cross", "heart", "pentagon", "ring", "square", "star", "triangle"]
SIDE = 64  # pixels
_NUMBERS = 20  # uniforms per image

Array = NDArray[np.floating]


def draw_shapes(rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and classes by number.

    Args:
        rows: (n,) numbers, non-negative; the class is the last decimal digit.

    Returns:
        (n, 64, 64, 3) uint8 RGB and (n,) int64 indices into `CLASSES`.
    """
    labels = rows % len(CLASSES)
    numbers = uniforms(stream_key(0, "shap"), rows, 0, np.zeros(1, dtype=np.int64), _NUMBERS)[:, 0]
    images = np.empty((len(rows), SIDE, SIDE, 3), dtype=np.uint8)
    for kind in range(len(CLASSES)):
        chosen = labels == kind
        images[chosen] = _draw(kind, numbers[chosen])
    return images, labels


def _draw(kind: int, numbers: Array) -> NDArray[np.uint8]:
    numbers = numbers.astype(np.float32)
    radius = SIDE * (0.16 + 0.18 * numbers[:, 0])
    centre = radius[:, None] + numbers[:, 1:3] * (SIDE - 2 * radius)[:, None]
    angle = 2 * math.pi * numbers[:, 3]
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    x = (grid[None, None, :] - centre[:, 0, None, None]) / radius[:, None, None]
    y = (grid[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    outside = DISTANCES[kind](cos * x + sin * y, cos * y - sin * x)
    coverage = np.clip(0.5 - outside * radius[:, None, None], 0, 1)[..., None]  # edges one pixel soft

    shape, dark, light = colours_of(numbers)
    stripes = stripes_of(numbers)[..., None]
    background = dark[:, None, None] * (1 - stripes) + light[:, None, None] * stripes
    pixels = background * (1 - coverage) + shape[:, None, None] * coverage
    return np.rint(pixels * 255).astype(np.uint8)


def stripes_of(numbers: Array) -> Array:
    """Two crossing gratings per image, (n, 64, 64) in [0, 1]."""
    grid = np.arange(SIDE, dtype=np.float32) / SIDE
    total = np.zeros((len(numbers), SIDE, SIDE), dtype=np.float32)
    for turn, waves, phase in (numbers[:, 4:7].T, numbers[:, 7:10].T):
        direction, frequency = math.pi * turn, 2 * math.pi * (2 + 8 * waves)
        along = (
            np.cos(direction)[:, None, None] * grid[None, None, :] + np.sin(direction)[:, None, None] * grid[:, None]
        )
        total += np.sin(frequency[:, None, None] * along + 2 * math.pi * phase[:, None, None])
    return 0.5 + total / 4


def colours_of(numbers: Array) -> tuple[Array, Array, Array]:
    """Of the shape and of the two ends of the background, (n, 3) each. The shape's hue lies far from both."""
    hue = numbers[:, 10]
    triples = [
        (hue + 0.5 + 0.3 * (numbers[:, 11] - 0.5), 0.5 + 0.5 * numbers[:, 12], 0.6 + 0.4 * numbers[:, 13]),
        (hue, 0.3 + 0.5 * numbers[:, 14], 0.15 + 0.5 * numbers[:, 15]),
        (hue + 0.2 * (numbers[:, 16] - 0.5), 0.2 + 0.5 * numbers[:, 17], 0.4 + 0.5 * numbers[:, 18]),
    ]
    shape, dark, light = (
        np.array([colorsys.hsv_to_rgb(h % 1.0, s, v) for h, s, v in zip(*triple, strict=True)], dtype=np.float32)
        for triple in triples
    )
    return shape, dark, light


# Signed distances to the shapes' edges (or nearly), negative inside; shapes fit the unit circle.


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - radius


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _folded(x: Array, y: Array, corners: int) -> tuple[Array, Array]:
    """Coordinates within one of `corners` equal sectors, its middle along x, mirrored to y >= 0."""
    sector = 2 * math.pi / corners
    angle = np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2
    radius = np.hypot(x, y)
    return radius * np.cos(angle), radius * np.abs(np.sin(angle))


def _polygon(x: Array, y: Array, corners: int) -> Array:
    return _folded(x, y, corners)[0] - math.cos(math.pi / corners)


def _star(x: Array, y: Array) -> Array:
    x, y = _folded(x, y, 5)
    inner_x, inner_y = 0.4 * math.cos(math.pi / 5), 0.4 * math.sin(math.pi / 5)
    edge_x, edge_y = inner_x - 1, inner_y  # from the tip (1, 0) to the notch
    return ((x - 1) * edge_y - y * edge_x) / math.hypot(edge_x, edge_y)


def _arrow(x: Array, y: Array) -> Array:
    head = np.maximum(0.05 - x, (0.6 * (x - 0.95) + 0.9 * np.abs(y)) / math.hypot(0.6, 0.9))
    return np.minimum(_box(x + 0.4, y, 0.5, 0.2), head)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.9, 0.28), _box(x, y, 0.28, 0.9))


def _heart(x: Array, y: Array) -> Array:
    side, x, y = 0.85, np.abs(x), y + 0.2
    lobe = np.hypot(x - side / 2, y - side / 2) - side / math.sqrt(2)
    return np.minimum((x + np.abs(y) - side) / math.sqrt(2), lobe)


DISTANCES = [  # in the order of CLASSES
    _arrow,
    lambda x, y: _circle(x, y, 0.85),
    lambda x, y: np.maximum(_circle(x, y, 0.95), -_circle(x - 0.45, y, 0.75)),
    _cross,
    _heart,
    lambda x, y: _polygon(x, y, 5),
    lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.22,
    lambda x, y: _box(x, y, 0.7, 0.7),
    _star,
    lambda x, y: _polygon(x, y, 3),
]
