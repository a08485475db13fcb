"""Draw the pictures of docs/methods/ with the package's own code: `python docs/draw.py [--data FOLDER] [--out FOLDER]`.

Views are drawn by `ViewPlan` and executed as in training, montages, codes, groups and labels come from the functions
that the methods call. Pictures are SVG with the photos inside, on a ground of their own, so that they can be read on a
light and on a dark page. Another folder of photos gives other pictures; the first three in order of name are shown.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tessella.data.sampler import SlotSampler
from tessella.data.views import ViewPlan, ViewSpec, draw
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig
from tessella.methods.swav import SwavConfig
from tessella.ops.assignment import dual_assignment, dual_step, sinkhorn
from tessella.ops.augment import crop_resize, photometric
from tessella.ops.grouping import group_sums, moved_groups, nearest_group
from tessella.ops.montage import shuffled_montages, tile_boxes, tile_order
from tessella.ops.partition import partition

HERE = Path(__file__).parent

# Okabe and Ito: colour-blind readers, too, tell them apart.
ORANGE, BLUE, GREEN, PINK, SKY, RED = "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
COLOURS = (ORANGE, BLUE, GREEN, PINK, SKY, RED)
INK, FAINT, GROUND = "#1f2328", "#8c959f", "#ffffff"
WIDTH = 860
SHARPNESS = 1.5  # pixels of an embedded picture per unit of the drawing

Pixels = NDArray[np.uint8]  # (height, width, 3) RGB


class Drawing:
    """An SVG file in the making."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Words from (x, y), the foot of their line."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        *,
        stroke: str = "none",
        fill: str = "none",
        line: float = 2,
        dash: str = "",
    ) -> None:
        """A rectangle from its top left corner."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{line}"{dashes}/>'
        )

    def heading(self, x: float, y: float, words: str) -> None:
        """Bold words."""
        self.text(x, y, words, size=15, bold=True)

    def note(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        """Small, faint words."""
        self.text(x, y, words, size=12, colour=FAINT, anchor=anchor)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>')

    def path(
        self, points: Sequence[tuple[float, float]], *, stroke: str = INK, line: float = 2, dash: str = ""
    ) -> None:
        """A line through points."""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        along = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{along}" fill="none" stroke="{stroke}" stroke-width="{line}"{dashes}/>')

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = FAINT) -> None:
        """From start to end."""
        self.path([start, end], stroke=colour, line=1.8)
        direction = math.atan2(end[1] - start[1], end[0] - start[0])
        barbs = [
            (end[0] - 8 * math.cos(direction + turn), end[1] - 8 * math.sin(direction + turn)) for turn in (-0.45, 0.45)
        ]
        self.path([barbs[0], end, barbs[1]], stroke=colour, line=1.8)

    def picture(self, pixels: Pixels, x: float, y: float, w: float, h: float, frame: str = "", line: float = 3) -> None:
        """A picture at (x, y) on w x h units, with a frame around it."""
        image = Image.fromarray(pixels)
        image.thumbnail((math.ceil(SHARPNESS * w), math.ceil(SHARPNESS * h)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=76, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        self.parts.append(
            f'<image x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" preserveAspectRatio="none" '
            f'href="data:image/jpeg;base64,{data}"/>'
        )
        if frame:
            self.box(x, y, w, h, stroke=frame, line=line)

    def save(self, path: Path) -> None:
        """Write the file."""
        body = "\n".join(self.parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n"
            f'<rect width="{WIDTH}" height="{self.height}" rx="8" fill="{GROUND}"/>\n{body}\n</svg>\n',
            encoding="utf-8",
        )


# --- views ------------------------------------------------------------------------------------------------------


def execute(spec: ViewSpec, photos: Sequence[Pixels], seed: int) -> tuple[ViewPlan, list[Tensor]]:
    """The plan of the photos' views in the first epoch, and the views: (v, n, 3, s, s) uint8 per crop group."""
    sizes = [(photo.shape[1], photo.shape[0]) for photo in photos]
    plan = draw(spec, seed, 0, np.arange(len(photos)), sizes)
    visible = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    groups, first = [], 0
    for group in spec.groups:
        views = slice(first, first + group.views)
        first += group.views
        shown = []
        for i, photo in enumerate(photos):
            part = ViewPlan(*(array[i] for array in plan.select(slice(None), views)))
            image = torch.from_numpy(photo.transpose(2, 0, 1).copy())[None].expand(group.views, -1, -1, -1)
            crops = crop_resize(image, torch.from_numpy(part.box), group.size)
            colours = {name: values for name, values in part._asdict().items() if name != "box"}
            shown.append(photometric(crops, **colours, **visible).mul(255).round().clamp(0, 255).to(torch.uint8))
        groups.append(torch.stack(shown, dim=1))
    return plan, groups


