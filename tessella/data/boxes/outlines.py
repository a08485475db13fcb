"""Masks of objects: polygons or run lengths in COCO's format, checked when read, painted when needed."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tessella.errors import UserError

Polygons: TypeAlias = tuple[NDArray[np.float64], ...]  # each (2 n,) x, y, x, y, ... in pixels, n >= 3
Runs: TypeAlias = NDArray[np.int64]  # lengths of off, on, off, ... pixels, column after column
Outline: TypeAlias = Polygons | Runs


class Broken(Exception):
    """A mask that does not describe a region of its image."""


def read_outline(segmentation: Any, width: int, height: int) -> Outline | None:
    """A mask of an image of some pixels, as a COCO file has it; None if there is no mask at all.

    `segmentation` is a list of polygons, or {"counts": list or text, "size": [height, width]}.

    Raises:
        Broken: there is one, but no polygon with three corners, or runs that do not add up to the image.
    """
    if segmentation is None or segmentation in ([], {}):
        return None
    if isinstance(segmentation, dict):
        return _read_runs(segmentation, width, height)
    if not isinstance(segmentation, list):
        raise Broken("neither polygons nor run lengths")
    polygons = tuple(polygon for polygon in map(_read_polygon, segmentation) if polygon is not None)
    if not polygons:
        raise Broken("no polygon with three or more corners")
    return polygons


def as_coco(outline: Outline, width: int, height: int) -> Any:
    """The mask as JSON in COCO's format."""
    if isinstance(outline, tuple):
        return [polygon.tolist() for polygon in outline]
    return {"counts": outline.tolist(), "size": [height, width]}


def paint(outline: Outline, width: int, height: int, to: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask on an image of width x height pixels that was resized to (height, width) `to`: uint8, 1 inside.

    Polygons are scaled before they are painted, runs take the nearest pixel.
    """
    if isinstance(outline, tuple):
        coder = mask_coder()
        scale = np.array([to[1] / width, to[0] / height])
        scaled = [(polygon.reshape(-1, 2) * scale).reshape(-1).tolist() for polygon in outline]
        return coder.decode(coder.merge(coder.frPyObjects(scaled, *to)))
    mask = unfold(outline, width, height)
    rows = ((np.arange(to[0]) + 0.5) * height / to[0]).astype(np.int64)
    columns = ((np.arange(to[1]) + 0.5) * width / to[1]).astype(np.int64)
    return mask[rows[:, None], columns]


def unfold(runs: Runs, width: int, height: int) -> NDArray[np.uint8]:
    """(height, width) uint8, 0 or 1, from run lengths."""
    values = np.arange(len(runs)) % 2
    return np.repeat(values.astype(np.uint8), runs).reshape(width, height).T


def fold(mask: NDArray[Any]) -> Runs:
    """Run lengths of a (height, width) mask; the first run is of pixels outside, and may be 0 long."""
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]))) if len(flat) else np.array([], dtype=np.int64)
    return np.diff(np.concatenate([[0], changes, [len(flat)]])).astype(np.int64)


def mask_coder() -> Any:
    """The module for masks of pycocotools.

    Raises:
        UserError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("this needs pycocotools: pip install 'tessella[eval]'") from None
    return mask


def _read_polygon(numbers: Any) -> NDArray[np.float64] | None:
    """A polygon; None for fewer than three corners, which have no area."""
    try:
        polygon = np.array(numbers, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise Broken("a polygon that is no list of numbers") from None
    if polygon.ndim != 1 or len(polygon) % 2:
        raise Broken("a polygon that is no list of x, y, x, y, ...")
    # Painting takes memory in proportion to a polygon's length in pixels.
    if not np.isfinite(polygon).all() or (len(polygon) and np.abs(polygon).max() > 1e6):
        raise Broken("a polygon with coordinates that are not finite or far outside any image")
    return polygon if len(polygon) >= 6 else None


def _read_runs(segmentation: dict[str, Any], width: int, height: int) -> Runs:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise Broken(f"run lengths for an image of another size: {size}, not [{height}, {width}]")
    if isinstance(counts, str):
        runs = _decompress(counts)
    elif isinstance(counts, list) and all(type(n) is int for n in counts):
        runs = counts
    else:
        raise Broken("run lengths that are neither a list of whole numbers nor text")
    if min(runs, default=-1) < 0 or sum(runs) != width * height:
        raise Broken(f"run lengths that do not add up to {width} x {height} pixels")
    return np.array(runs, dtype=np.int64)


def _decompress(text: str) -> list[int]:
    """COCO's text form: five bits a character, the sixth says that more follow; from the third run on, differences."""
    runs: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            break
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << 1 << (shift - 5)  # the last one's highest bit is the sign
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number, shift = 0, 0
    else:
        if not shift:
            return runs
    raise Broken("run lengths in a text that is not COCO's")
