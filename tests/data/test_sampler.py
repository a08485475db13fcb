"""The order of images: a function of (seed, epoch, position), shared by any number of ranks."""

import numpy as np
import pytest

from tessella.data.sampler import EpochOrder, check_shares, share
from tessella.errors import UserError

IDS = np.arange(103) * 1_000_003 + 17


def test_an_epoch_shows_each_image_at_most_once_and_drops_less_than_a_batch():
    order = EpochOrder(IDS, 10, seed=1)
    rows = np.concatenate([order.batch(2, step) for step in range(order.steps_per_epoch)])
    assert order.steps_per_epoch == 10
    assert len(np.unique(rows)) == len(rows) == 100


def test_epochs_differ_and_so_do_seeds_but_the_same_question_has_the_same_answer():
    order = EpochOrder(IDS, 10, seed=1)
    first = order.order(0).copy()
    assert not np.array_equal(order.order(1), first)
    assert not np.array_equal(EpochOrder(IDS, 10, seed=2).order(0), first)
    np.testing.assert_array_equal(order.order(0), first)
    np.testing.assert_array_equal(EpochOrder(IDS, 10, seed=1).order(0), first)


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = EpochOrder(IDS, 10, seed=1), EpochOrder(IDS, 20, seed=1)
    np.testing.assert_array_equal(np.concatenate([small.batch(0, 2), small.batch(0, 3)]), large.batch(0, 1))


def test_images_left_out_of_one_epoch_are_seen_in_another():
    order = EpochOrder(IDS, 10, seed=1)
    seen = {row for epoch in range(5) for step in range(10) for row in order.batch(epoch, step).tolist()}
    assert seen == set(range(103))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_each_micro_batch_of_one_rank(world_size, accumulate):
    rows = np.random.default_rng(0).permutation(24)
    parts = [share(rows, rank, world_size, accumulate) for rank in range(world_size)]
    together = [np.concatenate(micro) for micro in zip(*parts, strict=True)]
    for micro, alone in zip(together, share(rows, 0, 1, accumulate), strict=True):
        np.testing.assert_array_equal(micro, alone)
    np.testing.assert_array_equal(np.concatenate(together), rows)


@pytest.mark.parametrize("batch_size", [0, 104])
def test_refuses_a_batch_that_the_data_set_cannot_fill(batch_size):
    with pytest.raises(UserError, match=rf"batch_size={batch_size} .* 103 images.*between 1 and 103"):
        EpochOrder(IDS, batch_size, seed=0)


def test_refuses_unequal_shares_and_names_the_nearest_sizes():
    check_shares(24, 4, 3)
    with pytest.raises(UserError, match=r"batch_size=25 .* 4 ranks x 3 micro-batches: use 24 or 36"):
        check_shares(25, 4, 3)
    with pytest.raises(UserError, match="use 12,"):
        check_shares(5, 4, 3)
