"""JigClu's geometry: the worked boxes, the order of slots, exact inverses, cells that do not leak."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessella import dist
from tessella.errors import UserError
from tessella.ops.montage import (
    montage_positions,
    pool_cells,
    shuffled_montages,
    stitch,
    tile_boxes,
    tile_order,
)
from tests.ranks import on_ranks


def test_tiles_have_the_worked_boxes_column_by_column():
    boxes = tile_boxes([100], [80], 2, 0.3)[0].tolist()
    assert boxes == [[0, 0, 80, 64], [0, 16, 80, 80], [20, 0, 100, 64], [20, 16, 100, 80]]


def test_an_odd_side_is_rounded_as_pillow_rounds():
    left, right = tile_boxes([101], [101], 2, 0.3)[0][[0, 2]]
    assert (left[2] - left[0], right[2] - right[0]) == (80, 81)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("size", [(100, 80), (333, 217), (32, 32)])
def test_neighbours_share_twice_the_overlap(size: tuple[int, int], overlap: float):
    width, height = size
    boxes = tile_boxes([width], [height], 2, overlap)[0]
    top_left, bottom_left = boxes[0], boxes[1]
    shared = max(0, top_left[3] - bottom_left[1]) * (top_left[2] - top_left[0])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (top_left, bottom_left)]
    iou = shared / (sum(areas) - shared)
    assert abs(iou - 2 * overlap) < 4 / min(size)


def test_at_one_half_every_tile_is_the_whole_image_and_larger_grids_stay_inside():
    assert (tile_boxes([100], [80], 2, 0.5)[0] == [0, 0, 100, 80]).all()
    boxes = tile_boxes([90], [90], 3, 0.1)[0]
    assert boxes.min() == 0 and boxes.max() == 90
    assert boxes[4].tolist() == [21, 21, 69, 69]  # the centre tile grows on every side


def boxes_by_the_formula(width: int, height: int, m: int, overlap: float) -> list[list[int]]:
    """Column by column, edges rounded as Python rounds; for m = 2 halves without the remainder."""

    def span(side: int, cell: int) -> tuple[int, int]:
        start, end = (side // 2 * edge if m == 2 and edge < 2 else edge * side / m for edge in (cell, cell + 1))
        start, end = start - overlap * side * (cell > 0), end + overlap * side * (cell < m - 1)
        return max(0, round(start)), min(side, round(end))

    boxes = [(span(width, column), span(height, row)) for column in range(m) for row in range(m)]
    return [[x[0], y[0], x[1], y[1]] for x, y in boxes]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_boxes_are_the_formulas_for_any_size_overlap_and_grid(m: int):
    for width, height in [(100, 80), (101, 77), (500, 333), (64, 64), (32, 47), (75, 31)]:
        for overlap in (0.0, 0.07, 0.15, 0.3, 0.45, 0.5):
            assert tile_boxes([width], [height], m, overlap)[0].tolist() == boxes_by_the_formula(
                width, height, m, overlap
            )


def test_at_one_half_the_left_tile_of_an_odd_side_lacks_a_column_as_officially():
    assert tile_boxes([101], [100], 2, 0.5)[0][:, [0, 2]].tolist() == [[0, 100], [0, 100], [0, 101], [0, 101]]


@pytest.mark.parametrize("m", [2, 3, 5])
def test_a_tile_of_the_smallest_image_has_a_pixel_inside_it(m: int):
    sides = np.arange(1, 12)
    boxes = tile_boxes(sides, sides, m, 0.0)
    assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] > boxes[..., :2]).all()
    assert (boxes[..., 2:] <= sides[:, None, None]).all()


def test_boxes_of_many_images_at_once_equal_one_by_one():
    widths, heights = np.array([64, 101, 500]), np.array([48, 77, 333])
    together = tile_boxes(widths, heights, 2, 0.3)
    for row, (w, h) in enumerate(zip(widths, heights, strict=True)):
        assert (tile_boxes([w], [h], 2, 0.3)[0] == together[row]).all()


def test_overlaps_along_x_and_y_may_differ():
    both = tile_boxes([100, 100], [80, 80], 2, [[0.3, 0.1], [0.2, 0.2]])
    wide, tall = tile_boxes([100], [80], 2, 0.3)[0], tile_boxes([100], [80], 2, 0.1)[0]
    assert (both[0][:, [0, 2]] == wide[:, [0, 2]]).all() and (both[0][:, [1, 3]] == tall[:, [1, 3]]).all()
    assert (both[1] == tile_boxes([100], [80], 2, 0.2)[0]).all()


def test_stitch_puts_slots_row_by_row():
    tiles = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 2, 3, 5, 5).contiguous()
    montage = stitch(tiles, 2)
    corners = [montage[0, 0, 0, 0], montage[0, 0, 0, -1], montage[0, 0, -1, 0], montage[0, 0, -1, -1]]
    assert [int(c) for c in corners] == [0, 1, 2, 3]
    random = torch.randn(9, 2, 3, 4, 4)
    montages = stitch(random, 3)
    for slot, tile in enumerate(random):
        row, column = divmod(slot, 3)
        assert torch.equal(montages[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4], tile)


def test_a_slot_of_a_montage_is_the_position_it_was_filled_from():
    n, m = 6, 2
    order = torch.randperm(m * m * n)
    tiles = order.float().view(-1, 1, 1, 1)[torch.arange(m * m * n)].expand(-1, 3, 4, 4)
    rebuilt = torch.empty(m * m * n)
    for rank in range(2):
        positions = montage_positions(n, m, rank, 2)
        cells = pool_cells(stitch(tiles[positions], m), m)[..., 0]
        rebuilt[positions] = cells
    assert torch.equal(rebuilt.long(), order)


def test_a_seven_column_map_is_split_without_counting_the_centre_twice():
    weights = torch.tensor([0.296875, 0.28125, 0.28125, 0.140625, 0, 0, 0])
    columns = torch.eye(7).view(7, 1, 1, 7).expand(7, 1, 7, 7)
    left = pool_cells(columns.contiguous(), 2)[0, :, 0]
    torch.testing.assert_close(left, weights, atol=1e-6, rtol=0)


def test_a_map_too_small_to_tell_the_tiles_apart_is_refused():
    with pytest.raises(UserError, match=r"2 x 2 tiles into a map of 1 x 1 positions.*tile_size"):
        pool_cells(torch.randn(2, 3, 1, 1), 2)


def test_a_divisible_map_is_averaged_block_by_block():
    maps = torch.randn(2, 3, 4, 4)
    blocks = F.avg_pool2d(maps, 2).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(pool_cells(maps, 2), blocks)


def montages_of_this_rank(tiles: Tensor, order: Tensor) -> tuple[Tensor, int]:
    share = tiles.shape[1] // dist.world_size()
    sent: list[int] = []
    exchange = dist.all_to_all
    with mock.patch.object(dist, "all_to_all", lambda x, *counts: sent.append(len(x)) or exchange(x, *counts)):
        return shuffled_montages(tiles[:, dist.rank() * share :][:, :share], order, 2), sent[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_make_the_montages_of_one_process_from_the_tiles_of_all_ranks_and_send_each_tile_once(ranks: int):
    tiles, order = torch.randn(4, 6, 3, 2, 2), tile_order(0, 3, 24)
    found = on_ranks(ranks, montages_of_this_rank, tiles, order)
    assert torch.equal(torch.cat([montages for montages, _ in found]), shuffled_montages(tiles, order, 2))
    assert [sent for _, sent in found] == [24 // ranks] * ranks
