"""Training crops: mask and image move together, and nothing but (seed, epoch, id) decides where."""

from __future__ import annotations

import colorsys
from itertools import islice

import numpy as np
import pytest
import torch

from tessella.data.masks.layouts import IGNORE, ArrayMasks
from tessella.errors import UserError
from tessella.protocols.segmentation.batches import (
    crop_with_mask,
    distort,
    draw_numbers,
    fitted,
    training_batches,
    whole_images,
)
from tessella.protocols.segmentation.data import SegmentationData
from tessella.protocols.segmentation.recipes import CropSpec, SegmentationConfig

PLAIN = CropSpec(size=16, resize=None, scale=(1.0, 1.0), flip=0.0, most=1.0, distort=False)


def picture(height=40, width=50, blocks=5):
    """Each block of pixels has a colour that names its class."""
    mask = (np.indices((height, width)) // blocks).sum(axis=0).astype(np.uint8) % 7
    return np.repeat((mask * 30)[..., None], 3, axis=-1), mask


def numbers(**at):
    values = np.full(31, 0.5)
    for place, value in at.items():
        values[int(place[1:])] = value
    return values


@pytest.mark.parametrize(
    ("size", "bounds", "factor", "expected"),
    [
        ((500, 375), (2048, 512), 1.0, (683, 512)),  # the shorter side decides
        ((375, 500), (2048, 512), 2.0, (1024, 1365)),
        ((4000, 100), (2048, 512), 1.0, (2048, 51)),  # the longer one
        ((240, 180), None, 0.5, (120, 90)),
        ((1000, 1), None, 0.001, (1, 1)),
    ],
)
def test_images_are_fitted_to_bounds_and_keep_their_shape(size, bounds, factor, expected):
    assert fitted(*size, bounds, factor) == expected


def test_a_crop_at_full_size_is_a_piece_of_image_and_mask():
    image, mask = picture()
    crop, labels = crop_with_mask(image, mask, numbers(n2=0.25, n3=0.75), PLAIN)
    left, top = int(0.25 * 35), int(0.75 * 25)
    assert torch.equal(crop, torch.from_numpy(image[top : top + 16, left : left + 16]).permute(2, 0, 1).float())
    np.testing.assert_array_equal(labels, mask[top : top + 16, left : left + 16])


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.7])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_image_and_mask_move_together_whatever_the_scale_and_flip(scale, flip):
    image, mask = picture(80, 100, 20)
    spec = CropSpec(size=32, resize=None, scale=(scale, scale), flip=flip, most=1.0, distort=False)
    crop, labels = crop_with_mask(image, mask, numbers(n1=0.3, n2=0.9, n3=0.1), spec)
    assert crop.shape[1:] == labels.shape == (32, 32)
    agree = (crop[0].numpy() - labels.astype(float) * 30).__abs__() < 15
    assert agree.mean() > 0.85  # the rest are pixels between two blocks


def test_a_small_image_fills_a_part_of_the_crop_and_the_rest_does_not_count():
    image, mask = picture(10, 12)
    images = ArrayMasks("x", image[None], mask[None], [str(i) for i in range(7)])
    data = SegmentationData(images, images, mean=(0.5,) * 3, std=(0.25,) * 3, workers=1)
    batch = next(training_batches(data, SegmentationConfig(crops=PLAIN, batch_size=1)))
    np.testing.assert_array_equal(batch.labels[0, :10, :12].numpy(), mask)
    assert (batch.labels[0, 10:] == IGNORE).all() and (batch.labels[0, :, 12:] == IGNORE).all()
    assert not batch.pixels[0, :, 10:].any()  # the mean colour
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch.pixels[0, :, :10, :12], expected)


def test_crops_that_one_class_fills_are_drawn_again():
    image, mask = picture(40, 200)
    mask[:, :150] = 0
    spec = CropSpec(size=16, resize=None, scale=(1.0, 1.0), flip=0.0, most=0.75, distort=False)
    filled = [
        (crop_with_mask(image, mask, draw, spec)[1] == 0).mean() > 0.75 for draw in draw_numbers(0, 0, np.arange(100))
    ]
    unchecked = [
        (crop_with_mask(image, mask, draw, PLAIN)[1] == 0).mean() > 0.75 for draw in draw_numbers(0, 0, np.arange(100))
    ]
    assert np.mean(filled) < 0.1 < 0.6 < np.mean(unchecked)


def test_the_draw_depends_on_seed_epoch_and_id_alone():
    ids = np.array([5, 9, 2**40])
    np.testing.assert_array_equal(draw_numbers(1, 2, ids)[[2, 0]], draw_numbers(1, 2, ids[[2, 0]]))
    assert not (draw_numbers(1, 2, ids) == draw_numbers(1, 3, ids)).any()
    assert not (draw_numbers(1, 2, ids) == draw_numbers(2, 2, ids)).any()


def slow_distortion(rgb, brightness, contrast, saturation, hue, contrast_first):
    """One pixel by the definition, through colorsys' HSV."""
    rgb = [min(max(c + brightness, 0), 255) for c in rgb]
    if contrast_first:
        rgb = [min(c * contrast, 255) for c in rgb]
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    rgb = [c * 255 for c in colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)]
    return rgb if contrast_first else [min(c * contrast, 255) for c in rgb]


@pytest.mark.parametrize("first", [True, False])
def test_distortion_equals_its_definition_pixel_by_pixel(first):
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (3, 6, 7))).float()
    draw = np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.95, 0.4, 0.1, 0.2 if first else 0.8])
    expected = np.array(
        [
            slow_distortion(pixel, 32 * 0.8, 1.3, 1.45, -0.08, first)
            for pixel in pixels.flatten(1).T.double().numpy().tolist()
        ]
    )
    found = distort(pixels.clone(), draw).flatten(1).T.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_distortion_that_is_not_drawn_changes_nothing():
    pixels = torch.rand(3, 4, 4) * 255
    assert torch.equal(distort(pixels.clone(), np.full(9, 0.7)), pixels)


def test_two_ranks_see_the_halves_of_what_one_sees():
    image, mask = picture()
    images = ArrayMasks("x", np.stack([image] * 6), np.stack([mask] * 6), [str(i) for i in range(7)])
    spec = CropSpec(size=16, resize=None)

    def batches(rank, world_size, workers):
        data = SegmentationData(images, images, workers=workers)
        config = SegmentationConfig(crops=spec, batch_size=4, seed=3)
        return list(islice(training_batches(data, config, 0, rank, world_size), 3))

    for whole, *halves in zip(batches(0, 1, 2), batches(0, 2, 1), batches(1, 2, 3), strict=True):
        assert torch.equal(whole.pixels, torch.cat([half.pixels for half in halves]))
        assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))
    with pytest.raises(UserError, match="cannot be shared equally"):
        batches(0, 3, 1)


def test_whole_images_keep_their_masks_as_stored():
    image, mask = picture()
    images = ArrayMasks("x", image[None], mask[None], [str(i) for i in range(7)])
    data = SegmentationData(images, images, mean=(0, 0, 0), std=(1, 1, 1), workers=1)
    [same] = whole_images(data, np.array([0]), None, {})
    torch.testing.assert_close(same.pixels[0] * 255, torch.from_numpy(image).permute(2, 0, 1).float())
    [larger] = whole_images(data, np.array([0]), (200, 80), {})
    assert larger.pixels.shape == (1, 3, 80, 100)
    np.testing.assert_array_equal(larger.mask, mask)
