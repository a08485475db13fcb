"""Every random decision of a view, drawn as numbers before any pixel is touched.

A `ViewSpec` says what is drawn, a `ViewPlan` holds what was drawn for a batch of images. The draw is a pure function
of (seed, epoch, image id, view), so workers, ranks and resuming do not change it. `ops.kernels` executes a plan on a
CPU, `ops.augment` on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tessella.errors import UserError
from tessella.ops.montage import tile_boxes
from tessella.ops.philox import stream_key, uniforms
from tessella.ranges import Fraction, PixelMean, Pixels, PixelStd, PositiveFraction, Range

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

_TRIES = 10  # of a random resized crop, then a centre crop, as in torchvision
_NUMBERS = 2 * _TRIES + 13  # uniforms per view; `draw` uses them in an order that must never change
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.uint8)


Tiles: TypeAlias = Annotated[int, Range(2, 16)]  # per side
Overlap: TypeAlias = Annotated[float, Range(0, 0.5)]  # at 0.5 every tile is the whole image
_Strength: TypeAlias = Annotated[float, Range(0, 100)]
_Sigma: TypeAlias = Annotated[float, Range(0, 100)]
_Ratio: TypeAlias = Annotated[float, Range(0.01, 100)]


@dataclass(frozen=True)
class ColorAugmentation:
    """Chances and strengths of the changes of a crop's pixels, in this order; torchvision's conventions."""

    flip: Fraction = 0.5  # chance of a horizontal flip
    jitter: Fraction = 0.8  # chance of brightness, contrast, saturation and hue, in a random order
    brightness: _Strength = 0.8  # factor in [max(0, 1 - x), 1 + x]
    contrast: _Strength = 0.8  # the same
    saturation: _Strength = 0.8  # the same
    hue: Annotated[float, Range(0, 0.5)] = 0.2  # shift in [-x, x] turns of the colour circle, x in [0, 0.5]
    gray: Fraction = 0.2  # chance
    blur: Fraction = 0.5  # chance
    blur_sigma: tuple[_Sigma, _Sigma] = (0.1, 2.0)  # pixels of the crop
    solarize: Fraction = 0.0  # chance; inverts values of 128 and more


@dataclass(frozen=True)
class CropGroup:
    """Views of one size: random resized crops of the whole image, or of one tile each."""

    views: Annotated[int, Range(1, 1000)]
    size: Pixels  # pixels, square
    scale: tuple[PositiveFraction, PositiveFraction]  # share of the area (of the image or the tile)
    ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)  # width / height
    colors: ColorAugmentation = field(default_factory=ColorAugmentation)
    # Tiles per side; above 1, view q of the group lies in tile q and views = tiles * tiles.
    tiles: Annotated[int, Range(1, 16)] = 1
    overlap: Overlap = 0.0  # of tiles, in shares of the image's side; see ops.montage.tile_boxes
    overlap_max: Overlap | None = None  # given: each overlap is drawn uniformly from [overlap, overlap_max]
    overlap_per: Literal["image", "batch", "axis"] = "image"  # has its own draw; axis: x and y of each image

    def __post_init__(self) -> None:
        if self.tiles > 1 and self.views != self.tiles**2:
            raise UserError(
                f"a crop group of {self.tiles} x {self.tiles} tiles has {self.tiles**2} views, not {self.views}"
            )
        for what in ("scale", "ratio"):
            low, high = getattr(self, what)
            if low > high:
                raise UserError(f"{what} {low} to {high} of a crop group is no range: give the lower bound first")
        if self.overlap_max is not None and self.overlap > self.overlap_max:
            raise UserError(
                f"overlap={self.overlap} to overlap_max={self.overlap_max} is no range: give the lower bound first"
            )


@dataclass(frozen=True)
class ViewSpec:
    """The views of one image, group by group, and how pixels are normalised."""

    groups: tuple[CropGroup, ...]
    mean: tuple[PixelMean, PixelMean, PixelMean] = IMAGENET_MEAN
    std: tuple[PixelStd, PixelStd, PixelStd] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not self.groups:
            raise UserError("views.groups is empty: give at least one crop group")

    @property
    def views(self) -> int:
        """Views per image over all groups."""
        return sum(group.views for group in self.groups)

    def slices(self) -> Iterator[tuple[CropGroup, slice]]:
        """Each group with its views' places in a plan."""
        first = 0
        for group in self.groups:
            yield group, slice(first, first + group.views)
            first += group.views


class ViewPlan(NamedTuple):
    """What was drawn for B images and V views (all groups, one after the other)."""

    box: NDArray[np.int32]  # (B, V, 4): left, top, width, height in pixels of the upright image
    flip: NDArray[np.bool_]  # (B, V)
    jitter: NDArray[np.bool_]  # (B, V)
    factors: NDArray[np.float32]  # (B, V, 4): brightness, contrast, saturation, hue
    order: NDArray[np.uint8]  # (B, V, 4): which of the four factors comes first, second, ...
    gray: NDArray[np.bool_]  # (B, V)
    sigma: NDArray[np.float32]  # (B, V): blur in pixels of the crop, 0 for none
    solarize: NDArray[np.bool_]  # (B, V)

    def select(self, images: slice | NDArray[np.int64], views: slice = slice(None)) -> ViewPlan:
        """The plan of some images and consecutive views."""
        return ViewPlan._make(array[images][:, views] for array in self)


