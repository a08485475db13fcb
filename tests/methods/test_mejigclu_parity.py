"""MEJigClu beside JigClu's official step with the paper's changes, and its sampler beside the specification's loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tessella.data.sampler import SlotSampler, share
from tessella.data.views import draw
from tessella.methods.mejigclu import Mejigclu, MejigcluConfig
from tessella.ops.montage import tile_order
from tessella.ops.partition import partition
from tests.float64 import precision
from tests.methods import reference_jigclu as official
from tests.methods.beside_jigclu import (
    STEPS_PER_EPOCH,
    official_network,
    train_official,
    train_ours,
    worst,
)
from tests.methods.tiny import BATCH, mejigclu
from tests.ranks import on_ranks

EXACT = 1e-10  # relative, in double precision
IMAGES = 100  # that `mejigclu()` is told of
IDS = np.arange(IMAGES) * 7919 + 3


def slotted(step: int) -> Tensor:
    """Rows of the images in the order of the method."""
    order = Mejigclu.sampler(MejigcluConfig(), len(IDS), BATCH, seed=0)
    return torch.from_numpy(order.batch(*divmod(step, STEPS_PER_EPOCH)))


def four_by_four() -> Mejigclu:
    """Montages of 32 pixels become maps of 4 x 4, whose blocks are averaged as they are."""
    return mejigclu(tile_size=16)


def on_this_rank_in_double() -> list[dict[str, Tensor]]:
    with precision(torch.float64):
        return train_ours(four_by_four, slotted, size=16)


def test_every_loss_gradient_and_state_of_a_run_is_the_specifications():
    with precision(torch.float64):
        theirs = train_official(official_network(four_by_four()), 16, second="cls", official_pooling=False)
    error, where = worst(on_this_rank_in_double(), theirs)
    assert error < EXACT, where


def test_two_ranks_make_the_same_steps():
    """The category is the slot in the batch of all ranks: slots counted within a rank would be another loss.

    Four ranks are compared with one in test_mejigclu.
    """
    with precision(torch.float64):
        theirs = train_official(official_network(four_by_four()), 16, 2, second="cls", official_pooling=False)
    for ours in on_ranks(2, on_this_rank_in_double):
        error, where = worst(ours, theirs)
        assert error < EXACT, where


def test_the_losses_of_a_step_are_the_specifications_in_single_precision():
    (ours, *_), (theirs, *_) = (
        train_ours(mejigclu, slotted, size=8),
        train_official(official_network(mejigclu()), 8, second="cls", official_pooling=False),
    )
    for name in ("loss", "cluster", "second"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)


def test_the_label_of_both_branches_is_the_permutation_modulo_the_batch():
    method = mejigclu()
    for step in range(4):
        order = tile_order(0, step, 4 * BATCH)
        assert torch.equal(method._categories(slotted(step))[order % BATCH], order % BATCH)


# --- sampler ----------------------------------------------------------------------------------------------------


def by_loops(images: int, slots: int, epoch: int, wrap: bool) -> list[list[int]]:
    """The specification's loops, with the split and the shuffles that our order has drawn."""
    part = partition(images, slots, 0)
    split = [np.flatnonzero(part == k).tolist() for k in range(slots)]
    sizes = [len(subset) for subset in split]
    shuffled = SlotSampler(images, slots, 1, parts=slots, partition_seed=0, uneven="wrap")
    shuffles = []
    for k, subset in enumerate(split):
        drawn = [int(shuffled.batch(epoch, t)[k]) for t in range(len(subset))]
        assert sorted(drawn) == subset  # a permutation of the subset
        shuffles.append([subset.index(row) for row in drawn])
    return official.subset_order(split, shuffles, max(sizes) if wrap else min(sizes), wrap)