def to_pixels(image: Tensor) -> Pixels:
    """(3, h, w) -> (h, w, 3)."""
    return image.permute(1, 2, 0).contiguous().numpy()


def tiles_on(photo: Pixels, overlap: float) -> NDArray[np.int64]:
    """(4, 4) left, top, width, height of a photo's tiles."""
    boxes = tile_boxes([photo.shape[1]], [photo.shape[0]], 2, overlap)[0]
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)


def draw_boxes(
    drawing: Drawing,
    photo: Pixels,
    boxes: NDArray[np.int64],
    place: tuple[float, float, float],
    colours: Sequence[str],
    lines: Sequence[float],
    spread: float = 0.0,
) -> float:
    """A photo with boxes on it.

    Args:
        drawing: to draw on.
        photo: pixels.
        boxes: (n, 4) left, top, width, height in pixels of the photo.
        place: x and y in the drawing, and width there.
        colours: of the boxes.
        lines: widths of the boxes' lines.
        spread: by how much boxes are drawn smaller than the one before, so that edges that meet lie side by side.

    Returns:
        The photo's height in the drawing.
    """
    x, y, width = place
    scale = width / photo.shape[1]
    height = photo.shape[0] * scale
    drawing.picture(photo, x, y, width, height)
    for number, (left, top, w, h) in enumerate(boxes.tolist()):
        inset = lines[number] / 2 + number % 4 * spread
        edges = x + left * scale + inset, y + top * scale + inset, w * scale - 2 * inset, h * scale - 2 * inset
        drawing.box(*edges, stroke=GROUND, line=lines[number] + 1.6)
        drawing.box(*edges, stroke=colours[number], line=lines[number])
    return height


# --- the five pictures ------------------------------------------------------------------------------------------


def swav(photos: Sequence[Pixels]) -> Drawing:
    """Crops of one photo, and how Sinkhorn shares a batch among prototypes."""
    drawing = Drawing(544, "SwAV: crops of an image, and codes that use every prototype equally")
    spec = SwavConfig().views
    plan, (large, small) = execute(spec, photos[-1:], seed=2)
    drawing.heading(20, 30, "One image, 2 large and 6 small crops, each with colours of its own")
    colours = [ORANGE, BLUE, *[GREEN] * 6]
    draw_boxes(drawing, photos[-1], plan.box[0], (20, 46, 318), colours, [3, 3, *[1.8] * 6])
    for i in range(2):
        drawing.picture(to_pixels(large[i, 0]), 360 + 136 * i, 46, 126, 126, colours[i])
    for i in range(6):
        drawing.picture(to_pixels(small[i, 0]), 360 + 82 * i, 188, 70, 70, GREEN, line=2)
    drawing.text(636, 66, "Every crop predicts the code", size=13)
    drawing.text(636, 84, "of both large crops, but a", size=13)
    drawing.text(636, 102, "large one not its own.", size=13)

    drawing.heading(
        20, 312, "From scores to codes: 14 images of a batch, 6 prototypes, of which one is near to most images"
    )
    generator = torch.Generator().manual_seed(4)
    prototypes = F.normalize(torch.randn(6, 16, generator=generator), dim=1)
    images = F.normalize(
        torch.randn(14, 16, generator=generator) * 0.22
        + 0.45 * prototypes[1]
        + 0.16 * prototypes[torch.arange(14) % 6],
        dim=1,
    )
    scores = images @ prototypes.T
    tables = (
        ("each image by itself: softmax(score / 0.05)", (scores / 0.05).softmax(dim=1)),
        ("codes: sinkhorn(scores, 0.05), three iterations", sinkhorn(scores, 0.05, 3)),
    )
    for column, (title, table) in enumerate(tables):
        _heat_map(drawing, table, 20 + 425 * column, 330, title)
    return drawing