def draw(spec: ViewSpec, seed: int, epoch: int, ids: ArrayLike, sizes: ArrayLike, step: int = 0) -> ViewPlan:
    """The plan of `spec.views` views of B images in one epoch.

    Args:
        spec: what to draw.
        seed: of the run.
        epoch: from 0.
        ids: (B,) stable 64-bit image ids.
        sizes: (B, 2) width and height of the upright images in pixels.
        step: within the epoch, from 0; matters only where a batch shares a draw (`overlap_per` "batch").
    """
    ids, sizes = np.asarray(ids), np.asarray(sizes, dtype=np.int64)
    numbers = uniforms(stream_key(seed, "view"), ids, epoch, np.arange(spec.views), _NUMBERS)
    parts = []
    for group, views in spec.slices():
        overlap = _draw_overlap(group, seed, epoch, [step] if group.overlap_per == "batch" else ids)
        parts.append(_draw_group(group, numbers[:, views], sizes, overlap))
    return ViewPlan._make(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))


def _draw_overlap(group: CropGroup, seed: int, epoch: int, counters: ArrayLike) -> NDArray[np.float64]:
    """Overlap of the tiles along x and y, one row per counter: (n, 2), or (1, 2) for all."""
    if group.overlap_max is None:
        return np.full((1, 2), group.overlap)
    # A stream of its own: everything else is drawn as if the overlap were fixed.
    numbers = uniforms(stream_key(seed, "over"), counters, epoch, [0], 2)[:, 0]
    if group.overlap_per != "axis":
        numbers[:, 1] = numbers[:, 0]
    return group.overlap + numbers * (group.overlap_max - group.overlap)


def _draw_group(
    group: CropGroup, numbers: NDArray[np.float64], sizes: NDArray[np.int64], overlap: NDArray[np.float64]
) -> ViewPlan:
    n, views, _ = numbers.shape
    colors = group.colors
    if group.tiles > 1:
        left, top, right, bottom = np.moveaxis(tile_boxes(sizes[:, 0], sizes[:, 1], group.tiles, overlap), -1, 0)
    else:
        left = top = np.zeros((n, views), dtype=np.int64)
        right, bottom = (np.repeat(side[:, None], views, axis=1) for side in sizes.T)
    width, height = np.maximum(right - left, 1), np.maximum(bottom - top, 1)
    x, y, w, h = _random_resized_crop(numbers[..., : 2 * _TRIES + 2], width, height, group)
    rest = numbers[..., 2 * _TRIES + 2 :]
    strengths = np.array([colors.brightness, colors.contrast, colors.saturation])
    low, high = np.maximum(0.0, 1.0 - strengths), 1.0 + strengths
    hue = (2.0 * rest[..., 5] - 1.0) * colors.hue
    factors = np.concatenate((low + rest[..., 2:5] * (high - low), hue[..., None]), axis=-1)
    sigma = colors.blur_sigma[0] + rest[..., 9] * (colors.blur_sigma[1] - colors.blur_sigma[0])
    return ViewPlan(
        box=np.stack((left + x, top + y, w, h), axis=-1).astype(np.int32),
        flip=rest[..., 0] < colors.flip,
        jitter=rest[..., 1] < colors.jitter,
        factors=factors.astype(np.float32),
        order=_ORDERS[(rest[..., 6] * len(_ORDERS)).astype(np.int64)],
        gray=rest[..., 7] < colors.gray,
        sigma=np.where(rest[..., 8] < colors.blur, sigma, 0.0).astype(np.float32),
        solarize=rest[..., 10] < colors.solarize,
    )


def _random_resized_crop(
    numbers: NDArray[np.float64], width: NDArray[np.int64], height: NDArray[np.int64], group: CropGroup
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Crops x, y, w, h (n, views) by torchvision's rejection sampling: the first of ten tries to fit, or the centre.

    Numbers (n, views, 22) are uniforms: ten pairs of (area, ratio), then the position. Width and height (n, views) are
    in pixels of the area to crop from.
    """
    area_u, ratio_u = numbers[..., 0 : 2 * _TRIES : 2], numbers[..., 1 : 2 * _TRIES : 2]
    area = (width * height)[..., None] * (group.scale[0] + area_u * (group.scale[1] - group.scale[0]))
    log_low, log_high = np.log(group.ratio)
    ratio = np.exp(log_low + ratio_u * (log_high - log_low))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[..., None]) & (h <= height[..., None])
    first = fits.argmax(axis=-1)[..., None]
    w, h = np.take_along_axis(w, first, -1)[..., 0], np.take_along_axis(h, first, -1)[..., 0]
    x = (numbers[..., -2] * (width - w + 1)).astype(np.int64)
    y = (numbers[..., -1] * (height - h + 1)).astype(np.int64)

    none = ~fits.any(axis=-1)
    centre_w = np.minimum(width, np.rint(height * group.ratio[1]).astype(np.int64))
    centre_h = np.minimum(height, np.rint(width / group.ratio[0]).astype(np.int64))
    w, h = np.where(none, centre_w, w), np.where(none, centre_h, h)
    x, y = np.where(none, (width - w) // 2, x), np.where(none, (height - h) // 2, y)
    return x, y, w, h
