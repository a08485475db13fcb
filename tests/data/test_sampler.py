"""The order of images: a function of (seed, epoch, position), shared by any number of ranks."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from tessella.data.sampler import EpochSampler, SlotSampler, check_shares, share
from tessella.errors import UserError
from tessella.ops.partition import partition

IMAGES = 103


def epoch_of(order, epoch):
    return np.stack([order.batch(epoch, step) for step in range(order.steps_per_epoch)])


def test_an_epoch_shows_each_image_at_most_once_and_drops_less_than_a_batch():
    order = EpochSampler(IMAGES, 10, seed=1)
    rows = np.concatenate([order.batch(2, step) for step in range(order.steps_per_epoch)])
    assert order.steps_per_epoch == 10
    assert len(np.unique(rows)) == len(rows) == 100


def test_epochs_differ_and_so_do_seeds_but_the_same_question_has_the_same_answer():
    first = epoch_of(EpochSampler(IMAGES, 10, seed=1), 0)
    assert not np.array_equal(epoch_of(EpochSampler(IMAGES, 10, seed=1), 1), first)
    assert not np.array_equal(epoch_of(EpochSampler(IMAGES, 10, seed=2), 0), first)
    np.testing.assert_array_equal(epoch_of(EpochSampler(IMAGES, 10, seed=1), 0), first)


def test_a_step_of_a_hundred_million_images_costs_what_its_batch_costs():
    """Memory and time that a whole epoch's order would take: 800 MB and half a minute."""
    tracemalloc.start()
    begin = time.process_time()
    for order in (
        EpochSampler(10**8, 4096, seed=1),
        SlotSampler(10**8, 4096, 1, parts=4096, partition_seed=0),
    ):
        rows = np.concatenate([order.batch(3, step) for step in (0, 1, order.steps_per_epoch - 1)])
        assert len(np.unique(rows)) == len(rows) and rows.min() >= 0 and 9.9e7 < rows.max() < 10**8
    assert time.process_time() - begin < 2
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = EpochSampler(IMAGES, 10, seed=1), EpochSampler(IMAGES, 20, seed=1)
    np.testing.assert_array_equal(np.concatenate([small.batch(0, 2), small.batch(0, 3)]), large.batch(0, 1))


def test_images_left_out_of_one_epoch_are_seen_in_another():
    order = EpochSampler(IMAGES, 10, seed=1)
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
        EpochSampler(IMAGES, batch_size, seed=0)


def test_refuses_unequal_shares_and_names_the_nearest_sizes():
    check_shares(24, 4, 3)
    with pytest.raises(UserError, match=r"batch_size=25 .* 4 ranks x 3 micro-batches: use 24 or 36"):
        check_shares(25, 4, 3)
    with pytest.raises(UserError, match="use 12,"):
        check_shares(5, 4, 3)


# --- slots ----------------------------------------------------------------------------------------------------


def slot_order(batch_size=8, parts=8, seed=1, **options):
    return SlotSampler(IMAGES, batch_size, seed, parts=parts, partition_seed=0, **options)


def test_slot_k_draws_from_part_k_in_every_step_of_every_epoch():
    part = partition(103, 8, 0)
    for epoch in range(4):
        assert (part[epoch_of(slot_order(), epoch)] == np.arange(8)).all()


def test_an_epoch_repeats_no_image_and_leaves_out_what_the_larger_parts_have_too_many():
    order = slot_order()
    assert order.steps_per_epoch == 103 // 8
    rows = epoch_of(order, 2).ravel()
    assert len(np.unique(rows)) == len(rows) == 103 - 103 % 8


def test_wrapping_shows_every_image_and_repeats_one_of_each_smaller_part():
    part, order = partition(103, 8, 0), slot_order(uneven="wrap")
    rows = epoch_of(order, 0)
    seen, times = np.unique(rows, return_counts=True)
    assert order.steps_per_epoch == 13 and len(seen) == 103
    assert sorted(part[seen[times == 2]]) == [7] and times.max() == 2  # 103 = 7 * 13 + 12
    assert (part[rows] == np.arange(8)).all()


def test_over_epochs_every_image_is_seen_and_the_order_within_a_part_changes():
    order = slot_order()
    epochs = [epoch_of(order, epoch).copy() for epoch in range(60)]
    assert set(np.concatenate(epochs).ravel().tolist()) == set(range(103))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epoch_of(slot_order(seed=2), 0), epochs[0])
    np.testing.assert_array_equal(epoch_of(slot_order(), 0), epochs[0])


def test_which_image_of_a_part_comes_when_is_uniform():
    first = np.array([slot_order().batch(epoch, 0)[0] for epoch in range(2000)])
    _, counts = np.unique(first, return_counts=True)
    assert len(counts) == 13 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("uneven", ["drop", "wrap"])
@pytest.mark.parametrize(("batch_size", "parts"), [(4, 8), (5, 8), (7, 8), (3, 50), (1, 4)])
def test_with_more_parts_than_slots_a_batch_holds_different_parts_and_all_take_equal_turns(batch_size, parts, uneven):
    part, order = partition(103, parts, 0), slot_order(batch_size, parts, uneven=uneven)
    rows = epoch_of(order, 0)
    drawn = part[rows]
    assert (np.diff(drawn, axis=1) > 0).all()  # ascending, so different
    turns = np.bincount(drawn.ravel(), minlength=parts)
    rounds = 103 // parts if uneven == "drop" else -(-103 // parts)
    assert turns.max() <= rounds and turns.min() >= rounds - 1
    assert order.steps_per_epoch == rounds * parts // batch_size
    if uneven == "drop":
        assert len(np.unique(rows)) == rows.size
    if batch_size > 1:
        assert not np.array_equal(np.sort(drawn, axis=0), np.sort(part[epoch_of(order, 1)], axis=0))


def test_the_first_step_of_epochs_draws_every_part_equally_often():
    drawn = [partition(103, 8, 0)[slot_order(3).batch(epoch, 0)] for epoch in range(800)]
    assert stats.chisquare(np.bincount(np.ravel(drawn))).pvalue > 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_sees_its_own_run_of_slots(world_size):
    rows = slot_order().batch(0, 3)
    parts = [share(rows, rank, world_size, 1)[0] for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    for rank, mine in enumerate(parts):
        local = 8 // world_size
        np.testing.assert_array_equal(partition(103, 8, 0)[mine], np.arange(rank * local, (rank + 1) * local))


def test_refuses_more_slots_than_parts_and_more_parts_than_images():
    with pytest.raises(UserError, match=r"batch_size=16 .* there are 8: set categories to 16"):
        slot_order(16)
    with pytest.raises(UserError, match=r"103 images cannot be cut into 104 categories"):
        slot_order(8, 104)