def _heat_map(drawing: Drawing, table: Tensor, x: float, y: float, title: str) -> None:
    """Images from left to right, prototypes from top to bottom; at the right how much each prototype gets."""
    cell = 20
    n, k = table.shape
    drawing.text(x, y + 14, title)
    for image in range(n):
        for prototype in range(k):
            strength = float(table[image, prototype])
            fill = "#" + "".join(f"{round(255 + (int(BLUE[c : c + 2], 16) - 255) * strength):02x}" for c in (1, 3, 5))
            drawing.box(
                x + cell * image,
                y + 26 + cell * prototype,
                cell - 1.5,
                cell - 1.5,
                fill=fill,
                stroke="#d0d7de",
                line=0.6,
            )
    left, unit = x + cell * n + 12, 11.0
    for prototype, share in enumerate(table.sum(dim=0).tolist()):
        drawing.box(left, y + 28 + cell * prototype, max(unit * share, 0.5), cell - 5, fill=ORANGE)
    even = left + unit * n / k
    drawing.path([(even, y + 22), (even, y + 30 + cell * k)], stroke=INK, line=1.2, dash="3 3")
    drawing.note(x, y + 46 + cell * k, "images →, prototypes ↓")
    drawing.note(x + cell * n + 100, y + 46 + cell * k, "share of each, dashed: even", "end")
    fullest = float(table.sum(dim=0).max()) / n
    drawing.text(
        x, y + 68 + cell * k, f"fullest prototype: {fullest:.0%} of the batch (even share: {1 / k:.0%})", size=12.5
    )


