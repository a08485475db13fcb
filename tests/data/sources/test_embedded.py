"""Embedded sets: the same images everywhere, split without overlap."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tessella.data.sources import open_images
from tessella.errors import UserError
from tests.data.pictures import keys


@pytest.mark.parametrize(("name", "train", "test"), [("digits", 1437, 360), ("shapes", 2000, 500)])
def test_embedded_sets_split_without_overlap_and_are_the_same_every_time(name, train, test):
    parts = [open_images(f"{name}::{split}", labels=True) for split in ("train", "test")]
    assert [len(part) for part in parts] == [train, test]
    assert set(parts[0].ids.tolist()).isdisjoint(parts[1].ids.tolist())
    whole = open_images(name)
    assert whole.labels is None
    assert sorted(keys(parts[0]) + keys(parts[1])) == keys(whole)
    for part in parts:
        assert len(part.classes) == 10 and set(part.labels.tolist()) == set(range(10))
        for row in (0, 7, len(part) - 1):
            same = int(np.flatnonzero(whole.ids == part.ids[row])[0])
            np.testing.assert_array_equal(whole.image(same), part.image(row))
    assert open_images(f"{name}::test").fingerprint == parts[1].fingerprint
    with pytest.raises(UserError, match=f"{name}::train, {name}::test"):
        open_images(f"{name}::valid")


def test_digits_are_the_enlarged_scans():
    from sklearn.datasets import load_digits

    images = open_images("digits::test", labels=True)
    np.testing.assert_array_equal(images.labels, load_digits().target[::5])
    level = np.rint(load_digits().images[5] * 255 / 16).astype(np.uint8)
    expected = np.asarray(Image.fromarray(level).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
    np.testing.assert_array_equal(images.image(1), expected)
