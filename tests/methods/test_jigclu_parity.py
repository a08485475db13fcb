"""JigClu beside the official step written out: losses, gradients and state of six updates over three epochs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessella.data.batch import Batch
from tessella.methods.jigclu import Jigclu
from tessella.ops.montage import pool_cells, shuffled_montages, tile_order
from tests.float64 import precision
from tests.methods import reference_jigclu as official
from tests.methods.beside_jigclu import (
    official_network,
    tiles_of,
    train_official,
    train_ours,
    worst,
)
from tests.methods.tiny import BATCH, jigclu, this_ranks_share
from tests.ranks import on_ranks

EXACT = 1e-10  # relative, in double precision; what is wrong in the mathematics is off by far more


def same_images(step: int) -> Tensor:
    return torch.arange(BATCH)


def seven_by_seven() -> Jigclu:
    """Montages of 56 pixels become maps of 7 x 7, as ImageNet's do."""
    return jigclu(tile_size=28)


def two_by_two() -> Jigclu:
    """Cheaper: montages of 16 pixels become maps of 2 x 2."""
    return jigclu(tile_size=8, cluster_scale="paper", cluster_weight=0.5, location_weight=2.0)


WEIGHTED = {"base_temperature": 0.3, "alpha": 2.0, "beta": 0.5, "official_pooling": False}


def test_every_loss_gradient_and_state_of_a_run_is_the_official_one():
    with precision(torch.float64):
        ours = train_ours(seven_by_seven, same_images, size=28)
        theirs = train_official(official_network(seven_by_seven()), size=28, second="loc")
    error, where = worst(ours, theirs)
    assert error < EXACT, where
    assert float(ours[-1]["loss"]) < float(ours[0]["loss"])


def two_by_two_on_this_rank() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Its history, and this rank's montages of one step."""
    with precision(torch.float64):
        mine = this_ranks_share(Batch((tiles_of(0, 8),), torch.arange(BATCH))).views[0]
        return train_ours(two_by_two, same_images, size=8), shuffled_montages(mine, tile_order(0, 5, 4 * BATCH), 2)


def test_four_ranks_make_the_official_steps_with_the_papers_scale_and_other_weights():
    """Two ranks are compared with one in test_jigclu."""
    with precision(torch.float64):
        theirs = train_official(official_network(two_by_two()), 8, world_size=4, second="loc", **WEIGHTED)
        tiles_of_ranks = [list(tiles) for tiles in tiles_of(0, 8).chunk(4, dim=1)]
    montages = official.montages(tiles_of_ranks, tile_order(0, 5, 4 * BATCH))
    for (ours, mine), expected in zip(on_ranks(4, two_by_two_on_this_rank), montages, strict=True):
        error, where = worst(ours, theirs)
        assert error < EXACT, where
        assert torch.equal(mine, expected)


def test_the_losses_of_a_step_are_the_official_ones_in_single_precision():
    (ours, *_), (theirs, *_) = (
        train_ours(lambda: jigclu(tile_size=8), same_images, size=8),
        train_official(official_network(jigclu(tile_size=8)), 8, second="loc", official_pooling=False),
    )
    for name in ("loss", "cluster", "second"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", [7, 8])
def test_cells_are_the_official_ones_on_the_maps_that_the_official_code_meets(side: int):
    maps = torch.randn(3, 5, side, side)
    torch.testing.assert_close(pool_cells(maps, 2).flatten(0, 1), official.official_cells(maps))


def test_montages_are_the_official_ones_and_come_apart_into_the_permuted_tiles():
    tiles, order = tiles_of(0, 8), tile_order(0, 5, 4 * BATCH)
    montages = shuffled_montages(tiles, order, 2)
    (theirs,) = official.montages([list(tiles)], order)
    assert torch.equal(montages, theirs)
    slots = montages.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(2, 4, 0, 1, 3, 5)  # row, column, montage, ...
    assert torch.equal(slots.flatten(0, 2), tiles.flatten(0, 1)[order])
