"""JigClu's geometry: overlapping tiles of an image, montages of tiles, and montages taken apart again.

Tiles are numbered column by column (for m = 2: top-left, bottom-left, top-right, bottom-right), the order of the
official code, so that its location head can be imported. Montage slots are numbered row by row. The two orders are
unrelated: a tile keeps its number wherever it lands.

Source: Chen, Liu, Jia, "Jigsaw Clustering for Unsupervised Visual Representation Learning", CVPR 2021, section 3.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tessella import dist
from tessella.errors import UserError
from tessella.ops.philox import permutation, stream_key


def tile_boxes(width: ArrayLike, height: ArrayLike, m: int, overlap: ArrayLike) -> NDArray[np.int64]:
    """Boxes of the m * m overlapping tiles of each image.

    A tile reaches `overlap` of the image's side beyond its cell on every inner edge, so for m = 2 it covers
    0.5 + overlap of each side. Edges are rounded half to even, as Pillow's crop does; a tile has at least one pixel.

    Args:
        width: (n,) image widths in pixels.
        height: (n,) image heights in pixels.
        m: tiles per side, at least 1.
        overlap: share of the image's side, in [0, 0.5]; a number, (n,), or (n, 2) of x and y.

    Returns:
        (n, m * m, 4) of (left, top, right, bottom).
    """
    tile = np.arange(m * m)
    column, row = tile // m, tile % m
    overlap = np.asarray(overlap, dtype=np.float64)
    along_x, along_y = overlap.T[..., None] if overlap.ndim == 2 else (overlap.reshape(-1, 1),) * 2

    def span(
        side: ArrayLike, cell: NDArray[np.int64], overlap: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        length = np.asarray(side, dtype=np.int64).reshape(-1, 1)
        edges = np.arange(m + 1) * length / m
        if m == 2:
            edges = np.floor(edges)  # the official code halves an odd side without the remainder
        start = edges[:, cell] - overlap * length * (cell > 0)
        end = edges[:, cell + 1] + overlap * length * (cell < m - 1)
        first = np.rint(np.clip(start, 0, length - 1))
        return first, np.maximum(np.rint(np.clip(end, 0, length)), first + 1)

    (left, right), (top, bottom) = span(width, column, along_x), span(height, row, along_y)
    return np.stack((left, top, right, bottom), axis=-1).astype(np.int64)


def tile_order(seed: int, step: int, count: int) -> Tensor:
    """The step's order of the `count` = m * m * n tiles of all ranks, the same on every rank.

    (count,) int64 permutation: position k of the shuffled list shows tile order[k]. `step` counts from 0 over the run.
    """
    return torch.from_numpy(permutation(stream_key(seed, "tile"), range(count), step))


def montage_positions(n: int, m: int, rank: int, world_size: int) -> Tensor:
    """Positions in the shuffled tile list that make up one rank's montages: (m * m, n / world_size) int64.

    Position k of the list of m * m * n tiles lies in montage k % n, slot k // n. Entry (slot, j) is the position shown
    in `slot` of the rank's j-th montage.
    """
    local = n // world_size
    slots = torch.arange(m * m)[:, None]
    return slots * n + rank * local + torch.arange(local)[None, :]


def stitch(tiles: Tensor, m: int) -> Tensor:
    """Montages (b, c, m * s, m * s) from tiles (m * m, b, c, s, s), slot by slot, slots row by row."""
    _, b, c, s, _ = tiles.shape
    grid = tiles.view(m, m, b, c, s, s)  # row, column, ...
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(b, c, m * s, m * s)


@torch.no_grad()
def shuffled_montages(tiles: Tensor, order: Tensor, m: int) -> Tensor:
    """This rank's montages, made of the tiles of all ranks; it receives only those. Every rank must call it.

    Args:
        tiles: (m * m, b, 3, s, s) of this rank's images; tile q * n + i was cut at place q from image i of the n
            images of all ranks.
        order: (m * m * n,) from `tile_order`, on the CPU.
        m: tiles per side.

    Returns:
        (b, 3, m * s, m * s).
    """
    b, ranks, rank = tiles.shape[1], dist.world_size(), dist.rank()
    n = b * ranks
    place, image = np.divmod(order.numpy(), n)  # (m * m * n,) each, by position
    has, shows = image // b, np.arange(len(image)) % n // b  # the rank that has a position's tile, that shows it

    local = np.flatnonzero(has == rank)
    local = local[np.argsort(shows[local], kind="stable")]  # by the rank that shows them, then by position
    needed = np.flatnonzero(shows == rank)  # (m * m * b,), slot by slot
    arrival = np.argsort(np.argsort(has[needed], kind="stable"))  # they come by the rank that has them

    def on_device(indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(indices).to(tiles.device, non_blocking=True)

    sent = tiles[on_device(place[local]), on_device(image[local] - rank * b)]
    counts = (np.bincount(ranks_of, minlength=ranks).tolist() for ranks_of in (shows[local], has[needed]))
    received = dist.all_to_all(sent, *counts)
    return stitch(received[on_device(arrival)].unflatten(0, (m * m, b)), m)


def gather_cells(cells: Tensor) -> Tensor:
    """The inverse of `shuffled_montages`: one vector per position of the shuffled tile list. Every rank must call it.

    From (m * m, b, d) vectors of this rank's cells, in the order of `pool_cells`, to (m * m * n, d) of all ranks,
    differentiable: row k shows tile order[k].
    """
    return dist.gather_with_grad(cells.transpose(0, 1)).transpose(0, 1).flatten(0, 1)


def pool_cells(maps: Tensor, m: int) -> Tensor:
    """One vector per montage slot: the map (b, d, h, w) cut into m * m cells, each averaged: (m * m, b, d), row by row.

    A map whose side is not divisible by m is first enlarged to the next multiple (7 to 8 for m = 2, as in the
    official code), so that no column is counted in two cells.

    Raises:
        UserError: the map has fewer than m positions along a side, so that several tiles would share one.
    """
    h, w = maps.shape[-2:]
    if min(h, w) < m:
        raise UserError(
            f"the backbone turns a montage of {m} x {m} tiles into a map of {h} x {w} positions, which cannot tell the "
            "tiles apart: use larger tiles (tile_size), or a backbone that shrinks images less (--backbone.stem small)"
        )
    target = (-(-h // m) * m, -(-w // m) * m)
    if target != (h, w):
        maps = F.interpolate(maps, size=target, mode="bilinear", align_corners=False)
    cells = F.adaptive_avg_pool2d(maps, (m, m))
    return cells.flatten(2).permute(2, 0, 1)
