"""An array in memory is a set of images like any other."""

from __future__ import annotations

import numpy as np
import pytest

from tessella.data.index import Index
from tessella.data.sources import ArrayImages
from tessella.errors import UserError
from tests.data.pictures import keys


def test_arrays_are_images_too():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    images = ArrayImages("mine", pixels, [0, 1, 1, 0, 2])
    assert len(images) == 5 and images.uniform_size == (7, 6) and images.classes == ["0", "1", "2"]
    np.testing.assert_array_equal(images.image(3), pixels[3])
    np.testing.assert_array_equal(images.labels, [0, 1, 1, 0, 2])
    assert keys(images) == sorted(keys(images)) and isinstance(images.index, Index)
    assert ArrayImages("mine", pixels).labels is None
    assert images.fingerprint == ArrayImages("other", pixels).fingerprint != ArrayImages("x", 255 - pixels).fingerprint
    gray = ArrayImages("gray", pixels[..., 0])
    np.testing.assert_array_equal(gray.image(1), np.repeat(pixels[1, :, :, :1], 3, axis=-1))


def test_arrays_of_another_shape_or_type_are_refused():
    for wrong in (np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(UserError, match="give uint8"):
            ArrayImages("wrong", wrong)
    with pytest.raises(UserError, match="one integer per image, 2 in all"):
        ArrayImages("wrong", np.zeros((2, 8, 8), np.uint8), [0, 1, 2])
