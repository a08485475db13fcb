"""A fixed split of a data set: disjoint, even, random, and blind to the order of the files."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from tessella.ops.partition import partition


@pytest.mark.parametrize(("images", "parts"), [(103, 8), (64, 8), (8, 8), (5, 8), (0, 3)])
def test_every_image_is_in_one_part_and_sizes_differ_by_at_most_one(images: int, parts: int):
    part = partition(images, parts, 0)
    sizes = np.bincount(part, minlength=parts)
    assert len(part) == images and len(sizes) == parts
    assert sizes.tolist() == [images // parts + (k < images % parts) for k in range(parts)]


def test_imagenet_in_256_parts():
    sizes, times = np.unique(np.bincount(partition(1_281_167, 256, 0)), return_counts=True)
    assert (sizes.tolist(), times.tolist()) == ([5004, 5005], [113, 143])


def test_the_split_is_a_function_of_its_seed():
    np.testing.assert_array_equal(partition(100, 8, 0), partition(100, 8, 0))
    assert not np.array_equal(partition(100, 8, 0), partition(100, 8, 1))


def test_parts_tell_no_more_about_the_class_than_a_random_labelling_does():
    """On a folder sorted by class, where a split into runs of rows would give the classes away."""
    classes = np.repeat(np.arange(10), 500)
    rng = np.random.default_rng(0)
    by_chance = [mutual_info_score(rng.permutation(np.arange(5000) % 128), classes) for _ in range(50)]
    ours = mutual_info_score(partition(5000, 128, 0), classes)
    assert abs(ours - np.mean(by_chance)) < 4 * np.std(by_chance)
    assert mutual_info_score(np.arange(5000) * 128 // 5000, classes) > 10 * ours
