"""Random numbers as a function of counters: the published vectors, independence of company, uniformity."""

import math

import numpy as np
import pytest
from scipy import stats

from tessella.ops.philox import permutation, philox, shuffled, stream_key, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_gives_the_known_answers_of_philox4x32_with_ten_rounds(counter, key, expected):
    assert philox(tuple(key), tuple(counter)).tolist() == expected


def test_the_number_of_an_id_does_not_depend_on_the_other_ids_or_lanes():
    key = stream_key(7, "view")
    whole = uniforms(key, np.arange(100), 3, np.arange(8), 33)
    part = uniforms(key, [42, 7], 3, [5], 33)
    np.testing.assert_array_equal(part[:, 0], whole[[42, 7], 5])
    np.testing.assert_array_equal(uniforms(key, [42], 3, [5], 10)[0, 0], whole[42, 5, :10])


def test_numbers_are_uniform_inside_the_open_interval():
    numbers = uniforms(stream_key(0, "view"), np.arange(5000), 0, np.arange(2), 4).ravel()
    assert numbers.min() > 0 and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.01


@pytest.mark.parametrize("change", ["seed", "stream", "id", "high half of the id", "epoch", "lane"])
def test_everything_in_the_counter_changes_the_numbers(change):
    def draw(seed=1, stream="view", id=5, epoch=2, lane=3):
        return uniforms(stream_key(seed, stream), [id], epoch, [lane], 4)

    changed = {
        "seed": {"seed": 1 + 2**33},
        "stream": {"stream": "rows"},
        "id": {"id": 6},
        "high half of the id": {"id": 5 + 2**40},
        "epoch": {"epoch": 3},
        "lane": {"lane": 4},
    }[change]
    assert not np.isclose(draw(), draw(**changed)).any()


def test_numbers_of_one_draw_are_not_correlated_with_each_other():
    numbers = uniforms(stream_key(0, "view"), np.arange(20000), 0, [0], 8)[:, 0]
    correlation = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(20000)


def test_a_permutation_contains_every_position_once_and_changes_with_the_epoch():
    ids = np.arange(1000) * 17
    orders = [permutation(stream_key(0, "rows"), ids, epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    # Two independent permutations agree at one position on average.
    assert (orders[0] == orders[1]).sum() < 10 and (orders[1] == orders[2]).sum() < 10


def test_ids_keep_their_relative_order_when_others_leave():
    key, ids = stream_key(3, "rows"), np.arange(200) * 3 + 1
    kept = np.delete(ids, [5, 77, 120])
    whole = ids[permutation(key, ids, 4)]
    np.testing.assert_array_equal(kept[permutation(key, kept, 4)], whole[np.isin(whole, kept)])


def test_every_position_is_equally_likely_for_an_id():
    places = np.array([np.argmin(permutation(stream_key(seed, "rows"), np.arange(10), 0)) for seed in range(3000)])
    assert stats.chisquare(np.bincount(places, minlength=10)).pvalue > 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 103, 5000])
def test_every_thing_stands_at_one_position_of_an_order_that_is_never_drawn_whole(count):
    whole = shuffled(stream_key(0, "rows"), np.arange(count), count, 3)
    np.testing.assert_array_equal(np.sort(whole), np.arange(count))
    some = np.array([[count - 1], [count // 2]])
    np.testing.assert_array_equal(shuffled(stream_key(0, "rows"), some, count, 3), whole[some])


def test_lanes_of_different_lengths_are_orders_of_their_own():
    lanes = np.repeat([0, 1], [8, 9])
    positions = np.concatenate([np.arange(8), np.arange(9)])
    counts = np.where(lanes == 0, 8, 9)
    both = shuffled(stream_key(0, "slot"), positions, counts, 2, lanes)
    for lane, count in ((0, 8), (1, 9)):
        alone = shuffled(stream_key(0, "slot"), np.arange(count), count, 2, lane)
        np.testing.assert_array_equal(both[lanes == lane], alone)


def test_all_orders_of_a_few_things_are_equally_likely():
    for count in (2, 3, 4, 5, 6):
        positions, lanes = np.tile(np.arange(count), 12_000), np.repeat(np.arange(12_000), count)
        orders = shuffled(stream_key(1, "rows"), positions, count, 0, lanes).reshape(-1, count)
        _, times = np.unique(orders, axis=0, return_counts=True)
        assert len(times) == math.factorial(count) and stats.chisquare(times).pvalue > 1e-3


@pytest.mark.parametrize("count", [10, 50, 103, 1000])
def test_what_follows_a_thing_in_the_order_is_no_more_likely_to_be_one_than_another(count):
    positions, lanes = np.tile([0, 1, 5], 20_000), np.repeat(np.arange(20_000), 3)
    first, next_, later = shuffled(stream_key(1, "rows"), positions, count, 0, lanes).reshape(-1, 3).T
    for distance in ((next_ - first) % count, (later - first) % count):
        assert stats.chisquare(np.bincount(distance, minlength=count)[1:]).pvalue > 1e-3
