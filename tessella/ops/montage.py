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
    """The step's order of all tiles of the batch, drawn alike on every rank.

    Args:
        seed: of the run.
        step: of the run, from 0.
        count: tiles of all ranks, m * m * n.

    Returns:
        (count,) int64 permutation: position k of the shuffled list shows tile order[k].
    """
    return torch.from_numpy(permutation(stream_key(seed, "tile"), range(count), step))


def montage_positions(n: int, m: int, rank: int, world_size: int) -> Tensor:
    """Positions in the permuted tile list that make up one rank's montages.

    Position k of the list of m * m * n tiles lies in montage k % n, slot k // n.

    Returns:
        (m * m, n / world_size) int64: entry (slot, j) is the position shown in `slot` of the rank's j-th montage.
    """
    local = n // world_size
    slots = torch.arange(m * m)[:, None]
    return slots * n + rank * local + torch.arange(local)[None, :]


def stitch(tiles: Tensor, m: int) -> Tensor:
    """Montages from tiles.

    Args:
        tiles: (m * m, b, c, s, s), slot by slot, slots row by row.
        m: tiles per side.

    Returns:
        (b, c, m * s, m * s).
    """
    _, b, c, s, _ = tiles.shape
    grid = tiles.view(m, m, b, c, s, s)  # row, column, ...
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(b, c, m * s, m * s)


@torch.no_grad()
def shuffled_montages(tiles: Tensor, order: Tensor, m: int) -> Tensor:
    """This rank's montages, made of the tiles of all ranks, of which it gets its own share only. On all ranks together.

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

    mine = np.flatnonzero(has == rank)
    mine = mine[np.argsort(shows[mine], kind="stable")]  # by the rank that shows them, then by position
    wanted = np.flatnonzero(shows == rank)  # (m * m * b,), slot by slot
    arrival = np.argsort(np.argsort(has[wanted], kind="stable"))  # they come by the rank that has them

    def on_device(indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(indices).to(tiles.device, non_blocking=True)

    sent = tiles[on_device(place[mine]), on_device(image[mine] - rank * b)]
    counts = (np.bincount(who, minlength=ranks).tolist() for who in (shows[mine], has[wanted]))
    received = dist.all_to_all(sent, *counts)
    return stitch(received[on_device(arrival)].unflatten(0, (m * m, b)), m)


def gather_cells(cells: Tensor) -> Tensor:
    """The way back of `shuffled_montages`: one vector per position of the permuted tile list. On all ranks together.

    Args:
        cells: (m * m, b, d) vectors of the cells of this rank's montages, in the order of `pool_cells`.

    Returns:
        (m * m * n, d) of all ranks, differentiable: row k shows tile order[k].
    """
    return dist.gather_with_grad(cells.transpose(0, 1)).transpose(0, 1).flatten(0, 1)


def unstitch(montages: Tensor, m: int) -> Tensor:
    """Tiles from montages; the exact inverse of `stitch`.

    Args:
        montages: (b, c, m * s, m * s).
        m: tiles per side.

    Returns:
        (m * m, b, c, s, s), slots row by row.
    """
    b, c, side, _ = montages.shape
    s = side // m
    grid = montages.view(b, c, m, s, m, s)
    return grid.permute(2, 4, 0, 1, 3, 5).reshape(m * m, b, c, s, s)


def pool_cells(maps: Tensor, m: int) -> Tensor:
    """One vector per montage slot: the feature map cut into m * m cells, each averaged.

    A map whose side is not divisible by m is first enlarged to the next multiple (7 to 8 for m = 2, as in the
    official code), so that no column is counted in two cells.

    Args:
        maps: (b, d, h, w).
        m: cells per side.

    Returns:
        (m * m, b, d), cells row by row.

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
