"""Pictures of a run: augmented views, montages and members of clusters, as PNG files and for a page.

Views are drawn from the run's seed by the same plan and operations as in training, so they are what the network saw
(within one of 255 levels, because training may resize while it decodes).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from tessella import files
from tessella.data.decode import Unreadable
from tessella.data.sources import ImageSet
from tessella.data.views import CropGroup, ViewPlan, ViewSpec, draw
from tessella.ops.augment import crop_resize, photometric
from tessella.ops.montage import montage_positions, stitch
from tessella.ops.philox import permutation, stream_key

EXAMPLES = 4  # images whose views are shown
LARGEST = 8  # clusters that are shown
MEMBERS = 10  # of each

# Orange, blue, green, pink of Okabe and Ito, which colour-blind readers can distinguish on light and dark.
COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7")

_ORIGINAL_SIDE = 320  # pixels; a page needs no whole photo
_MEMBER_SIDE = 96
_LEAST_TILE = 64  # pixels of a tile in a montage with coloured borders
_ATTEMPTS = 20  # rows tried in place of one that cannot be read

Pixels = NDArray[np.uint8]  # (height, width, 3) RGB


class Picture(NamedTuple):
    """One picture, ready for a page."""

    source: str  # a data: URI
    width: int  # pixels
    height: int
    text: str  # what it shows, as plain text


class Box(NamedTuple):
    """The crop of a view, in per cent of the image."""

    left: float
    top: float
    width: float
    height: float


class Group(NamedTuple):
    """The views of one crop group."""

    pictures: list[Picture]
    share: float  # size relative to the largest group
    columns: int  # tiles side by side; 0 where views are no tiles


class Example(NamedTuple):
    """An image and its views."""

    name: str
    original: Picture
    boxes: list[Box]
    groups: list[Group]
    colour: str  # of its tiles' borders in the montages


class Cluster(NamedTuple):
    """A cluster and some of its images."""

    number: int
    size: int
    members: list[Picture]


class Album:
    """Pictures saved as PNG in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        if folder.is_symlink():  # in a stranger's run it may point to other pictures, which must not be deleted
            files.remove(folder)
        files.make_folder(folder)
        for left_over in folder.glob("*.png"):  # of an earlier report, perhaps of other clusters
            files.remove(left_over)
        self.folder = folder

    def add(self, name: str, pixels: Pixels, text: str) -> Picture:
        """Save a picture, which shows `text`, as `name`.png."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        files.write_bytes(self.folder / f"{name}.png", buffer.getvalue(), lasting=False)
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        return Picture(source, pixels.shape[1], pixels.shape[0], text)


def example_rows(images: ImageSet, count: int = EXAMPLES) -> list[tuple[int, Pixels]]:
    """Up to `count` readable images, spread evenly over the set: rows and pixels."""
    wanted = ((2 * i + 1) * len(images) // (2 * count) for i in range(count))
    readable = (next(_readable(images, range(row, min(row + _ATTEMPTS, len(images)))), None) for row in wanted)
    return list({pair[0]: pair for pair in readable if pair is not None}.values())


def show_views(images: ImageSet, spec: ViewSpec, seed: int, album: Album) -> tuple[list[Example], list[Picture]]:
    """Some images as training saw them in its first epoch, and the montages of their tiles.

    Each crop group of tiles gives as many montages as there are examples, shuffled as in training, but among these
    images only.
    """
    chosen = example_rows(images)
    if not chosen:
        return [], []
    views = [_execute(spec, seed, images, row, pixels) for row, pixels in chosen]
    largest = max(group.size for group in spec.groups)
    examples = []
    for number, ((row, pixels), (plan, groups)) in enumerate(zip(chosen, views, strict=True), start=1):
        name = images.key(row)
        shown = []
        for g, (group, crops) in enumerate(zip(spec.groups, groups, strict=True), start=1):
            stem, kind = f"image-{number}-group-{g}", "tile" if group.tiles > 1 else "view"
            pictures = [
                album.add(f"{stem}-view-{v}", _to_array(crops[v - 1]), f"{kind} {v} of {name}")
                for v in _reading_order(group)
            ]
            shown.append(Group(pictures, group.size / largest, group.tiles if group.tiles > 1 else 0))
        original = album.add(f"image-{number}", _at_most(pixels, _ORIGINAL_SIDE), name)
        examples.append(Example(name, original, _boxes(plan, pixels), shown, COLOURS[(number - 1) % len(COLOURS)]))
    montages = [
        picture
        for g, group in enumerate(spec.groups)
        if group.tiles > 1
        for picture in _montages(torch.stack([groups[g] for _, groups in views], dim=1), group.tiles, seed, album)
    ]
    return examples, montages


def show_clusters(images: ImageSet, clusters: ArrayLike, album: Album) -> list[Cluster]:
    """The largest clusters, with members spread evenly over the data set, neither the best nor the worst.

    `clusters` (N,) holds the cluster of each image, or a negative number.
    """
    clusters = np.asarray(clusters)
    numbers, sizes = np.unique(clusters[clusters >= 0], return_counts=True)
    shown = []
    for i in np.argsort(-sizes, kind="stable")[:LARGEST]:
        rows = np.flatnonzero(clusters == numbers[i])
        spread = rows[np.linspace(0, len(rows) - 1, min(MEMBERS, len(rows))).round().astype(int)]
        members = [
            album.add(f"cluster-{numbers[i]}-{m}", _at_most(pixels, _MEMBER_SIDE), images.key(row))
            for m, (row, pixels) in enumerate(_readable(images, spread), start=1)
        ]
        shown.append(Cluster(int(numbers[i]), int(sizes[i]), members))
    return shown


def _readable(images: ImageSet, rows: Iterable[int]) -> Iterator[tuple[int, Pixels]]:
    """Rows and pixels of the images that can be read and are as large as the index says."""
    for row in map(int, rows):
        try:
            pixels = images.image(row)
        except Unreadable:
            continue
        width, height = images.sizes[row]
        if pixels.shape == (height, width, 3):
            yield row, pixels


def _execute(spec: ViewSpec, seed: int, images: ImageSet, row: int, pixels: Pixels) -> tuple[ViewPlan, list[Tensor]]:
    """The plan of one image in epoch 0, and its views: (v, 3, s, s) uint8 per crop group."""
    plan = draw(spec, seed, 0, images.ids[[row]], images.sizes[[row]])
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    groups, first = [], 0
    for group in spec.groups:
        part = ViewPlan(*(array[0] for array in plan.select(slice(0, 1), slice(first, first + group.views))))
        first += group.views
        crops = []
        for left, top, width, height in part.box.tolist():
            area = image[:, :, top : top + height, left : left + width]  # cut first: a photo is large as floats
            crops.append(crop_resize(area, torch.tensor([[0, 0, width, height]]), group.size))
        colours = {name: values for name, values in part._asdict().items() if name != "box"}
        views = photometric(torch.cat(crops), **colours, mean=spec.mean, std=spec.std)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
        groups.append(((views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8))
    return plan, groups


def _montages(tiles: Tensor, m: int, seed: int, album: Album) -> list[Picture]:
    """Montages of the examples' (m * m, n, 3, s, s) tiles, each tile framed in the colour of its image."""
    places, n, _, size, _ = tiles.shape
    scale = max(1, -(-_LEAST_TILE // size))
    framed = tiles.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    border = max(2, scale * size // 20)
    for image in range(n):
        colour = torch.tensor(list(bytes.fromhex(COLOURS[image % len(COLOURS)][1:])), dtype=torch.uint8)
        frame = torch.ones(framed.shape[-2:], dtype=torch.bool)
        frame[border:-border, border:-border] = False
        framed[:, image, :, frame] = colour[:, None]
    order = torch.from_numpy(permutation(stream_key(seed, "tile"), range(places * n), 0))
    shown = order[montage_positions(n, m, rank=0, world_size=1)]  # (slots, n) tile numbers
    montages = stitch(framed[shown // n, shown % n], m)
    return [
        album.add(
            f"montage-{number}",
            _to_array(montage),
            "slots row by row: " + ", ".join(f"tile of image {image + 1}" for image in (slots % n).tolist()),
        )
        for number, (montage, slots) in enumerate(zip(montages, shown.T, strict=True), start=1)
    ]


def _reading_order(group: CropGroup) -> Sequence[int]:
    """Numbers of a group's views, from 1, row by row: tiles are numbered column by column."""
    if group.tiles == 1:
        return range(1, group.views + 1)
    return [column * group.tiles + row + 1 for row in range(group.tiles) for column in range(group.tiles)]


def _boxes(plan: ViewPlan, pixels: Pixels) -> list[Box]:
    height, width, _ = pixels.shape
    return [Box(*(100 * box / [width, height, width, height]).tolist()) for box in plan.box[0]]


def _to_array(image: Tensor) -> Pixels:
    return image.permute(1, 2, 0).contiguous().numpy()


def _at_most(pixels: Pixels, side: int) -> Pixels:
    """The image, reduced so that neither side is longer than `side`."""
    if max(pixels.shape[:2]) <= side:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.array(image)