@pytest.mark.parametrize(("images", "slots"), [(103, 8), (64, 8), (9, 8)])
@pytest.mark.parametrize("uneven", ["drop", "wrap"])
def test_the_order_is_the_specifications_slot_by_slot(images: int, slots: int, uneven: str):
    order = SlotSampler(images, slots, 1, parts=slots, partition_seed=0, uneven=uneven)  # type: ignore[arg-type]
    for epoch in (0, 3):
        ours = [order.batch(epoch, t).tolist() for t in range(order.steps_per_epoch)]
        assert ours == by_loops(images, slots, epoch, uneven == "wrap")


def test_imagenet_has_5004_steps_dropping_and_5005_wrapping():
    steps = [
        SlotSampler(1_281_167, 256, 0, parts=256, partition_seed=0, uneven=uneven).steps_per_epoch  # type: ignore[arg-type]
        for uneven in ("drop", "wrap")
    ]
    assert steps == [5004, 5005]


def test_the_image_that_a_larger_subset_leaves_out_is_another_one_each_epoch():
    order = SlotSampler(103, 8, 1, parts=8, partition_seed=0)
    left_out = [
        set(range(103)) - {row for step in range(12) for row in order.batch(epoch, step).tolist()} for epoch in range(4)
    ]
    part = partition(103, 8, 0)
    assert all(sorted(part[list(rows)]) == list(range(7)) for rows in left_out)  # one of each of the seven larger
    assert len({frozenset(rows) for rows in left_out}) == 4


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_of_any_number_of_ranks_are_runs_of_the_global_slots(accumulate: int):
    order = Mejigclu.sampler(MejigcluConfig(), len(IDS), 16, seed=0)
    rows = order.batch(1, 2)
    for world_size in (1, 2, 4):
        shares = [share(rows, rank, world_size, accumulate) for rank in range(world_size)]
        for micro in range(accumulate):
            together = np.concatenate([shares[rank][micro] for rank in range(world_size)])
            size = 16 // accumulate
            np.testing.assert_array_equal(
                partition(IMAGES, 16, 0)[together], np.arange(micro * size, (micro + 1) * size)
            )


def test_categories_beside_the_batch_size_keep_their_images_when_the_batch_changes():
    config = MejigcluConfig(categories=20)
    category: dict[int, int] = {}
    for batch_size in (4, 10, 20):
        method = mejigclu(batch=batch_size, categories=20)
        order = Mejigclu.sampler(config, len(IDS), batch_size, seed=batch_size)
        for step in range(order.steps_per_epoch):
            rows = order.batch(0, step)
            labels = method._categories(torch.from_numpy(rows)).tolist()
            assert len(set(labels)) == batch_size
            for row, label in zip(rows.tolist(), labels, strict=True):
                assert category.setdefault(row, label) == label


# --- overlap ----------------------------------------------------------------------------------------------------


def test_tiles_of_a_random_overlap_have_the_rounded_share_of_the_side_and_lie_in_their_corners():
    """Boxes by the specification, with the overlap of each image recovered from its largest tile."""
    spec = Mejigclu.view_spec(MejigcluConfig(crop_scale=(1.0, 1.0)))
    side = 10_000
    boxes = draw(spec, 0, 0, np.arange(2000), np.full((2000, 2), side)).box
    overlap = boxes[:, 0, 2] / side - 0.5
    assert overlap.min() >= 0.15 and overlap.max() <= 0.45 and abs(overlap.mean() - 0.3) < 0.01
    for place, (column, row) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        width = np.rint((0.5 + overlap) * side)
        corner = np.rint((0.5 - overlap) * side)
        filled = boxes[:, place, 2] == boxes[:, place, 3]  # a square crop of a square tile at scale 1 is the tile
        assert filled.mean() > 0
        np.testing.assert_array_equal(boxes[filled, place, 2], width[filled])
        np.testing.assert_array_equal(boxes[filled, place, 0], (column * corner)[filled])
        np.testing.assert_array_equal(boxes[filled, place, 1], (row * corner)[filled])
