"""The graph that turns pixels into a network's input computes what `EvalTransform` computes, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tessella.data.transform import EvalTransform

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from tessella.formats.pixels import can_transform, pixels_to_images  # noqa: E402

TRANSFORMS = {
    "small": EvalTransform(32, 32),
    "inner part": EvalTransform(56, 64),
    "bicubic": EvalTransform(40, 45, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    "both sides": EvalTransform(24, 30, fit="both sides"),
}
SIZES = [(64, 64), (200, 123), (17, 400), (7, 9), (3, 100), (300, 5), (401, 399)]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_pixels_of_any_size_become_the_images_of_our_transform(transform: EvalTransform):
    session = onnxruntime.InferenceSession(pixels_to_images(transform).SerializeToString())
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (2, *size, 3), dtype=np.uint8)
        (images,) = session.run(None, {"pixels": pixels})
        expected = transform(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert np.array_equal(images, expected.numpy()), size


def test_a_transform_that_resizes_twice_is_left_to_others():
    assert not can_transform(EvalTransform(224, 256, fit="shorter side, then both"))
    assert all(map(can_transform, TRANSFORMS.values()))