def jigclu(photos: Sequence[Pixels]) -> Drawing:
    """Photos, their tiles, and the montages of all tiles."""
    n, row = len(photos), 172
    drawing = Drawing(84 + row * n, "JigClu: overlapping tiles of a batch, shuffled into montages")
    spec = Jigclu.view_spec(JigcluConfig())
    _, (tiles,) = execute(spec, photos, seed=3)
    border = 4
    framed = tiles.clone()
    for i in range(n):
        colour = torch.tensor(list(bytes.fromhex(COLOURS[i][1:])), dtype=torch.uint8).view(3, 1, 1)
        inside = framed[:, i, :, border:-border, border:-border].clone()
        framed[:, i] = colour
        framed[:, i, :, border:-border, border:-border] = inside
    montages = shuffled_montages(framed, tile_order(2, 0, 4 * n), 2)
    for x, title in (
        (20, "a batch of images"),
        (300, "4 tiles of each, numbered by corner"),
        (650, "as many montages"),
    ):
        drawing.heading(x, 30, title)
    for i, photo in enumerate(photos):
        y = 50 + row * i
        width = min(230.0, 150 * photo.shape[1] / photo.shape[0])
        boxes = tiles_on(photo, 0.3)
        draw_boxes(drawing, photo, boxes, (20, y, width), [COLOURS[i]] * 4, [2] * 4)
        for q in range(4):
            x = 300 + 74 * (q // 2)
            drawing.picture(to_pixels(tiles[q, i]), x, y + 74 * (q % 2), 68, 68, COLOURS[i])
            drawing.dot(x + 11, y + 74 * (q % 2) + 11, 8.5, COLOURS[i])
            drawing.text(x + 11, y + 74 * (q % 2) + 15, str(q), size=11, colour=GROUND, anchor="middle", bold=True)
        drawing.arrow((258, y + 70), (290, y + 70))
        drawing.picture(to_pixels(montages[i]), 650, y, 142, 142)
    middle = 50 + row * n / 2 - 12
    drawing.arrow((462, middle), (636, middle))
    for line, words in enumerate(("one permutation", "of all tiles of the batch")):
        drawing.text(549, middle - 28 + 17 * line, words, anchor="middle")
    for line, words in enumerate(
        ("the backbone sees a montage", "once; its map is cut into", "4 cells, one vector per tile")
    ):
        drawing.text(549, middle + 24 + 17 * line, words, anchor="middle", size=12.5, colour="#57606a")
    drawing.text(
        20,
        66 + row * n,
        "Two questions about every tile: which others are of its colour (its image)? What was its number (its corner)?",
    )
    return drawing


def mejigclu(photos: Sequence[Pixels]) -> Drawing:
    """One photo under three overlaps, and which slot reads which images."""
    drawing = Drawing(560, "MEJigClu: a random overlap, and slots that read fixed subsets")
    drawing.heading(20, 30, "The overlap is drawn for each image, between 0.15 and 0.45")
    photo = photos[-1]
    for column, overlap in enumerate((0.15, 0.3, 0.45)):
        boxes = tiles_on(photo, overlap)
        x = 20 + 280 * column
        height = draw_boxes(drawing, photo, boxes, (x, 46, 258), COLOURS, [3] * 4, spread=0.9)
        drawing.text(x, 46 + height + 20, f"overlap {overlap:.2f}: tiles of {0.5 + overlap:.2f} of each side")
    _slots(drawing, top=290)
    return drawing


def _slots(drawing: Drawing, top: float) -> None:
    images, slots, cell = 14, 4, 34
    part = partition(images, slots, MejigcluConfig().partition_seed)
    order = SlotSampler(images, slots, seed=0, parts=slots, partition_seed=MejigcluConfig().partition_seed)

    def image(number: int, x: float, y: float, faint: bool = False) -> None:
        colour = COLOURS[part[number]]
        drawing.box(
            x,
            y,
            cell - 4,
            cell - 4,
            fill=GROUND if faint else colour,
            stroke=colour,
            line=2,
            dash="3 3" if faint else "",
        )
        drawing.text(
            x + cell / 2 - 2,
            y + cell / 2 + 3,
            str(number),
            anchor="middle",
            size=13,
            colour=colour if faint else GROUND,
            bold=True,
        )

    drawing.heading(20, top, "Slot k of every batch reads only images of category k: 14 images, batches of 4")
    drawing.text(20, top + 30, "the split, drawn once")
    for number in range(images):
        image(number, 20 + cell * (number % 4), top + 46 + cell * (number // 4))
    for epoch in range(2):
        x = 230 + 320 * epoch
        drawing.text(x, top + 30, f"epoch {epoch}")
        drawing.note(x, top + 52, "slot")
        for slot in range(slots):
            drawing.note(x + 72 + cell * slot, top + 52, str(slot), "middle")
        for step in range(order.steps_per_epoch):
            y = top + 60 + cell * step
            drawing.note(x, y + 20, f"step {step}")
            for slot, number in enumerate(order.batch(epoch, step).tolist()):
                image(number, x + 57 + cell * slot, y)
        shown = {row for step in range(order.steps_per_epoch) for row in order.batch(epoch, step).tolist()}
        left_out = sorted(set(range(images)) - shown)
        y = top + 66 + cell * order.steps_per_epoch
        drawing.note(x, y + 20, "sits out")
        for place, number in enumerate(left_out):
            image(number, x + 57 + cell * place, y, faint=True)
    drawing.text(
        20,
        top + 236,
        "An image has one category for the whole run; an epoch changes only the order within a category. The larger",
    )
    drawing.text(20, top + 254, "categories leave out one image per epoch, another one each time.")


def smog(photos: Sequence[Pixels]) -> Drawing:
    """Views of both pipelines and their roles, and groups that move."""
    drawing = Drawing(470, "SMoG: two pipelines that swap roles, and groups that move with every batch")
    drawing.heading(20, 30, "Two pipelines swap roles at every step")
    _, groups = execute(SmogConfig().views, photos[:1], seed=14)
    for number, (name, colour) in enumerate(
        (("A: always blurred", ORANGE), ("B: 1 in 10 blurred, 1 in 5 inverted where bright", BLUE))
    ):
        y = 62 + 186 * number
        drawing.text(20, y, f"pipeline {name}")
        large, small = groups[2 * number : 2 * number + 2]
        for i in range(2):
            drawing.picture(to_pixels(large[i, 0]), 20 + 122 * i, y + 12, 114, 114, colour)
        for i in range(4):
            drawing.picture(to_pixels(small[i, 0]), 266 + 62 * (i % 2), y + 12 + 60 * (i // 2), 54, 54, colour, line=2)
    for line, (odd, even) in enumerate(
        (("even steps", "odd steps"), ("A → network", "B → network"), ("B → momentum encoder", "A → momentum encoder"))
    ):
        faint = {"colour": FAINT} if line == 0 else {}
        drawing.text(20, 416 + 19 * line, odd, **faint)
        drawing.text(200, 416 + 19 * line, even, **faint)
    _moving_groups(drawing, 640, 246, 168)
    return drawing


def _moving_groups(drawing: Drawing, x: float, y: float, radius: float) -> None:
    """Features on the unit circle; time runs from the inside to the outside."""
    steps, count = 24, 5
    generator = torch.Generator().manual_seed(3)
    means = torch.tensor([0.3, 1.5, 2.5, 3.9, 5.2])
    angles = (means[torch.arange(120) % count] + 0.16 * torch.randn(120, generator=generator))[
        torch.randperm(120, generator=generator)
    ]
    features = torch.stack((angles.cos(), angles.sin()), dim=1)
    start = torch.tensor([0.95, 1.9, 3.1, 4.5, 5.9])
    track = [torch.stack((start.cos(), start.sin()), dim=1)]
    for step in range(steps):
        batch = features[(torch.arange(20) + 20 * step) % 120]
        sums, counts = group_sums(batch, nearest_group(batch, track[-1]), count)
        track.append(moved_groups(track[-1], sums, counts, momentum=0.9))
    drawing.heading(x - 190, 30, "Groups follow their images, batch by batch")
    for share in (0.35, 0.65, 0.95):
        ring = [(x + radius * share * math.cos(t / 30), y + radius * share * math.sin(t / 30)) for t in range(190)]
        drawing.path(ring, stroke="#d0d7de", line=1)
    for feature, group in zip(features.tolist(), nearest_group(features, track[-1]).tolist(), strict=True):
        drawing.dot(x + 1.06 * radius * feature[0], y + 1.06 * radius * feature[1], 2.6, COLOURS[group])
    for group in range(count):
        reach = [0.35 + 0.6 * step / steps for step in range(steps + 1)]
        points = [
            (x + radius * r * float(at[group, 0]), y + radius * r * float(at[group, 1]))
            for r, at in zip(reach, track, strict=True)
        ]
        drawing.path(points, stroke=COLOURS[group], line=2.5)
        drawing.dot(*points[-1], 6, COLOURS[group])
    drawing.note(x, y - 4, "start", "middle")
    drawing.note(x, y + 12, "inside", "middle")
    drawing.text(x, 452, "features at the rim; 24 steps from the inner to the outer ring", anchor="middle", size=12.5)


def coke(photos: Sequence[Pixels]) -> Drawing:
    """Cluster sizes without and with duals, and what an epoch learns from."""
    del photos  # CoKe's views are SwAV's
    drawing = Drawing(520, "CoKe: no cluster below its least size, and labels of the last epoch")
    k, n, ratio, batch = 6, 3000, 0.4, 100
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(k, 8, generator=generator), dim=1)
    popularity = torch.tensor([0.42, 0.3, 0.17, 0.06, 0.03, 0.02])
    rows = centres[torch.multinomial(popularity, n, replacement=True, generator=generator)]
    rows = F.normalize(rows + 0.25 * torch.randn(n, 8, generator=generator), dim=1)
    duals, sizes = torch.zeros(k), torch.zeros(k)
    for _ in range(10):
        sizes = torch.zeros(k)
        for part in rows.split(batch):
            counts = dual_assignment(part @ centres.T, duals).bincount(minlength=k).float()
            duals = dual_step(duals, counts, ratio, lr=0.02 * min(batch, k))
            sizes += counts
    least = ratio * n / k
    plain = dual_assignment(rows @ centres.T, torch.zeros(k)).bincount(minlength=k)
    drawing.heading(20, 30, "Sizes of 6 clusters of 3000 images, ratio 0.4")
    drawing.text(
        20, 50, "Dashed: the least size, 0.4 of an even share = 200. The online rule keeps it up to a few images."
    )
    for column, (title, values) in enumerate((("nearest centre", plain), ("highest score + dual, tenth epoch", sizes))):
        x = 30 + 420 * column
        bottom, unit = 236, 0.112
        drawing.text(x, 78, title)
        for cluster, value in enumerate(values.tolist()):
            drawing.box(x + 60 * cluster, bottom - unit * value, 42, unit * value, fill=COLOURS[cluster])
            above = bottom - unit * max(value, least) - 5
            drawing.text(x + 60 * cluster + 21, above, str(round(value)), size=12, anchor="middle")
            if column:
                drawing.text(
                    x + 60 * cluster + 21, bottom + 17, f"{float(duals[cluster]):.2f}", size=12, anchor="middle"
                )
        drawing.path([(x - 8, bottom), (x + 350, bottom)], stroke=INK, line=1.2)
        drawing.path([(x - 8, bottom - unit * least), (x + 350, bottom - unit * least)], line=1.2, dash="4 4")
    drawing.note(442, 253, "dual", "end")
    _label_memory(drawing, top=306)
    return drawing


def _label_memory(drawing: Drawing, top: float) -> None:
    drawing.heading(20, top, "An epoch learns from the labels and centres of the one before")
    for row, words in enumerate(("clusters: builds", "network: learns")):
        drawing.text(20, top + 74 + 74 * row, words)
    for epoch in range(4):
        x = 170 + 172 * epoch
        drawing.note(x + 62, top + 32, f"epoch {epoch}", "middle")
        colour = COLOURS[epoch]
        drawing.box(x, top + 46, 124, 48, stroke=colour, fill=colour)
        drawing.text(x + 62, top + 67, f"centres {epoch}, duals", anchor="middle", colour=GROUND, bold=True, size=12.5)
        drawing.text(x + 62, top + 84, f"labels {epoch}", anchor="middle", colour=GROUND, bold=True, size=12.5)
        if epoch == 0:
            drawing.box(x, top + 120, 124, 48, stroke=FAINT, dash="4 4")
            drawing.text(x + 62, top + 141, "nothing:", anchor="middle", size=12.5)
            drawing.text(x + 62, top + 158, "learning rate 0", anchor="middle", size=12.5)
        else:
            source = COLOURS[epoch - 1]
            drawing.box(x, top + 120, 124, 48, stroke=source, line=2.5)
            drawing.text(x + 62, top + 141, f"to name labels {epoch - 1}", anchor="middle", size=12.5)
            drawing.text(x + 62, top + 158, f"among centres {epoch - 1}", anchor="middle", size=12.5)
            drawing.arrow((x - 46, top + 84), (x - 4, top + 122), source)
    drawing.text(
        20, top + 196, "An image's label is remembered until the image comes again, so one view of it is enough."
    )


PICTURES = {"swav": swav, "jigclu": jigclu, "mejigclu": mejigclu, "smog": smog, "coke": coke}


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "pictures" / "photos", help="folder of JPEG or PNG photos")
    parser.add_argument("--out", type=Path, default=HERE / "pictures", help="folder for the SVG files")
    arguments = parser.parse_args()
    files = sorted(p for p in arguments.data.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:3]
    if not files:
        parser.error(f"{arguments.data} holds no .jpg or .png file")
    photos = [np.array(Image.open(file).convert("RGB")) for file in files]
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the same sums everywhere
    for name, picture in PICTURES.items():
        path = arguments.out / f"{name}.svg"
        picture(photos).save(path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
